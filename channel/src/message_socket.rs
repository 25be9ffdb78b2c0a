//! Messages and their descriptors on a connected Unix socket: one message per packet on `SOCK_SEQPACKET`, one after the
//! other on `SOCK_STREAM`, which VMMs use among themselves.
//!
//! No call waits longer than its caller says, and none changes the flags of the open file, which other processes may
//! share. A message is received whole, or its descriptors are closed.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_protocol::codec::{CodecError, HEADER, Header, Message};
use baton_protocol::fd_manifest::MAX_FDS;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, SockaddrLike, UnixAddr,
    UnixCredentials, getsockname, getsockopt, sendmsg, setsockopt, shutdown, socketpair, sockopt,
};

use crate::connect::connect;
use crate::peer::Peer;
use crate::scm;

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// It is not such a socket.
    #[error("the descriptor is no Unix socket for packets or a stream")]
    NotUnix,
    /// No process listens there, or this one may not connect.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket's path.
        path: std::path::PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection, or died.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent nothing, or read nothing, in time.
    #[error("the peer did not answer in time")]
    Timeout,
    /// The packet is not a message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The kernel dropped descriptors that exceeded this process' limit.
    #[error("not all descriptors of a message could be taken: raise the limit of open files")]
    FdsLost,
    /// The message has more descriptors than are allowed.
    #[error("a message brings more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// A system call failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed,
            Errno::EAGAIN => Self::Timeout,
            other => Self::Io(other.into()),
        }
    }
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet<M> {
    /// The message.
    pub message: M,
    /// Its descriptors, in the order of its manifest.
    pub fds: Vec<OwnedFd>,
}

/// A connected Unix socket.
#[derive(Debug)]
pub struct MessageSocket {
    socket: OwnedFd,
    stream: bool,
    /// Receives packets. It is kept because its pages fault when they are first written.
    buffer: Mutex<Vec<u8>>,
}

impl AsFd for MessageSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<MessageSocket> for OwnedFd {
    fn from(socket: MessageSocket) -> Self {
        socket.socket
    }
}

impl TryFrom<OwnedFd> for MessageSocket {
    type Error = ChannelError;

    fn try_from(socket: OwnedFd) -> Result<Self, ChannelError> {
        let unix = getsockname::<UnixAddr>(socket.as_raw_fd())
            .is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
        let stream = match getsockopt(&socket, sockopt::SockType) {
            Ok(SockType::SeqPacket) if unix => false,
            Ok(SockType::Stream) if unix => true,
            _ => return Err(ChannelError::NotUnix),
        };
        Ok(Self::new(socket, stream))
    }
}

impl MessageSocket {
    fn new(socket: OwnedFd, stream: bool) -> Self {
        Self { socket, stream, buffer: Mutex::default() }
    }

