//! What the VMM answers on its control socket.

use std::path::Path;
use std::sync::Arc;

use baton_control::later::Later;
use baton_control::{Answer, BindError, BoundSocket, ControlServer, Promise};
use baton_protocol::control::{Done, Refusal, Request};
use serde_json::Value;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::lifecycle::{Lifecycle, LifecycleError};
use crate::migration::source::Wish;

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

/// What can be asked about the VM and done to it.
#[derive(Debug)]
pub struct Controlled {
    /// The VM.
    pub lifecycle: Arc<Lifecycle>,
    /// Signalled to end the VMM.
    pub quit: EventFd,
}

impl Controlled {
    fn answer(&self, request: Request) -> Answer {
        let done = |outcome: Result<(), LifecycleError>| match outcome {
            Ok(()) => serialised(&Done::DONE),
            Err(error) => Err(refusal(error)),
        };
        match request {
            Request::Status => serialised(&self.lifecycle.status()),
            Request::Pause => done(self.lifecycle.pause()),
            Request::Resume => done(self.lifecycle.resume()),
            Request::Migrate { path, local, dry_run } => {
                let wish = Wish { path, local, dry_run, running: true };
                return self.migrate(wish).map_or_else(|error| Err(error).into(), Answer::Later);
            }
            Request::Quit => {
                event::signal(&self.quit);
                done(Ok(()))
            }
            Request::Stats => Err(Refusal { error: "a VMM has no counters: ask its back-ends".to_owned() }),
            Request::Handover { .. } => {
                Err(Refusal { error: "this is a VMM: only a back-end can hand its device over".to_owned() })
            }
        }
        .into()
    }

    fn migrate(&self, wish: Wish) -> Result<Later, Refusal> {
        let (promise, later) = Promise::new().map_err(refusal)?;
        self.lifecycle.migrate(wish, promise).map_err(refusal)?;
        Ok(later)
    }
}

fn refusal(error: impl Into<anyhow::Error>) -> Refusal {
    Refusal { error: format!("{:#}", error.into()) }
}

fn serialised<T: serde::Serialize>(value: &T) -> Result<Value, Refusal> {
    serde_json::to_value(value).map_err(|error| Refusal { error: error.to_string() })
}

/// Binds the socket; nothing is answered before [`ControlServer::start`].
pub fn bind(path: &Path) -> Result<BoundSocket, ControlError> {
    Ok(BoundSocket::bind(path)?)
}

/// Serves requests on a thread of their own.
pub fn serve(socket: BoundSocket, controlled: Controlled) -> Result<ControlServer, ControlError> {
    Ok(ControlServer::start(socket, move |request| controlled.answer(request))?)
}
