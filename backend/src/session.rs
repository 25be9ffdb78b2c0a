//! One front-end's connection: it begins when the connection is made and ends when either side leaves.
//!
//! The `vhost` crate's request handler reads and answers the messages. It would block in the middle of one, and on
//! an answer that nobody reads, so it is asked for a message only when that is there whole and when the socket has
//! room for the answer. It keeps no bytes of its own: what is not handled yet stays in the socket.
#![expect(unsafe_code, reason = "swaps the handler's socket, reads message headers ahead")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_control::limited;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::dispatch::{Dispatch, Rejection};
use crate::features::PROTOCOL_FEATURES;
use crate::handover::Departure;

/// `struct vhost_user_msg`: request, flags and size, 4 bytes each.
const HEADER: usize = 12;
/// The longest body that the crate reads.
const MAX_BODY: u32 = 4096;
/// Flag: the sender wants an acknowledgement.
const NEED_REPLY: u32 = 1 << 3;
/// Version 1, and "this is a reply".
const REPLY_FLAGS: u32 = 1 | 1 << 2;
/// Messages handled before other events get their turn.
const TURN: u32 = 64;
/// How long messages are handled before other events get their turn; a message that has begun is not interrupted.
const TURN_TIME: Duration = Duration::from_millis(5);

nix::ioctl_read_bad!(
    /// Bytes that can be read.
    fionread,
    libc::FIONREAD,
    libc::c_int
);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front-end closed the connection between two messages.
    #[error("the front-end left")]
    Left,
    /// The front-end closed the connection within a message.
    #[error("the front-end left in the middle of a message")]
    Truncated,
    /// Descriptors came with the bytes in the middle of a header.
    #[error("descriptors came in the middle of a message's header")]
    Scattered,
    /// A message that this protocol does not have.
    #[error("message {request} of {size} bytes is too long")]
    Oversized {
        /// The message's type.
        request: u32,
        /// Length of its body.
        size: u32,
    },
    /// The crate could not make sense of a message.
    #[error("cannot serve message {request}")]
    Protocol {
        /// The message's type.
        request: u32,
        /// What the crate says.
        #[source]
        source: VhostError,
    },
    /// A request for an answer that cannot be given.
    #[error("cannot answer message {request}")]
    Unanswerable {
        /// The message's type.
        request: u32,
        /// Why not.
        #[source]
        source: Rejection,
    },
    /// The device could not follow.
    #[error("the device failed")]
    Device(#[source] Rejection),
    /// The front-end truncated a file that it shares as memory.
    #[error("the front-end truncated the memory that it shares")]
    MemoryTruncated,
    /// The socket failed.
    #[error("the front-end's socket failed")]
    Socket(#[source] io::Error),
}

impl SessionEnd {
    /// Whether the front-end has gone by itself.
    pub fn departure(&self) -> Departure {
        match self {
            Self::Left | Self::Truncated | Self::Socket(_) => Departure::Left,
            _ => Departure::CutOff,
        }
    }
}

/// What the session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// An event on the socket.
    Waiting,
    /// Nothing: there is more to do.
    More,
}

/// What a front-end has said that the crate's handler must know of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Whether it has said anything.
    pub begun: bool,
    /// Virtio features (`SET_FEATURES`).
    pub features: u64,
    /// Protocol features (`SET_PROTOCOL_FEATURES`).
    pub protocol_features: u64,
}

/// A session.
pub struct Session {
    handler: BackendReqHandler<Mutex<Dispatch>>,
    dispatch: Arc<Mutex<Dispatch>>,
    /// Whether a message was seen: a connection that is closed without one is no session.
    begun: bool,
    since: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("socket", &self.handler.as_raw_fd())
            .field("begun", &self.begun)
            .finish()
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the handler owns its socket and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) }
    }
}

impl Session {
    /// A session on a connected socket.
    ///
    /// # Errors
    /// What preparing the crate's handler fails with.
    pub fn new(socket: &impl AsFd, dispatch: Arc<Mutex<Dispatch>>) -> io::Result<Self> {
        Self::negotiated(socket, dispatch, Negotiated::default())
    }