    /// Creates a connected pair of packet sockets.
    ///
    /// # Errors
    /// [`ChannelError::Io`].
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self::new(here, false), Self::new(there, false)))
    }

    /// Connects to the packet socket at `path`, without waiting for a peer that does not accept.
    ///
    /// # Errors
    /// [`ChannelError::Connect`].
    pub fn connect(path: &std::path::Path) -> Result<Self, ChannelError> {
        match connect(path, SockType::SeqPacket) {
            Ok(socket) => Ok(Self::new(socket, false)),
            Err(source) => Err(ChannelError::Connect { path: path.to_owned(), source }),
        }
    }

    /// Whether messages follow one another in a stream rather than each in a packet.
    pub fn is_stream(&self) -> bool {
        self.stream
    }

    /// Sends a message with descriptors, waiting for room for no longer than `patience`.
    ///
    /// # Errors
    /// [`ChannelError`]. After one on a stream, part of the message may have gone out.
    pub fn send<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), ChannelError> {
        self.send_as(message, fds, None, patience)
    }

    /// Sends as [`Self::send`] does, with this process' credentials: the kernel vouches for the sender, whichever
    /// process connected the socket.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_with_credentials<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), ChannelError> {
        self.send_as(message, fds, Some(UnixCredentials::new()), patience)
    }

    fn send_as<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        credentials: Option<UnixCredentials>,
        patience: Duration,
    ) -> Result<(), ChannelError> {
        if fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds);
        }
        let packet = message.encode()?;
        let deadline = Instant::now() + patience;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        while sent < packet.len() {
            let rights = Some(ControlMessage::ScmRights(&fds)).filter(|_| sent == 0 && !fds.is_empty());
            let signature = credentials.as_ref().filter(|_| sent == 0).map(ControlMessage::ScmCredentials);
            let control: Vec<_> = rights.into_iter().chain(signature).collect();
            let bytes = [IoSlice::new(&packet[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(self.socket.as_raw_fd(), &bytes, &control, flags, None) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Ends sending: the peer receives what was sent before, then the end. This end can still receive.
    pub fn shutdown_write(&self) {
        // Fails only if the peer has closed its end.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    /// Receives a message, waiting no longer than `patience`: not at all if that is zero.
    ///
    /// # Errors
    /// [`ChannelError`]. After one other than [`ChannelError::Timeout`] the connection is of no more use, and after
    /// any on a stream.
    pub fn receive<M: Message>(&self, patience: Duration) -> Result<Packet<M>, ChannelError> {
        let deadline = Instant::now() + patience;
        if self.stream {
            self.receive_stream(deadline)
        } else {
            self.receive_packet(deadline).map(|(packet, _)| packet)
        }
    }

    /// Has the kernel attach the sender's credentials to every packet sent from now on (`SO_PASSCRED`).
    ///
    /// # Errors
    /// [`ChannelError::Io`].
    pub fn enable_credentials(&self) -> Result<(), ChannelError> {
        Ok(setsockopt(&self.socket, sockopt::PassCred, &true)?)
    }

    /// Receives a packet and its sender, which is known if it sent its credentials ([`Self::send_with_credentials`]) or
    /// if this end [asked for them](Self::enable_credentials) before. `SO_PEERCRED` names only the process that
    /// connected the socket.
    ///
    /// # Errors
    /// As [`Self::receive`]; [`ChannelError::NotUnix`] for a stream.
    pub fn receive_with_credentials<M: Message>(
        &self,
        patience: Duration,
    ) -> Result<(Packet<M>, Option<Peer>), ChannelError> {
        if self.stream {
            return Err(ChannelError::NotUnix);
        }
        self.enable_credentials()?;
        let (packet, sender) = self.receive_packet(Instant::now() + patience)?;
        // Process id 0: sent without credentials, or from outside this process' namespace. The user id is void then.
        Ok((packet, sender.filter(|sender| sender.pid != 0)))
    }

    fn receive_packet<M: Message>(
        &self,
        deadline: Instant,
    ) -> Result<(Packet<M>, Option<Peer>), ChannelError> {
        // One byte more than is allowed reveals a packet that is too long.
        let longest = HEADER + M::PROTOCOL.max_body + 1;
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.len() < longest {
            *buffer = vec![0; longest];
        }
        let received = self.receive_some(&mut buffer[..longest], deadline)?;
        if received.bytes_lost {
            let length = received.length.saturating_sub(HEADER);
            return Err(CodecError::TooLong { length, max: M::PROTOCOL.max_body }.into());
        }
        let message = M::decode(&buffer[..received.length])?;
        Ok((Packet { message, fds: received.fds }, received.sender))
    }

    fn receive_stream<M: Message>(&self, deadline: Instant) -> Result<Packet<M>, ChannelError> {
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        self.fill(&mut header, &mut fds, deadline)?;
        let header = Header::parse(M::PROTOCOL, &header)?;
        let mut body = vec![0; header.length];
        self.fill(&mut body, &mut fds, deadline)?;
        Ok(Packet { message: M::from_body(header.kind, &body)?, fds })
    }

    fn fill(
        &self,
        mut buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        while !buffer.is_empty() {
            let received = self.receive_some(buffer, deadline)?;
            fds.extend(received.fds);
            if fds.len() > MAX_FDS {
                return Err(ChannelError::TooManyFds);
            }
            buffer = buffer.split_at_mut(received.length).1;
        }
        Ok(())
    }

    fn receive_some(&self, buffer: &mut [u8], deadline: Instant) -> Result<scm::Received, ChannelError> {
        loop {
            match scm::receive(self, buffer) {
                Ok(received) if received.fds_lost => return Err(ChannelError::FdsLost),
                Ok(received) if received.length == 0 => return Err(ChannelError::Closed),
                Ok(received) => return Ok(received),
                Err(error) => match error.kind() {
                    // Reported once if the peer closed its end with data unread. What it sent before is still there.
                    io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN, deadline)?,
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Waits until the socket is ready.
    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<(), ChannelError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::Timeout);
            }
            // Rounded up: a wait that ends early would spin.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests;
