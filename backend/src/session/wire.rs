//! The front-end's socket: moves complete messages from it to the `vhost` crate's request handler, and answers back.
//!
//! The handler blocks in the middle of a message, so it has a separate socket that only receives complete messages. No
//! call on the front-end's socket blocks. Other processes, such as the target of a failed hand-over, may hold that
//! socket: by reading from it they can end the session, but do no other harm.
#![expect(unsafe_code, reason = "uses FIONREAD, SO_PEEK_OFF and poll(2), and replaces the handler's socket")]

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use baton_channel::scm;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg, shutdown};
use vhost::vhost_user::message::FrontendReq;

use super::SessionEnd;

/// `struct vhost_user_msg`: request, flags and size, 4 bytes each.
pub(super) const HEADER: usize = 12;
/// The longest body that the crate reads, in bytes.
const MAX_BODY: u32 = 4096;
/// The most descriptors that the crate accepts with a message.
const MAX_FDS: usize = 32;
/// The longest answer, in bytes.
const ANSWER: usize = HEADER + 4096;
/// Flag: the sender wants an acknowledgement.
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// Version 1, and "this is a reply".
const REPLY_FLAGS: u32 = 1 | 1 << 2;

nix::ioctl_read_bad!(
    /// Returns the number of bytes that can be read.
    fionread,
    libc::FIONREAD,
    libc::c_int
);

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub request: u32,
    pub flags: u32,
    pub size: u32,
}

impl From<[u8; HEADER]> for Header {
    fn from(bytes: [u8; HEADER]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), size: word(8) }
    }
}

impl Header {
    /// Returns whether the message has an answer, for which the front-end would mistake an acknowledgement.
    pub fn has_answer(&self) -> bool {
        use FrontendReq as R;
        matches!(
            FrontendReq::try_from(self.request),
            Ok(R::GET_FEATURES
                | R::GET_VRING_BASE
                | R::GET_PROTOCOL_FEATURES
                | R::GET_QUEUE_NUM
                | R::GET_CONFIG
                | R::GET_INFLIGHT_FD
                | R::GET_MAX_MEM_SLOTS
                | R::GET_STATUS
                | R::GET_SHARED_OBJECT
                | R::GET_SHMEM_CONFIG
                | R::SET_LOG_BASE
                | R::POSTCOPY_ADVISE)
        )
    }

    /// Returns the body's length, which [`Wire::next`] has checked.
    fn body(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }
}

/// The content of the front-end's socket.
enum Look {
    /// No bytes.
    Empty,
    /// An incomplete message of this many bytes.
    Part(usize),
    /// A complete message.
    Whole(Header),
}

/// The front-end's socket and the handler's.
#[derive(Debug)]
pub(super) struct Wire {
    front: OwnedFd,
    /// The other end of the handler's socket.
    handler: UnixStream,
    /// Whether the handler's socket is shut down for writing.
    ended: bool,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.front.as_fd()
    }
}

impl Wire {
    pub fn new(front: OwnedFd, handler: UnixStream) -> Self {
        Self { front, handler, ended: false }
    }

    /// Returns the header of the next message if the message is complete.
    pub fn next(&self) -> Result<Option<Header>, SessionEnd> {
        self.peek_at_the_next();
        loop {
            match self.look()? {
                Look::Whole(header) => return Ok(Some(header)),
                Look::Empty => return Ok(None),
                Look::Part(available) => {
                    if !self.is_over()? {
                        return Ok(None);
                    }
                    // The front-end may have sent the rest and left since the look.
                    if self.available()? == available {
                        return Err(SessionEnd::Truncated);
                    }
                }
            }
        }
    }

