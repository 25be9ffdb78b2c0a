//! Answers requests on the control socket.

use std::path::Path;
use std::sync::Arc;

use baton_control::{Answer, BindError, BoundSocket, ControlServer, Promise, error_chain};
use baton_protocol::control::{Done, Refusal, Request};
use serde_json::Value;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::lifecycle::{Guest, Lifecycle, LifecycleError};
use crate::machine::Machine;
use crate::migration::source::MigrationRequest;

/// Why there is no control socket.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The path is taken or cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No thread or event.
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
    fn answer(&self, request: Request) -> Answer {
        let lifecycle = &self.lifecycle;
        match request {
            Request::Status => serialised(&lifecycle.status()),
            Request::Pause => return later(|promise| lifecycle.pause(promise)),
            Request::Resume => return later(|promise| lifecycle.resume(promise)),
            Request::Migrate { path, local, dry_run } => {
                let request = MigrationRequest { path, local, dry_run, running: true };
                return later(|promise| lifecycle.migrate(request, promise));
            }
            Request::Quit => {
                event::signal(&self.quit);
                serialised(&Done::DONE)
            }
            Request::Stats => Err(Refusal { error: "a VMM has no counters: ask its back-ends".to_owned() }),
            Request::Handover { .. } => {
                Err(Refusal { error: "this is a VMM: only a back-end can hand its device over".to_owned() })
            }
        }
        .into()
    }
}

/// Answers when the operation that `begin` begins is done, or at once if it is refused.
fn later(begin: impl FnOnce(Promise) -> Result<(), LifecycleError>) -> Answer {
    let begun = Promise::new().map_err(|error| refusal(&error)).and_then(|(promise, later)| {
        begin(promise).map_err(|error| refusal(&error))?;
        Ok(later)
    });
    begun.map_or_else(|refusal| Err(refusal).into(), Answer::Later)
}

fn refusal(error: &dyn std::error::Error) -> Refusal {
    Refusal { error: error_chain(error) }
}

fn serialised<T: serde::Serialize>(value: &T) -> Result<Value, Refusal> {
    serde_json::to_value(value).map_err(|error| Refusal { error: error.to_string() })
}

/// Binds the socket; nothing is answered before [`ControlServer::start`].
pub fn bind(path: &Path) -> Result<BoundSocket, ControlError> {
    Ok(BoundSocket::bind(path)?)
}

/// Serves requests on a thread of their own.
pub fn serve<M: Guest>(
    socket: BoundSocket,
    handler: ControlHandler<M>,
) -> Result<ControlServer, ControlError> {
    Ok(ControlServer::start(socket, move |request| handler.answer(request))?)
}

#[cfg(test)]
mod tests;
