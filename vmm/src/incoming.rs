//! Receives a VM from another VMM (`--incoming`).
//!
//! A separate thread listens, and serves one source after the other until a VM arrives. It then removes the socket. The
//! machine is created before any source is served, so a missing back-end is reported at the start. A machine that a
//! failed migration has used is replaced by a new one, which is created once the old one is gone: both would use the
//! same console and the same back-ends.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use baton_channel::bound_socket::{BindError, BoundSocket};
use baton_control::{error_chain, limited};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::Config;
use crate::event;
use crate::lifecycle::{Guest, Lifecycle};
use crate::machine::{Machine, MachineError};
use crate::migration::target::{Outcome, serve};
use crate::power::EndSignal;
use crate::serial::SharedConsole;

/// Delay in milliseconds after a source cannot be accepted, for example for lack of descriptors.
const RETRY_MS: u8 = 100;

/// Why the VMM cannot receive a VM.
#[derive(Debug, Error)]
pub enum IncomingError {
    /// The path is taken or cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The machine cannot be created.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A thread or an eventfd cannot be created, or the wait fails.
    #[error("cannot wait for an incoming VM")]
    System(#[from] std::io::Error),
    /// The thread panicked.
    #[error("the thread that waits for a VM panicked")]
    Panicked,
}

impl From<Errno> for IncomingError {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

/// The thread that waits for a VM.
#[derive(Debug)]
pub struct Incoming {
    stop: EventFd,
    thread: JoinHandle<Result<(), IncomingError>>,
}

/// What an incoming VM is created from.
#[derive(Debug)]
pub struct IncomingParts {
    /// Its configuration.
    pub config: Config,
    /// Its console.
    pub console: Arc<SharedConsole>,
    /// Where its end is reported.
    pub end: EndSignal,
    /// The lifecycle that it becomes part of.
    pub lifecycle: Arc<Lifecycle>,
}

impl IncomingParts {
    fn create_machine(&self) -> Result<Arc<Machine>, MachineError> {
        Machine::incoming(&self.config, Arc::clone(&self.console), &self.end).map(Arc::new)
    }
}

impl Incoming {
    /// Creates a machine, and starts the thread that waits at `path` for the VM to run on it. The thread signals
    /// `failed` if it cannot go on; [`Self::stop`] then returns the error.
    pub fn start(path: &Path, parts: IncomingParts, failed: EventFd) -> Result<Self, IncomingError> {
        // Bind first: an early source waits in the backlog, and a bad path is reported on a host without KVM, too.
        let socket = BoundSocket::bind(path)?;
        let machine = parts.create_machine()?;
        socket.listener().set_nonblocking(true)?;
        let stop = event::new()?;
        let mut listener = Listener { parts, socket, stop: stop.try_clone()? };
        listener.parts.lifecycle.set_incoming(&machine);
        Ok(Self::spawn(stop, failed, move || listener.run(machine))?)
    }

    /// Starts a thread that does `work`, which ends when `stop` is signalled.
    fn spawn(
        stop: EventFd,
        failed: EventFd,
        work: impl FnOnce() -> Result<(), IncomingError> + Send + 'static,
    ) -> std::io::Result<Self> {
        let thread = Builder::new().name("incoming".to_owned()).spawn(move || {
            let mut alarm = Alarm(Some(failed));
            work()?;
            alarm.0 = None;
            Ok(())
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread. The caller must first shut down the connection of a source that is being served.
    ///
    /// # Errors
    /// Returns why the thread has failed, if it has.
    pub fn stop(self) -> Result<(), IncomingError> {
        event::signal(&self.stop);
        self.thread.join().unwrap_or(Err(IncomingError::Panicked))
    }
}

/// Signals the event when it is dropped, also by a panic, which would leave a VMM that waits for ever.
struct Alarm(Option<EventFd>);

impl Drop for Alarm {
    fn drop(&mut self) {
        self.0.iter().for_each(event::signal);
    }
}

struct Listener {
    parts: IncomingParts,
    socket: BoundSocket,
    stop: EventFd,
}

impl Listener {
    /// Serves sources until a VM arrives, or the VMM ends.
    fn run(&mut self, mut machine: Arc<Machine>) -> Result<(), IncomingError> {
        let lifecycle = Arc::clone(&self.parts.lifecycle);
        while let Some(stream) = self.accept()? {
            let served = serve(&machine, stream, |connection| lifecycle.migration_started(connection));
            if !matches!(served, Ok(Outcome::Arrived(_))) {
                lifecycle.migration_ended();
            }
            match served {
                Ok(Outcome::Arrived(arrival)) => {
                    lifecycle.set_arrived(&machine, arrival, self.parts.config.paused);
                    return Ok(());
                }
                Ok(Outcome::Failed { reusable: true }) => {}
                Ok(Outcome::Failed { reusable: false }) => {
                    match replace(&lifecycle, machine, || self.parts.create_machine())? {
                        Some(next) => machine = next,
                        None => return Ok(()),
                    }
                }
                Err(error) => limited!(warn, "migration: {}", error_chain(&error)),
            }
        }
        Ok(())
    }

    /// Waits for the next source. Returns `None` when the VMM ends.
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
                    // The source stays in the backlog.
                    limited!(warn, "migration: cannot accept a source now: {error}");
                    poll(&mut [readable(event::descriptor(&self.stop))], RETRY_MS)?;
                }
            }
        }
    }
}

/// Replaces the machine that a failed migration has used. `used` must be the last reference besides the lifecycle's.
/// Returns `None` if the VMM is shutting down.
fn replace<M: Guest>(
    lifecycle: &Lifecycle<M>,
    used: Arc<M>,
    create: impl FnOnce() -> Result<Arc<M>, MachineError>,
) -> Result<Option<Arc<M>>, MachineError> {
    if !lifecycle.drop_incoming() {
        return Ok(None);
    }
    // KVM lets only one VM at a time have the console's interrupt.
    drop(used);
    let machine = create()?;
    Ok(lifecycle.set_incoming(&machine).then_some(machine))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use baton_control::ControlClient;
    use baton_protocol::control::{Frontend, MigrationReport, NetStatus, Request, VmmState, VmmStatus};

    use super::*;
    use crate::control::{self, ControlHandler};
    use crate::migration::source::MigrationRequest;
    use crate::shutdown::ShutdownHandle;

    /// Limits the wait of a test that hangs.
    const LIMIT: Duration = Duration::from_secs(60);

    /// Runs `work` as the thread. Returns how it ended, and whether it signalled a failure.
    fn ends(
        work: impl FnOnce() -> Result<(), IncomingError> + Send + 'static,
    ) -> (Result<(), IncomingError>, bool) {
        let failed = event::new().unwrap();
        let incoming = Incoming::spawn(event::new().unwrap(), failed.try_clone().unwrap(), work).unwrap();
        (incoming.stop(), event::take(&failed))
    }

    #[test]
    fn failure_of_the_thread_is_signalled_and_returned() {
        let (outcome, signalled) = ends(|| Err(Errno::EMFILE.into()));
        assert!(signalled && matches!(outcome, Err(IncomingError::System(_))), "{outcome:?}");
        let (outcome, signalled) = ends(|| panic!("as a test"));
        assert!(signalled && matches!(outcome, Err(IncomingError::Panicked)), "{outcome:?}");
    }

    #[test]
    fn thread_that_has_done_its_work_signals_no_failure() {
        let (outcome, signalled) = ends(|| Ok(()));
        outcome.unwrap();
        assert!(!signalled);
    }

    /// A step that ends when the test says so.
    #[derive(Debug)]
    struct Wait {
        what: &'static str,
        begun: Sender<&'static str>,
        end: Mutex<Receiver<()>>,
    }

    impl Wait {
        fn new(what: &'static str, begun: &Sender<&'static str>) -> (Self, Sender<()>) {
            let (sender, end) = channel();
            (Self { what, begun: begun.clone(), end: Mutex::new(end) }, sender)
        }

        fn wait(&self) {
            // A test that has failed waits for nothing.
            let _ = self.begun.send(self.what);
            let _ = self.end.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LIMIT);
        }
    }

