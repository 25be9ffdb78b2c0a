//! Answers requests on the control socket.

use std::path::Path;
use std::sync::Arc;

use baton_channel::bound_socket::{BindError, BoundSocket};
use baton_control::{ControlServer, Outcome, Reply, error_chain};
use baton_protocol::control::{Done, Refusal, Request};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::lifecycle::{Guest, Lifecycle, LifecycleError};
use crate::machine::Machine;
use crate::migration::source::MigrationRequest;

/// Why the control socket cannot be served.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The path is taken or cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A thread or an eventfd cannot be created.
    #[error("cannot serve the control socket")]
    Serve(#[from] std::io::Error),
}

/// Handles the requests of clients.
#[derive(Debug)]
pub struct ControlHandler<M = Machine> {
    /// The VM.
    pub lifecycle: Arc<Lifecycle<M>>,
    /// Signalled to end the VMM.
    pub quit: EventFd,
}

impl<M: Guest> ControlHandler<M> {
    fn answer(&self, request: Request) -> Outcome {
        let lifecycle = &self.lifecycle;
        match request {
            Request::Status => serialised(&lifecycle.status()),
            Request::Pause => answer_of(|reply| lifecycle.pause(reply)),
            Request::Resume => answer_of(|reply| lifecycle.resume(reply)),
            Request::Migrate { path, local, dry_run } => {
                let request = MigrationRequest { path, local, dry_run, running: true };
                answer_of(|reply| lifecycle.migrate(request, reply))
            }
            Request::Quit => {
                event::signal(&self.quit);
                serialised(&Done::DONE)
            }
            Request::Stats => Err(Refusal { error: "a VMM has no counters; ask its back-ends".to_owned() }),
            Request::Handover { .. } => {
                Err(Refusal { error: "this is a VMM: only a back-end can hand over its device".to_owned() })
            }
        }
    }
}

/// Starts an operation with `begin` and waits for its outcome, unless it is refused.
fn answer_of(begin: impl FnOnce(Reply) -> Result<(), LifecycleError>) -> Outcome {
    let (reply, outcome) = Reply::channel();
    begin(reply).map_err(|error| Refusal { error: error_chain(&error) })?;
    outcome.recv().unwrap_or_else(|_| Err(Refusal { error: "the VMM is shutting down".to_owned() }))
}

fn serialised<T: serde::Serialize>(value: &T) -> Outcome {
    serde_json::to_value(value).map_err(|error| Refusal { error: error.to_string() })
}

/// Binds the socket. Requests are answered once [`serve`] is called.
pub fn bind(path: &Path) -> Result<BoundSocket, ControlError> {
    Ok(BoundSocket::bind(path)?)
}

/// Serves requests on a separate thread.
pub fn serve<M: Guest>(
    socket: BoundSocket,
    handler: ControlHandler<M>,
) -> Result<ControlServer, ControlError> {
    Ok(ControlServer::start(socket, move |request| handler.answer(request))?)
}

#[cfg(test)]
mod tests;
