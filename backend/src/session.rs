//! One front-end's connection: it begins when the connection is made and ends when either side leaves.
//!
//! The `vhost` crate's request handler reads and answers the messages. It is given one only when that is there whole
//! and when the front-end's socket has room for the answer (`session/wire.rs`). Nothing is kept between messages: what
//! is not handled yet stays in the front-end's socket, and another process can go on with it.
#![expect(unsafe_code, reason = "borrows the handler's socket")]

mod wire;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_channel::peer::Peer;
use baton_control::limited;
use nix::sys::socket::{MsgFlags, send};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::dispatch::{Dispatch, Rejection};
use crate::features::PROTOCOL_FEATURES;
use crate::handover::Departure;
use crate::handover::session::Negotiated;
use crate::shared::SharedBackend;
use wire::{HEADER, Header, NEED_REPLY, Wire};

/// Messages handled before other events get their turn.
const TURN: u32 = 64;
/// How long messages are handled before other events get their turn; a message that has begun is not interrupted.
const TURN_TIME: Duration = Duration::from_millis(5);

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
    /// The limit of open files, or more than any message has.
    #[error("not all descriptors of a message could be taken")]
    Descriptors,
    /// A target that came to nothing can still read from the connection.
    #[error("another process has read from the front-end's connection")]
    Robbed,
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

/// What the front-end has said of itself.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    owner: bool,
    protocol_features: bool,
    features: bool,
}

impl Said {
    fn note(&mut self, request: Option<FrontendReq>) {
        match request {
            Some(FrontendReq::SET_OWNER) => self.owner = true,
            Some(FrontendReq::SET_PROTOCOL_FEATURES) => self.protocol_features = true,
            Some(FrontendReq::SET_FEATURES) => self.features = true,
            _ => {}
        }
    }
}

/// A session.
pub struct Session {
    wire: Wire,
    handler: BackendReqHandler<Dispatch>,
    dispatch: Arc<Dispatch>,
    backend: SharedBackend,
    /// Whether a message was seen: a connection that is closed without one is no session.
    begun: bool,
    said: Said,
    since: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("socket", &self.as_fd().as_raw_fd())
            .field("begun", &self.begun)
            .finish()
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

impl Session {
    /// A session on a connected socket.
    ///
    /// # Errors
    /// What preparing the crate's handler fails with.
    pub fn new(socket: &impl AsFd, backend: &SharedBackend) -> io::Result<Self> {
        Self::negotiated(socket, backend, Negotiated::default())
    }

    /// A session on a connected socket, of which another process has had the beginning. Nothing of the back-end is used
    /// before the first message.
    ///
    /// # Errors
    /// What preparing the crate's handler fails with.
    pub fn negotiated(
        socket: &impl AsFd,
        backend: &SharedBackend,
        negotiated: Negotiated,
    ) -> io::Result<Self> {
        let (theirs, ours) = UnixStream::pair()?;
        let dispatch = Arc::new(Dispatch::new(backend.clone(), Peer::trusted(socket).is_ok()));
        let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&dispatch));
        prime(&mut handler, &ours, negotiated)?;
        dispatch.serve();
        let wire = Wire::new(socket.as_fd().try_clone_to_owned()?, ours);
        wire.discard_answers()?;
        // Another process has judged how far the front-end has come.
        let said = Said { features: negotiated.begun, ..Said::default() };
        let (begun, since) = (negotiated.begun, Instant::now());
        Ok(Self { wire, handler, dispatch, backend: backend.clone(), begun, said, since })
    }

    /// Ends the connection, whoever else holds its socket.
    pub fn close(self) {
        self.wire.close();
    }

    /// Whether the front-end has said anything.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Whether the front-end has negotiated: then it may be silent for as long as its guest is. QEMU is between
    /// `SET_OWNER` with the protocol features, which it sends at its start, and `SET_FEATURES` of the guest's driver.
    pub fn is_negotiated(&self) -> bool {
        self.said.features || self.said.owner && self.said.protocol_features
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
            self.backend.lock().device.hold();
            self.handle(&header)?;
            if turn.elapsed() >= TURN_TIME {
                break;
            }
        }
        Ok(Progress::More)
    }

    /// The header of the next message, if that is there whole and an answer could be sent.
    fn next_message(&self) -> Result<Option<Header>, SessionEnd> {
        let Some(header) = self.wire.next()? else { return Ok(None) };
        // Its answer says how the transfer ended, and the session waits for nothing else meanwhile.
        if header.request == FrontendReq::CHECK_DEVICE_STATE as u32
            && self.backend.lock().handovers.is_transferring()
        {
            return if self.wire.is_closed()? { Err(SessionEnd::Left) } else { Ok(None) };
        }
        Ok(self.wire.has_room()?.then_some(header))
    }

    fn handle(&mut self, header: &Header) -> Result<(), SessionEnd> {
        let request = header.request;
        // SAFETY: the handler owns its socket and lives as long as the borrow.
        let theirs = unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) };
        self.wire.deliver(header, theirs)?;
        let result = self.handler.handle_request();
        let rejection = self.dispatch.take_rejection();
        let answered = self.wire.forward();
        let name = FrontendReq::try_from(request).ok();
        match (result, rejection) {
            (_, Some(Rejection::Device(source))) => {
                return Err(SessionEnd::Device(Rejection::Device(source)));
            }
            (_, Some(source)) if header.has_answer() => {
                return Err(SessionEnd::Unanswerable { request, source });
            }
            (_, Some(rejection)) => limited!(warn, ?name, %rejection, "request rejected"),
            (Ok(()), None) => {
                tracing::trace!(?name, "request served");
                self.said.note(name);
            }
            (Err(source), None) => {
                // The crate acknowledges what its methods refuse, and some of what it refuses itself.
                if matches!(answered, Ok(false)) {
                    self.refuse(header);
                }
                return Err(SessionEnd::Protocol { request, source });
            }
        }
        answered.map(drop)
    }

    /// Sends the negative acknowledgement that the crate leaves out for what it does not understand.
    fn refuse(&self, header: &Header) {
        let negotiated = self.backend.lock().device.session().protocol_features
            & vhost::vhost_user::VhostUserProtocolFeatures::REPLY_ACK.bits()
            != 0;
        if negotiated && header.flags & NEED_REPLY != 0 && !header.has_answer() {
            // The connection ends in any case.
            let _ = self.wire.refuse(header.request);
        }
    }
}

/// Brings a fresh handler to the state of a session; and to one in which `SET_VRING_ENABLE` is served before
/// `SET_FEATURES`, as QEMU sends it.
fn prime(
    handler: &mut BackendReqHandler<Dispatch>,
    socket: &UnixStream,
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
        send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?;
        handler.handle_request().map_err(io::Error::other)?;
    }
    Ok(())
}