    /// A machine with a connected device. Its end may be a step that waits for the test.
    #[derive(Debug)]
    struct Fake {
        features: &'static str,
        end: Option<Wait>,
    }

    impl Fake {
        fn status(&self) -> NetStatus {
            let features = self.features.to_owned();
            NetStatus { backend: Frontend::Connected, features, ..absent() }
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            self.end.iter().for_each(Wait::wait);
        }
    }

    impl Guest for Fake {
        fn net_status(&self) -> Vec<NetStatus> {
            vec![self.status()]
        }

        fn start(&self) {}

        fn pause(&self) -> Result<(), MachineError> {
            Ok(())
        }

        fn resume(&self) {}

        fn migrate(&self, _: &MigrationRequest, _: impl FnOnce(ShutdownHandle)) -> MigrationReport {
            MigrationReport::Possible
        }

        fn stop(&self) {}
    }

    /// The device's status while there is no machine.
    fn absent() -> NetStatus {
        NetStatus {
            socket: "/net".to_owned(),
            backend: Frontend::Disconnected,
            queue_pairs: 4,
            active_queue_pairs: 1,
            features: "0x0".to_owned(),
        }
    }

    #[test]
    fn status_is_answered_while_a_used_machine_is_replaced() {
        let arguments = ["baton-vmm", "--incoming=i", "--cpus=2", "--net=socket=/net,queue-pairs=4"];
        let config = Config::from_arguments(arguments.map(Into::into)).unwrap();
        let lifecycle = Arc::new(Lifecycle::new(&config));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let handler = ControlHandler { lifecycle: Arc::clone(&lifecycle), quit: event::new().unwrap() };
        let _server = control::serve(control::bind(&path).unwrap(), handler).unwrap();
        let status_has = |net: NetStatus| {
            let (path, (sender, answer)) = (path.clone(), channel());
            std::thread::spawn(move || {
                let _ = sender.send(ControlClient::connect(&path).unwrap().call(&Request::Status).unwrap());
            });
            let status: VmmStatus = serde_json::from_value(answer.recv_timeout(LIMIT).unwrap()).unwrap();
            let memory = config.memory.0;
            let state = VmmState::Incoming;
            assert_eq!(status, VmmStatus { state, cpus: 2, memory, net: vec![net], migration: None });
        };
        let (sender, begun) = channel();
        let (end, ended) = Wait::new("end", &sender);
        let (creation, created) = Wait::new("creation", &sender);
        let used = Arc::new(Fake { features: "0x1", end: Some(end) });
        let next = Fake { features: "0x2", end: None };
        let (before, after) = (used.status(), next.status());
        assert!(lifecycle.set_incoming(&used));
        status_has(before);

        let thread = {
            let lifecycle = Arc::clone(&lifecycle);
            std::thread::spawn(move || {
                replace(&lifecycle, used, || {
                    creation.wait();
                    Ok(Arc::new(next))
                })
            })
        };
        for (step, done) in [("end", ended), ("creation", created)] {
            assert_eq!(begun.recv_timeout(LIMIT), Ok(step));
            status_has(absent());
            done.send(()).unwrap();
        }
        assert!(thread.join().unwrap().unwrap().is_some());
        status_has(after);
    }
}
