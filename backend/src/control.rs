//! The control socket's side of the back-end: requests come from its clients' threads, answers from the event loop.

use std::path::Path;

use baton_channel::bound_socket::{BindError, BoundSocket};
use baton_control::{ControlServer, Outcome, Reply};
use baton_protocol::control::{
    BackendState, BackendStats, BackendStatus, Frontend, HandoverState, HandoverStatus, Refusal, Request,
    VringStatus,
};

use crate::device::Device;
use crate::event_channel::EventSender;

/// What a request comes to.
pub type Answer = Outcome;

/// A request and its reply.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    reply: Reply,
}

impl Call {
    /// Answers it.
    pub fn answer(self, answer: Answer) {
        self.reply.send(answer);
    }

    /// Whether it only asks what could be done.
    pub fn is_dry_run(&self) -> bool {
        matches!(self.request, Request::Handover { dry_run: true, .. })
    }
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Its path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Its thread cannot be made.
    #[error("cannot serve the control socket")]
    Start(#[source] std::io::Error),
}

/// Serves the control socket at `path`; requests go to `calls`.
///
/// # Errors
/// [`ControlError`].
pub fn start(path: &Path, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    serve(BoundSocket::bind(path)?, calls)
}

/// Serves the control socket at `path` as [`start`] does, unless another process serves one there.
///
/// # Errors
/// [`ControlError`].
pub fn start_if_free(path: &Path, calls: EventSender<Call>) -> Result<ControlServer, ControlError> {
    serve(BoundSocket::bind_at_once(path)?, calls)
}

/// Serves a control socket in the place of another process'; who connects reaches one or the other at any time.
///
/// # Errors
/// [`ControlError`]; the other process' socket stays then.
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

/// A refusal in so many words.
pub fn refusal(error: impl Into<String>) -> Refusal {
    Refusal { error: error.into() }
}

/// An answer from a serialisable value.
pub fn answer(value: &impl serde::Serialize) -> Answer {
    serde_json::to_value(value).map_err(|error| refusal(error.to_string()))
}

/// The answer to [`Request::Status`].
pub fn status(device: &Device, handover: Option<HandoverStatus>, connected: bool) -> BackendStatus {
    let session = device.session();
    let state = match (handover.as_ref().map(|handover| handover.state), device.tap(), connected) {
        (Some(HandoverState::HandedOver), ..) => BackendState::HandedOver,
        (Some(HandoverState::Staging | HandoverState::Offered), ..) => BackendState::HandingOver,
        (_, Some(_), true) => BackendState::Serving,
        _ => BackendState::Waiting,
    };
    // Without a TAP it is not known how many pairs there will be.
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

/// The answer to [`Request::Stats`].
pub fn stats(device: &Device) -> BackendStats {
    let counters = device.counters().iter();
    BackendStats { queue_pairs: counters.map(|pair| pair.snapshot(device.datapath())).collect() }
}