    /// A session on a connected socket, of which another process has had the beginning.
    ///
    /// # Errors
    /// What preparing the crate's handler fails with.
    pub fn negotiated(
        socket: &impl AsFd,
        dispatch: Arc<Mutex<Dispatch>>,
        negotiated: Negotiated,
    ) -> io::Result<Self> {
        let (ours, primer) = UnixStream::pair()?;
        let mut handler = BackendReqHandler::from_stream(ours, Arc::clone(&dispatch));
        lock(&dispatch).restoring = true;
        let primed = prime(&mut handler, &primer, negotiated);
        lock(&dispatch).restoring = false;
        primed?;
        // The handler's own socket becomes the real one.
        // SAFETY: both are open sockets; the handler keeps using the number that it owns.
        if unsafe { libc::dup3(socket.as_fd().as_raw_fd(), handler.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { handler, dispatch, begun: negotiated.begun, since: Instant::now() })
    }

    /// Whether the front-end has said anything.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// How long this process has had the connection.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Handles the messages that are there whole.
    ///
    /// # Errors
    /// [`SessionEnd`]: nothing more will come of this connection.
    pub fn progress(&mut self) -> Result<Progress, SessionEnd> {
        let turn = Instant::now();
        for _ in 0..TURN {
            let Some(header) = self.next_message()? else { return Ok(Progress::Waiting) };
            self.begun = true;
            // A pair is stopped at most once for all of them; the event loop lets it go.
            lock(&self.dispatch).device.hold();
            self.handle(&header)?;
            if turn.elapsed() >= TURN_TIME {
                break;
            }
        }
        Ok(Progress::More)
    }

    /// The header of the next message, if that is there whole and an answer could be sent.
    fn next_message(&self) -> Result<Option<Header>, SessionEnd> {
        // Before the look at them, so that bytes which come in between are not taken for bytes that cannot be read.
        let available = self.available()?;
        let mut bytes = [0; HEADER];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let length = match recv(self.handler.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Err(SessionEnd::Left),
            Ok(length) => length,
            Err(nix::Error::EAGAIN) => return Ok(None),
            Err(nix::Error::ECONNRESET) => return Err(SessionEnd::Left),
            Err(error) => return Err(SessionEnd::Socket(error.into())),
        };
        if length < HEADER {
            // A read ends where other descriptors begin, and so would the next one.
            return if available < HEADER { self.incomplete() } else { Err(SessionEnd::Scattered) };
        }
        let header = Header::from(bytes);
        if header.size > MAX_BODY {
            return Err(SessionEnd::Oversized { request: header.request, size: header.size });
        }
        // Its answer says how the transfer ended, and the session waits for nothing else meanwhile.
        if header.request == FrontendReq::CHECK_DEVICE_STATE as u32
            && lock(&self.dispatch).handover.is_transferring()
        {
            return Ok(None);
        }
        // The size was checked just now.
        let whole = HEADER + header.size as usize;
        if available < whole {
            return self.incomplete();
        }
        Ok((self.poll(libc::POLLOUT)? & libc::POLLOUT != 0).then_some(header))
    }

    /// How many bytes wait in the socket.
    fn available(&self) -> Result<usize, SessionEnd> {
        let mut available = 0;
        // SAFETY: FIONREAD writes an int.
        unsafe { fionread(self.handler.as_raw_fd(), &raw mut available) }
            .map_err(|error| SessionEnd::Socket(error.into()))?;
        Ok(usize::try_from(available).unwrap_or_default())
    }

    /// Part of a message is there; the rest comes later, or never.
    fn incomplete(&self) -> Result<Option<Header>, SessionEnd> {
        let gone = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        if self.poll(libc::POLLRDHUP)? & gone != 0 { Err(SessionEnd::Truncated) } else { Ok(None) }
    }

    /// The events that hold now, of `events` and of those that are always told.
    fn poll(&self, events: libc::c_short) -> Result<libc::c_short, SessionEnd> {
        let mut fd = libc::pollfd { fd: self.handler.as_raw_fd(), events, revents: 0 };
        // Not by nix, which gives nothing at all where it does not know a bit, and POLLRDHUP is one.
        // SAFETY: one descriptor's place, which lives through the call.
        let result = unsafe { libc::poll(&raw mut fd, 1, 0) };
        Errno::result(result).map_err(|error| SessionEnd::Socket(error.into()))?;
        Ok(fd.revents)
    }

    fn handle(&mut self, header: &Header) -> Result<(), SessionEnd> {
        let request = header.request;
        let result = self.handler.handle_request();
        let rejection = lock(&self.dispatch).take_rejection();
        let name = FrontendReq::try_from(request).ok();
        match (result, rejection) {
            (Ok(()), None) => {
                tracing::trace!(?name, "request served");
                Ok(())
            }
            (_, Some(Rejection::Device(source))) => Err(SessionEnd::Device(Rejection::Device(source))),
            (_, Some(source)) if header.has_answer() => Err(SessionEnd::Unanswerable { request, source }),
            (_, Some(rejection)) => {
                limited!(warn, ?name, %rejection, "request rejected");
                Ok(())
            }
            (Err(VhostError::Disconnected), None) => Err(SessionEnd::Left),
            (Err(source), None) => {
                self.refuse(header, &source);
                Err(SessionEnd::Protocol { request, source })
            }
        }
    }

    /// Sends the negative acknowledgement that the crate leaves out for what it does not understand.
    fn refuse(&self, header: &Header, source: &VhostError) {
        use FrontendReq as R;
        // The crate acknowledges what these requests' own methods refuse, but not what it refuses before them.
        let sent = match FrontendReq::try_from(header.request) {
            Ok(R::SET_MEM_TABLE | R::GPU_SET_SOCKET) => header.is_sound(),
            Ok(R::SET_CONFIG | R::SET_BACKEND_REQ_FD) => {
                header.is_sound() && !matches!(source, VhostError::InactiveOperation(_))
            }
            _ => false,
        };
        let negotiated = lock(&self.dispatch).device.session().protocol_features
            & vhost::vhost_user::VhostUserProtocolFeatures::REPLY_ACK.bits()
            != 0;
        if sent || !negotiated || header.flags & NEED_REPLY == 0 || header.has_answer() {
            return;
        }
        let mut reply = [0; HEADER + 8];
        reply[0..4].copy_from_slice(&header.request.to_ne_bytes());
        reply[4..8].copy_from_slice(&REPLY_FLAGS.to_ne_bytes());
        reply[8..12].copy_from_slice(&8u32.to_ne_bytes());
        reply[12..20].copy_from_slice(&1u64.to_ne_bytes());
        // The connection ends in any case.
        let _ = send(self.handler.as_raw_fd(), &reply, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    }
}

/// Brings a fresh handler to the state of a session; and to one in which `SET_VRING_ENABLE` is served before
/// `SET_FEATURES`, as QEMU sends it.
fn prime(
    handler: &mut BackendReqHandler<Mutex<Dispatch>>,
    primer: &UnixStream,
    negotiated: Negotiated,
) -> io::Result<()> {
    let protocol_features = negotiated.protocol_features.to_ne_bytes();
    let features = if negotiated.features == 0 { 1 << PROTOCOL_FEATURES } else { negotiated.features };
    let features = features.to_ne_bytes();
    let messages: [(FrontendReq, &[u8]); 4] = [
        (FrontendReq::GET_FEATURES, &[]),
        (FrontendReq::GET_PROTOCOL_FEATURES, &[]),
        (FrontendReq::SET_PROTOCOL_FEATURES, &protocol_features),
        (FrontendReq::SET_FEATURES, &features),
    ];
    for (request, body) in messages {
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend((request as u32).to_ne_bytes());
        message.extend(1u32.to_ne_bytes());
        message.extend(u32::try_from(body.len()).unwrap_or_default().to_ne_bytes());
        message.extend(body);
        send(primer.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?;
        handler.handle_request().map_err(io::Error::other)?;
    }
    Ok(())
}

/// A message's header.
#[derive(Clone, Copy, Debug)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

impl From<[u8; HEADER]> for Header {
    fn from(bytes: [u8; HEADER]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), size: word(8) }
    }
}

impl Header {
    /// Whether its flags are a request's of version 1: the crate looks at nothing else otherwise.
    fn is_sound(&self) -> bool {
        self.flags & !NEED_REPLY == 1
    }

    /// Whether the message has an answer of its own, so that an acknowledgement would be taken for it.
    fn has_answer(&self) -> bool {
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
}

fn lock(dispatch: &Mutex<Dispatch>) -> MutexGuard<'_, Dispatch> {
    dispatch.lock().unwrap_or_else(PoisonError::into_inner)
}
