//! The control socket. Another process may serve it until this one takes the device.

use std::path::PathBuf;

use baton_control::error_chain;
use baton_control::server::ControlServer;

use crate::control::{self, Call};
use crate::event_channel::EventSender;

/// The state of the control socket.
#[derive(Debug)]
pub enum ControlSocket {
    /// No control socket.
    None,
    /// This process serves the socket.
    Served(ControlServer),
    /// Another process serves the socket. This process takes it over together with the device.
    Anothers {
        /// The socket's path.
        path: PathBuf,
        /// Where requests go.
        calls: EventSender<Call>,
    },
}

impl ControlSocket {
    /// Takes over the socket if another process serves it.
    pub(super) fn take(&mut self) {
        let Self::Anothers { path, calls } = self else { return };
        *self = match control::take_place(path, calls.clone()) {
            Ok(server) => Self::Served(server),
            Err(error) => {
                tracing::error!(error = error_chain(&error), "cannot take over the control socket");
                Self::None
            }
        };
    }

    /// Stops serving the socket after sending the pending replies.
    pub(super) fn stop(self) {
        if let Self::Served(server) = self {
            server.stop();
        }
    }
}
