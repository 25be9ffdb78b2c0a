//! The session on one front-end connection, which ends when either side closes the connection.
//!
//! The `vhost` crate's request handler reads and answers the messages. `session/wire.rs` passes it one message at a
//! time, once the message is complete and the front-end's socket has room for the answer. Nothing is kept between
//! messages: those that are not handled yet stay in the front-end's socket, where another process can read them.
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

/// How many messages are handled before the event loop handles other events.
const TURN: u32 = 64;
/// How long messages are handled before the event loop handles other events. A message is not interrupted.
const TURN_TIME: Duration = Duration::from_millis(5);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front-end closed the connection between two messages.
    #[error("the front-end closed the connection")]
    Left,
    /// The front-end closed the connection within a message.
    #[error("the front-end closed the connection in the middle of a message")]
    Truncated,
    /// Descriptors arrived in the middle of a header.
    #[error("descriptors arrived in the middle of a message header")]
    Scattered,
    /// The process reached its limit of open files, or the message has too many descriptors.
    #[error("cannot receive all descriptors of a message")]
    Descriptors,
    /// Another process that holds the socket, such as the target of a failed hand-over, read from it.
    #[error("another process read from the front-end's connection")]
    Robbed,
    /// The message is longer than any message of the protocol.
    #[error("message {request} of {size} bytes is too long")]
    Oversized {
        /// The message's type.
        request: u32,
        /// The length of its body, in bytes.
        size: u32,
    },
    /// The `vhost` crate cannot handle the message.
    #[error("cannot serve message {request}")]
    Protocol {
        /// The message's type.
        request: u32,
        /// The crate's error.
        #[source]
        source: VhostError,
    },
    /// The request was rejected, and its answer cannot express that.
    #[error("cannot answer message {request}")]
    Unanswerable {
        /// The message's type.
        request: u32,
        /// Why the request was rejected.
        #[source]
        source: Rejection,
    },
    /// The device failed.
    #[error("the device failed")]
    Device(#[source] Rejection),
    /// The front-end truncated a file of guest memory.
    #[error("the front-end truncated the memory that it shares")]
    MemoryTruncated,
    /// The socket failed.
    #[error("the front-end's socket failed")]
    Socket(#[source] io::Error),
}

impl SessionEnd {
    /// Returns whether the front-end left or was cut off.
    pub fn departure(&self) -> Departure {
        match self {
            Self::Left | Self::Truncated | Self::Socket(_) => Departure::Left,
            _ => Departure::CutOff,
        }
    }
}

/// What the session waits for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// An event on the socket.
    Waiting,
    /// Nothing: more messages may be available.
    More,
}

/// The negotiation messages that the front-end has sent.
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
    /// Whether a message has arrived. A connection without a message is not a session yet.
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
    /// Creates a session on a connected socket.
    ///
    /// # Errors
    /// Returns an error if the `vhost` crate's handler cannot be prepared.
    pub fn new(socket: &impl AsFd, backend: &SharedBackend) -> io::Result<Self> {
        Self::negotiated(socket, backend, Negotiated::default())
    }

    /// Creates a session on a connected socket that another process has served until now. Does not use the back-end
    /// before the first message.
    ///
    /// # Errors
    /// Returns an error if the `vhost` crate's handler cannot be prepared.
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
        // A session from another process counts as negotiated: its earlier messages are not known here.
        let said = Said { features: negotiated.begun, ..Said::default() };
        let (begun, since) = (negotiated.begun, Instant::now());
        Ok(Self { wire, handler, dispatch, backend: backend.clone(), begun, said, since })
    }

    /// Ends the connection, whether or not another process holds its socket.
    pub fn close(self) {
        self.wire.close();
    }

    /// Returns whether the front-end has sent a message.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Returns whether the front-end has negotiated, after which it may stay silent. QEMU sends `SET_OWNER` and the
    /// protocol features when it starts, and `SET_FEATURES` only when the guest's driver starts.
    pub fn is_negotiated(&self) -> bool {
        self.said.features || self.said.owner && self.said.protocol_features
    }

    /// Returns how long this process has had the connection.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Handles the complete messages that have arrived.
    ///
    /// # Errors
    /// Returns why the session ended; the connection must be closed.
    pub fn progress(&mut self) -> Result<Progress, SessionEnd> {
        let turn = Instant::now();
        for _ in 0..TURN {
            let Some(header) = self.next_message()? else { return Ok(Progress::Waiting) };
            self.begun = true;
            // Stop each pair at most once for all messages; the event loop releases them afterwards.
            self.backend.lock().device.hold();
            self.handle(&header)?;
            if turn.elapsed() >= TURN_TIME {
                break;
            }
        }
        Ok(Progress::More)
    }

    /// Returns the header of the next message if it is complete and its answer can be sent.
    fn next_message(&self) -> Result<Option<Header>, SessionEnd> {
        let Some(header) = self.wire.next()? else { return Ok(None) };
        // The answer reports how the transfer ended, so the message stays in the socket until then.
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
                // The crate acknowledges requests that its methods refuse, and some that it refuses itself.
                if matches!(answered, Ok(false)) {
                    self.refuse(header);
                }
                return Err(SessionEnd::Protocol { request, source });
            }
        }
        answered.map(drop)
    }

    /// Sends the negative acknowledgement that the crate omits for a message it does not understand.
    fn refuse(&self, header: &Header) {
        let negotiated = self.backend.lock().device.session().protocol_features
            & vhost::vhost_user::VhostUserProtocolFeatures::REPLY_ACK.bits()
            != 0;
        if negotiated && header.flags & NEED_REPLY != 0 && !header.has_answer() {
            // If this fails, the connection ends anyway.
            let _ = self.wire.refuse(header.request);
        }
    }
}

/// Brings a new handler to the negotiated state. Without negotiated features, acknowledges `PROTOCOL_FEATURES`, so that
/// the handler serves `SET_VRING_ENABLE` before `SET_FEATURES`, which is the order in which QEMU sends them.
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