    /// Looks for a complete message in the socket.
    fn look(&self) -> Result<Look, SessionEnd> {
        // Before the peek: bytes that arrive in between must not be mistaken for bytes that cannot be read.
        let available = self.available()?;
        let mut bytes = [0; HEADER];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let length = match recv(self.front.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Err(SessionEnd::Left),
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(Look::Empty),
            Err(Errno::ECONNRESET) => return Err(SessionEnd::Left),
            Err(error) => return Err(SessionEnd::Socket(error.into())),
        };
        if length < HEADER {
            // A read stops where other descriptors begin, so the header cannot be read in one piece.
            return if available < HEADER { Ok(Look::Part(available)) } else { Err(SessionEnd::Scattered) };
        }
        let header = Header::from(bytes);
        if header.size > MAX_BODY {
            return Err(SessionEnd::Oversized { request: header.request, size: header.size });
        }
        if available < HEADER + header.body() {
            return Ok(Look::Part(available));
        }
        Ok(Look::Whole(header))
    }

    /// Makes `MSG_PEEK` return what a read would. Another process that holds the socket may have set `SO_PEEK_OFF`,
    /// which would hide a message until more bytes arrive.
    fn peek_at_the_next(&self) {
        let off: libc::c_int = -1;
        let size = libc::socklen_t::try_from(size_of_val(&off)).unwrap_or_default();
        let (fd, off) = (self.front.as_raw_fd(), (&raw const off).cast());
        // Does not fail on a Unix socket.
        // SAFETY: SO_PEEK_OFF reads an int.
        let _ = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, off, size) };
    }

    /// Returns whether the socket has room for an answer.
    pub fn has_room(&self) -> Result<bool, SessionEnd> {
        Ok(self.poll(libc::POLLOUT)? & libc::POLLOUT != 0)
    }

    /// Returns whether the front-end can no longer read an answer. After a `SHUT_WR` (`POLLRDHUP`) it still can.
    pub fn is_closed(&self) -> Result<bool, SessionEnd> {
        Ok(self.poll(0)? & (libc::POLLHUP | libc::POLLERR) != 0)
    }

    /// Returns the number of bytes in the socket.
    fn available(&self) -> Result<usize, SessionEnd> {
        let mut available = 0;
        // SAFETY: FIONREAD writes an int.
        unsafe { fionread(self.front.as_raw_fd(), &raw mut available) }
            .map_err(|error| SessionEnd::Socket(error.into()))?;
        Ok(usize::try_from(available).unwrap_or_default())
    }

    /// Returns whether the front-end can send nothing more.
    fn is_over(&self) -> Result<bool, SessionEnd> {
        let over = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        Ok(self.poll(libc::POLLRDHUP)? & over != 0)
    }

    /// Ends the connection and discards unread messages. The kernel closes descriptors that are left in a socket, and
    /// that close may block: the last close of a TCP socket does. [`scm::receive`] prevents it.
    pub fn close(&self) {
        // The front-end can send nothing after this, so the loop ends.
        let _ = shutdown(self.front.as_raw_fd(), nix::sys::socket::Shutdown::Read);
        let mut bytes = [0; ANSWER];
        while scm::receive(&self.front, &mut bytes).is_ok_and(|received| received.length > 0) {}
    }

    /// Returns the current events: those of `events`, and those that poll(2) always reports.
    fn poll(&self, events: libc::c_short) -> Result<libc::c_short, SessionEnd> {
        let mut fd = libc::pollfd { fd: self.front.as_raw_fd(), events, revents: 0 };
        // nix does not know POLLRDHUP, and returns no events at all if it does not know one of them.
        // SAFETY: `fd` is one valid `pollfd`, which lives through the call.
        let result = unsafe { libc::poll(&raw mut fd, 1, 0) };
        Errno::result(result).map_err(|error| SessionEnd::Socket(error.into()))?;
        Ok(fd.revents)
    }

    /// Moves the message that [`Self::next`] returned to the handler, whose socket is `theirs`.
    pub fn deliver(&mut self, header: &Header, theirs: BorrowedFd<'_>) -> Result<(), SessionEnd> {
        let (message, fds) = self.take(header)?;
        // If the crate cannot take all descriptors, it keeps reading. End of file stops it.
        let last = !fds.is_empty();
        if last || self.ended {
            self.renew(theirs).map_err(SessionEnd::Socket)?;
        }
        send(&self.handler, &message, &fds).map_err(|error| SessionEnd::Socket(error.into()))?;
        if last {
            self.handler.shutdown(Shutdown::Write).map_err(SessionEnd::Socket)?;
            self.ended = true;
        }
        Ok(())
    }

    /// Reads the message, with the descriptors that arrived with its first byte.
    fn take(&self, header: &Header) -> Result<(Vec<u8>, Vec<OwnedFd>), SessionEnd> {
        let mut message = vec![0; HEADER + header.body()];
        let mut fds = Vec::new();
        let mut filled = 0;
        while filled < message.len() {
            let end = if filled < HEADER { HEADER } else { message.len() };
            let received = match scm::receive(&self.front, &mut message[filled..end]) {
                Ok(received) if received.length > 0 => received,
                Ok(_) => return Err(SessionEnd::Robbed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(SessionEnd::Robbed),
                Err(error) => return Err(SessionEnd::Socket(error)),
            };
            if received.fds_lost {
                return Err(SessionEnd::Descriptors);
            }
            if filled == 0 {
                fds = received.fds;
            }
            filled += received.length;
        }
        let found: [u8; HEADER] = std::array::from_fn(|at| message[at]);
        if Header::from(found) != *header {
            return Err(SessionEnd::Robbed);
        }
        if fds.len() > MAX_FDS { Err(SessionEnd::Descriptors) } else { Ok((message, fds)) }
    }

    /// Replaces the handler's socket `theirs` by a new one.
    fn renew(&mut self, theirs: BorrowedFd<'_>) -> io::Result<()> {
        let (new, ours) = UnixStream::pair()?;
        // SAFETY: both are open sockets; the handler keeps using the number that it owns.
        if unsafe { libc::dup3(new.as_raw_fd(), theirs.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.handler = ours;
        self.ended = false;
        Ok(())
    }

    /// Forwards the handler's answer to the front-end. Returns whether there is one.
    pub fn forward(&self) -> Result<bool, SessionEnd> {
        let mut answered = false;
        let mut answer = [0; ANSWER];
        loop {
            match scm::receive(&self.handler, &mut answer) {
                Ok(received) if received.fds_lost => {
                    return Err(SessionEnd::Descriptors);
                }
                Ok(received) if received.length > 0 => {
                    answered = true;
                    self.send(&answer[..received.length], &received.fds)?;
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(SessionEnd::Socket(error));
                }
                _ => return Ok(answered),
            }
        }
    }

    /// Sends a negative acknowledgement of `request`.
    pub fn refuse(&self, request: u32) -> Result<(), SessionEnd> {
        let mut reply = [0; HEADER + 8];
        reply[0..4].copy_from_slice(&request.to_ne_bytes());
        reply[4..8].copy_from_slice(&REPLY_FLAGS.to_ne_bytes());
        reply[8..12].copy_from_slice(&8u32.to_ne_bytes());
        reply[12..20].copy_from_slice(&1u64.to_ne_bytes());
        self.send(&reply, &[])
    }

    /// Sends to the front-end. There was room before; only another holder of the socket can have filled it since.
    fn send(&self, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), SessionEnd> {
        match send(&self.front, bytes, fds) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(SessionEnd::Left),
            other => other.map_err(|error| SessionEnd::Socket(error.into())),
        }
    }

    /// Drops the handler's answers so far.
    pub fn discard_answers(&self) -> io::Result<()> {
        let mut answer = [0; ANSWER];
        loop {
            match scm::receive(&self.handler, &mut answer) {
                Ok(received) if received.length > 0 => {}
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => return Ok(()),
            }
        }
    }
}

/// Sends all bytes in one call, or fails.
fn send(socket: &impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), Errno> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::EAGAIN) }
}
