//! What the VMM answers on its control socket.

use std::path::Path;
use std::sync::Arc;

use baton_control::{BindError, BoundSocket, ControlServer};
use baton_protocol::control::{Done, Refusal, Request, VmmState, VmmStatus};
use serde_json::Value;
use thiserror::Error;

use crate::event;
use crate::vcpu::{Vcpus, Wanted};
use crate::virtio::net::NetShared;

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
    /// The vCPUs.
    pub vcpus: Arc<Vcpus>,
    /// Guest memory, in bytes.
    pub memory: u64,
    /// How many vCPUs there are.
    pub cpus: u8,
    /// The network devices.
    pub net: Vec<Arc<NetShared>>,
    /// Signalled to end the VMM.
    pub quit: vmm_sys_util::eventfd::EventFd,
}

impl Controlled {
    fn answer(&self, request: &Request) -> Result<Value, Refusal> {
        let done = || serialised(&Done::DONE);
        match request {
            Request::Status => serialised(&self.status()),
            Request::Pause => {
                self.vcpus.pause();
                done()
            }
            Request::Resume => {
                self.vcpus.resume();
                done()
            }
            Request::Quit => {
                event::signal(&self.quit);
                done()
            }
            Request::Stats => Err(Refusal { error: "a VMM has no counters: ask its back-ends".to_owned() }),
            Request::Handover { .. } => {
                Err(Refusal { error: "this is a VMM: only a back-end can hand its device over".to_owned() })
            }
        }
    }

    fn status(&self) -> VmmStatus {
        let state = match self.vcpus.state() {
            Wanted::Running => VmmState::Running,
            Wanted::Paused | Wanted::Stopped => VmmState::Paused,
        };
        VmmStatus {
            state,
            cpus: self.cpus,
            memory: self.memory,
            net: self.net.iter().map(|net| net.status()).collect(),
        }
    }
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
    Ok(ControlServer::start(socket, move |request| controlled.answer(&request))?)
}
