//! Waits for a VM from another VMM (`--incoming`).
//!
//! A thread of its own listens, and serves one source after the other until a VM has come; then the socket goes.
//! The machine is made before any source is served, so that a back-end which is missing is said at the start. After
//! a source has come to nothing, another machine is made.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use baton_control::{BindError, BoundSocket, error_chain, limited};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::Config;
use crate::event;
use crate::lifecycle::Lifecycle;
use crate::machine::{Machine, MachineError};
use crate::migration::target::{Taken, serve};
use crate::power::EndSignal;
use crate::serial::SharedConsole;

/// How long to leave sources waiting that cannot be accepted, for want of descriptors, say, in milliseconds.
const REST: u8 = 100;

/// Why no VM can come.
#[derive(Debug, Error)]
pub enum IncomingError {
    /// The path is taken or cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No place for a VM.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No thread, no events.
    #[error("cannot wait for a VM")]
    System(#[from] std::io::Error),
}

impl From<Errno> for IncomingError {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

/// The thread that waits.
#[derive(Debug)]
pub struct Incoming {
    stop: EventFd,
    thread: JoinHandle<()>,
}

/// What is waited for, and what the VM that comes gets.
#[derive(Debug)]
pub struct Awaited {
    /// How the VM looks.
    pub config: Config,
    /// Its console.
    pub console: Arc<SharedConsole>,
    /// Where its end is reported.
    pub end: EndSignal,
    /// Where it goes.
    pub lifecycle: Arc<Lifecycle>,
}

impl Awaited {
    fn place(&self) -> Result<Arc<Machine>, MachineError> {
        Machine::incoming(&self.config, Arc::clone(&self.console), &self.end).map(Arc::new)
    }
}

impl Incoming {
    /// Makes a place for a VM, and waits for it at `path`. When that becomes impossible, `failed` is signalled.
    pub fn start(path: &Path, awaited: Awaited, failed: EventFd) -> Result<Self, IncomingError> {
        // The path first: a source that connects already waits in the backlog, and KVM is not needed to refuse a path.
        let socket = BoundSocket::bind(path)?;
        let machine = awaited.place()?;
        socket.listener().set_nonblocking(true)?;
        let stop = event::new()?;
        let mut waiting = Waiting { awaited, socket, stop: stop.try_clone()? };
        waiting.awaited.lifecycle.await_arrival(&machine);
        let thread = Builder::new().name("incoming".to_owned()).spawn(move || {
            if let Err(error) = waiting.run(machine) {
                tracing::error!("{}", error_chain(&error));
                event::signal(&failed);
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the wait. The connection of a source that is being served must have been shut down.
    pub fn stop(self) {
        event::signal(&self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the thread that waits for a VM panicked");
        }
    }
}

struct Waiting {
    awaited: Awaited,
    socket: BoundSocket,
    stop: EventFd,
}

impl Waiting {
    /// Until the VM has come, or nobody waits for it any more.
    fn run(&mut self, mut machine: Arc<Machine>) -> Result<(), IncomingError> {
        let lifecycle = Arc::clone(&self.awaited.lifecycle);
        while let Some(stream) = self.accept()? {
            let served = serve(&machine, stream, |connection| lifecycle.migration_started(connection));
            if !matches!(served, Ok(Taken::Here(_))) {
                lifecycle.migration_ended();
            }
            match served {
                Ok(Taken::Here(arrival)) => {
                    lifecycle.arrive(&machine, arrival, self.awaited.config.paused);
                    return Ok(());
                }
                Ok(Taken::Not { fresh: true }) => {}
                Ok(Taken::Not { fresh: false }) => {
                    machine.stop();
                    if event::take(&self.stop) {
                        return Ok(());
                    }
                    machine = self.awaited.place()?;
                    if !lifecycle.await_arrival(&machine) {
                        return Ok(());
                    }
                }
                Err(error) => limited!(warn, "migration: {}", error_chain(&error)),
            }
        }
        Ok(())
    }

    /// The next source, or `None` at the end.
    fn accept(&self) -> Result<Option<OwnedFd>, IncomingError> {
        loop {
            let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let listener = self.socket.listener();
            let mut events = [readable(event::descriptor(&self.stop)), readable(listener.as_fd())];
            match poll(&mut events, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if events[0].any().unwrap_or(true) {
                return Ok(None);
            }
            match listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream.into())),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // The source is still there to be accepted; what is missing may come back.
                    limited!(warn, "migration: cannot accept a source now: {error}");
                    poll(&mut [readable(event::descriptor(&self.stop))], REST)?;
                }
            }
        }
    }
}
