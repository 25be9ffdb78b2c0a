//! Control requests: client threads of the control socket send them, and the event loop answers them.

use std::path::Path;

use baton_channel::bound_socket::{BindError, BoundSocket};
use baton_control::{ControlServer, Outcome, Reply};
use baton_protocol::control::{
    BackendState, BackendStats, BackendStatus, Frontend, HandoverState, HandoverStatus, Refusal, Request,
    VringStatus,
};

use crate::device::Device;
use crate::event_channel::EventSender;

/// The answer to a request.
pub type Answer = Outcome;

/// A request and its reply.
#[derive(Debug)]
pub struct Call {
    /// The request.
    pub request: Request,
    reply: Reply,
}

impl Call {
    /// Sends the answer.
    pub fn answer(self, answer: Answer) {
        self.reply.send(answer);
    }

    /// Returns whether the request is a hand-over's dry run.
    pub fn is_dry_run(&self) -> bool {
        matches!(self.request, Request::Handover { dry_run: true, .. })
    }
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The thread cannot be created.
    #[error("cannot serve the control socket")]
    Start(#[source] std::io::Error),
}

/// Serves a control socket at `path` and sends its requests to `calls`.
///
/// # Errors
/// Returns an error if the path cannot be bound or the thread cannot be created.
pub fn start(path: &Path, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    serve(BoundSocket::bind(path)?, calls)
}

/// Like [`start`], but fails at once if another process listens at `path`.
///
/// # Errors
/// Returns an error if the path is in use or cannot be bound, or if the thread cannot be created.
pub fn start_if_free(path: &Path, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    serve(BoundSocket::bind_at_once(path)?, calls)
}

/// Replaces the control socket that another process serves at `path`. A client that connects always reaches one of the
/// two processes.
///
/// # Errors
/// Returns an error if the new socket cannot be bound, which leaves the other process' socket in place, or if the
/// thread cannot be created.
pub fn take_place(path: &Path, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    serve(BoundSocket::bind_over(path)?, calls)
}

fn serve(socket: BoundSocket, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    ControlServer::start(socket, move |request| {
        let (reply, outcome) = Reply::channel();
        calls.send(Call { request, reply });
        outcome.recv().unwrap_or_else(|_| Err(refusal("the back-end is ending")))
    })
    .map_err(ControlError::Start)
}

/// Creates a refusal with this text.
pub fn refusal(error: impl Into<String>) -> Refusal {
    Refusal { error: error.into() }
}

/// Creates an answer from a serialisable value.
pub fn answer(value: &impl serde::Serialize) -> Answer {
    serde_json::to_value(value).map_err(|error| refusal(error.to_string()))
}

/// Creates the answer to [`Request::Status`].
pub fn status(device: &Device, handover: Option<HandoverStatus>, connected: bool) -> BackendStatus {
    let session = device.session();
    let state = match (handover.as_ref().map(|handover| handover.state), device.tap(), connected) {
        (Some(HandoverState::HandedOver), ..) => BackendState::HandedOver,
        (Some(HandoverState::Staging | HandoverState::Offered), ..) => BackendState::HandingOver,
        (_, Some(_), true) => BackendState::Serving,
        _ => BackendState::Waiting,
    };
    // Until a TAP arrives, the final number of pairs is unknown.
    let pairs = if device.tap().is_some() { device.pairs() } else { device.set_up_pairs() };
    let vrings = session
        .vrings
        .iter()
        .take(2 * pairs)
        .map(|vring| VringStatus {
            started: vring.started,
            enabled: vring.enabled,
            size: vring.size.unwrap_or_default(),
        })
        .collect();
    BackendStatus {
        state,
        tap: device.tap().map(crate::tap::Tap::name).unwrap_or_default(),
        queue_pairs: u16::try_from(pairs).unwrap_or(u16::MAX),
        features: format!("{:#x}", session.features.0),
        protocol_features: format!("{:#x}", session.protocol_features),
        frontend: if connected { Frontend::Connected } else { Frontend::Disconnected },
        datapath: device.datapath(),
        vrings,
        handover,
    }
}

/// Creates the answer to [`Request::Stats`].
pub fn stats(device: &Device) -> BackendStats {
    let counters = device.counters().iter();
    BackendStats { queue_pairs: counters.map(|pair| pair.snapshot(device.datapath())).collect() }
}
