//! The control socket, which may be another process' until this one has the device.

use std::path::PathBuf;

use baton_control::error_chain;
use baton_control::server::ControlServer;

use crate::control::{self, Call};
use crate::event_channel::EventSender;

/// The control socket, or what becomes of it.
#[derive(Debug)]
pub enum ControlSocket {
    /// There is none.
    None,
    /// It is served.
    Served(ControlServer),
    /// Another process serves it, and this one takes it over together with the device.
    Anothers {
        /// Its path.
        path: PathBuf,
        /// Where requests go.
        calls: EventSender<Call>,
    },
}

impl ControlSocket {
    /// Takes the socket over, if another process still serves it.
    pub(super) fn take(&mut self) {
        let Self::Anothers { path, calls } = self else { return };
        *self = match control::take_place(path, calls.clone()) {
            Ok(server) => Self::Served(server),
            Err(error) => {
                tracing::error!(error = error_chain(&error), "there is no control socket");
                Self::None
            }
        };
    }

    /// Stops serving it, once the replies already made have gone out.
    pub(super) fn stop(self) {
        if let Self::Served(server) = self {
            server.stop();
        }
    }
}
