//! Sends and receives messages with their descriptors on a connected Unix socket: one message per packet on
//! `SOCK_SEQPACKET`, or consecutive messages on `SOCK_STREAM`, which VMMs use with each other.
//!
//! No call waits longer than its caller allows. None changes the flags of the open file description, which other
//! processes may share. A message is either received whole, or its descriptors are closed.

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
    /// The descriptor is not a socket of a supported type.
    #[error("not a Unix socket of type SOCK_SEQPACKET or SOCK_STREAM")]
    NotUnix,
    /// No process listens at the path, or this process may not connect.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket's path.
        path: std::path::PathBuf,
        /// The error of `connect(2)`.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection or died.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent nothing, or read nothing, in time.
    #[error("the peer did not answer in time")]
    Timeout,
    /// The packet is not a message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The kernel dropped descriptors that exceeded this process' limit of open files.
    #[error("cannot receive all descriptors of a message; raise the limit of open files")]
    FdsLost,
    /// The message has more than [`MAX_FDS`] descriptors.
    #[error("a message has more than {MAX_FDS} descriptors")]
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

/// A received message and its descriptors.
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
    /// Receives packets. Kept between calls, because the first write to each of its pages faults.
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
    /// Returns [`ChannelError::Io`] if the sockets cannot be created.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self::new(here, false), Self::new(there, false)))
    }

    /// Connects to the packet socket at `path`, without waiting if the listener's backlog is full.
    ///
    /// # Errors
    /// Returns [`ChannelError::Connect`] if `connect(2)` fails.
    pub fn connect(path: &std::path::Path) -> Result<Self, ChannelError> {
        match connect(path, SockType::SeqPacket) {
            Ok(socket) => Ok(Self::new(socket, false)),
            Err(source) => Err(ChannelError::Connect { path: path.to_owned(), source }),
        }
    }

    /// Returns whether this is a stream socket rather than a packet socket.
    pub fn is_stream(&self) -> bool {
        self.stream
    }

    /// Sends a message with descriptors. Waits at most `patience` for room in the socket's buffer.
    ///
    /// # Errors
    /// Returns an error if the message cannot be sent in time. On a stream, part of it may have been sent.
    pub fn send<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), ChannelError> {
        self.send_as(message, fds, None, patience)
    }

    /// Like [`Self::send`], with this process' credentials: the kernel attests the sender, whichever process connected
    /// the socket.
    ///
    /// # Errors
    /// Same as [`Self::send`].
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

    /// Shuts down sending: the peer receives all messages sent so far, then the end of the stream. This end can still
    /// receive.
    pub fn shutdown_write(&self) {
        // Fails only if the peer has closed its end.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    /// Receives a message, waiting for at most `patience`. Does not wait if that is zero.
    ///
    /// # Errors
    /// Returns an error if no valid message arrives in time. The connection is then unusable, except after
    /// [`ChannelError::Timeout`] on a packet socket.
    pub fn receive<M: Message>(&self, patience: Duration) -> Result<Packet<M>, ChannelError> {
        let deadline = Instant::now() + patience;
        if self.stream {
            self.receive_stream(deadline)
        } else {
            self.receive_packet(deadline).map(|(packet, _)| packet)
        }
    }

    /// Makes the kernel attach the sender's credentials to every packet that the peer sends from now on
    /// (`SO_PASSCRED`).
    ///
    /// # Errors
    /// Returns [`ChannelError::Io`] if `setsockopt(2)` fails.
    pub fn enable_credentials(&self) -> Result<(), ChannelError> {
        Ok(setsockopt(&self.socket, sockopt::PassCred, &true)?)
    }

    /// Receives a packet and its sender. The sender is known if it sent its credentials
    /// ([`Self::send_with_credentials`]), or if this end had [enabled them](Self::enable_credentials) when the packet
    /// was sent. `SO_PEERCRED` names only the process that connected the socket.
    ///
    /// # Errors
    /// Same as [`Self::receive`]. Returns [`ChannelError::NotUnix`] on a stream socket.
    pub fn receive_with_credentials<M: Message>(
        &self,
        patience: Duration,
    ) -> Result<(Packet<M>, Option<Peer>), ChannelError> {
        if self.stream {
            return Err(ChannelError::NotUnix);
        }
        self.enable_credentials()?;
        let (packet, sender) = self.receive_packet(Instant::now() + patience)?;
        // Process id 0: sent without credentials, or from outside this process' namespace. The user id is then invalid.
        Ok((packet, sender.filter(|sender| sender.pid != 0)))
    }

    fn receive_packet<M: Message>(
        &self,
        deadline: Instant,
    ) -> Result<(Packet<M>, Option<Peer>), ChannelError> {
        // One byte more than the limit, to detect a packet that is too long.
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
                    // ECONNRESET is reported once if the peer closed its end without reading everything. The messages
                    // that it sent before can still be received.
                    io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN, deadline)?,
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Waits until the socket is ready for `events`.
    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<(), ChannelError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::Timeout);
            }
            // Rounded up, because a wait that ends early would spin.
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
