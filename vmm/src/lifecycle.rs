//! The VM's state, and the operations that change it.
//!
//! ```text
//!   incoming ─arrived─▶ running ◀─resume── paused ◀─arrived, --paused─ incoming
//!                          │   ──pause──▶     │
//!                          └───────┬──────────┘
//!                               migrate
//!                                  ▼
//!              ◀──rolled back── migrating ──completed──▶ postmigrate
//! ```
//! Each operation runs on its own thread, because it waits for back-ends. Only one runs at a time: requests are refused
//! while the VM is being paused, resumed or migrated. Reading the state never waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_control::{Outcome, Reply, error_chain};
use baton_faults::Point;
use baton_protocol::control::{Done, Frontend, MigrationReport, NetStatus, Refusal, VmmState, VmmStatus};
use serde::Serialize;
use thiserror::Error;

use crate::config::{Config, NetConfig};
use crate::machine::{Machine, MachineError};
use crate::migration::source::{MigrationRequest, migrate};
use crate::migration::target::Arrival;
use crate::shutdown::ShutdownHandle;

/// Why an operation on the VM is refused.
#[derive(Debug, Error)]
pub enum LifecycleError {
    /// The VM cannot be paused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No VM has arrived.
    #[error("no VM has arrived yet: migrate one here first")]
    Incoming,
    /// A pause is in progress.
    #[error("the VM is being paused; retry once it is paused")]
    Pausing,
    /// A resume is in progress.
    #[error("the VM is being resumed; retry once it runs")]
    Resuming,
    /// A migration is in progress.
    #[error("the VM is being migrated; retry once the migration ends")]
    Migrating,
    /// The VMM is shutting down.
    #[error("the VMM is shutting down")]
    Ending,
    /// The VM has migrated to another VMM.
    #[error("the VM has migrated: its memory and network are now the target's; quit this VMM")]
    Postmigrate,
    /// The operation's thread cannot be started.
    #[error("cannot start a thread for the operation")]
    Thread(#[source] std::io::Error),
}

/// What the lifecycle operates on: a [`Machine`], or a fake in tests.
pub trait Guest: Send + Sync + 'static {
    /// Returns the network devices' status for the control socket. Never waits.
    fn net_status(&self) -> Vec<NetStatus>;
    /// Starts a VM that boots.
    fn start(&self);
    /// Pauses the vCPUs, then suspends the devices.
    ///
    /// # Errors
    /// Returns an error if a device cannot be suspended; the VM then keeps running.
    fn pause(&self) -> Result<(), MachineError>;
    /// Resumes the devices, then the vCPUs.
    fn resume(&self);
    /// Migrates the VM. `started` receives the handle that aborts the migration.
    fn migrate(&self, request: &MigrationRequest, started: impl FnOnce(ShutdownHandle)) -> MigrationReport;
    /// Stops the VM, and ends every wait for its devices.
    fn stop(&self);
}

impl Guest for Machine {
    fn net_status(&self) -> Vec<NetStatus> {
        self.net_status()
    }

    fn start(&self) {
        self.start();
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.pause()
    }

    fn resume(&self) {
        self.resume();
    }

    fn migrate(&self, request: &MigrationRequest, started: impl FnOnce(ShutdownHandle)) -> MigrationReport {
        let report = migrate(self, request, started);
        if let MigrationReport::Completed { .. } = report {
            self.retire();
        }
        report
    }

    fn stop(&self) {
        self.stop();
    }
}

/// An operation in progress, other than a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Pause,
    Resume,
}

#[derive(Debug)]
struct Inner<M> {
    state: VmmState,
    /// The change in progress. `state` is still the state before it.
    change: Option<Change>,
    machine: Option<Arc<M>>,
    /// The thread of the last change or migration.
    work: Option<JoinHandle<()>>,
    /// The connection of the migration in progress, incoming or outgoing.
    connection: Option<ShutdownHandle>,
    /// The report of the last outgoing migration.
    last_migration: Option<MigrationReport>,
    /// The VMM is shutting down.
    ending: bool,
}

impl<M> Inner<M> {
    /// Returns the VM and whether it runs, if this VMM owns it and no operation is in progress.
    fn idle_vm(&self) -> Result<(Arc<M>, bool), LifecycleError> {
        if self.ending {
            return Err(LifecycleError::Ending);
        }
        match self.change {
            Some(Change::Pause) => return Err(LifecycleError::Pausing),
            Some(Change::Resume) => return Err(LifecycleError::Resuming),
            None => {}
        }
        let running = match self.state {
            VmmState::Running => true,
            VmmState::Paused => false,
            VmmState::Incoming => return Err(LifecycleError::Incoming),
            VmmState::Migrating => return Err(LifecycleError::Migrating),
            VmmState::Postmigrate => return Err(LifecycleError::Postmigrate),
        };
        let machine = self.machine.clone().ok_or(LifecycleError::Incoming)?;
        Ok((machine, running))
    }

    /// Runs `work` on its own thread.
    fn work(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), LifecycleError> {
        let thread = Builder::new().name(name.to_owned()).spawn(work).map_err(LifecycleError::Thread)?;
        // The previous thread has finished its operation and ends at once.
        self.work.replace(thread).into_iter().for_each(join);
        Ok(())
    }
}

/// The VM and its state.
#[derive(Debug)]
pub struct Lifecycle<M = Machine> {
    cpus: u8,
    memory: u64,
    /// The devices' status while there is no machine.
    absent: Vec<NetStatus>,
    inner: Mutex<Inner<M>>,
}

impl<M: Guest> Lifecycle<M> {
    /// Creates a lifecycle without a VM.
    pub fn new(config: &Config) -> Self {
        let state = VmmState::Incoming;
        let inner = Inner {
            state,
            change: None,
            machine: None,
            work: None,
            connection: None,
            last_migration: None,
            ending: false,
        };
        let absent = config.net.iter().map(absent).collect();
        Self { cpus: config.cpus, memory: config.memory.0, absent, inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<M>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes and starts a VM that boots.
    pub fn start(&self, machine: M) {
        machine.start();
        let mut inner = self.inner();
        inner.machine = Some(Arc::new(machine));
        inner.state = VmmState::Running;
    }

    /// Sets the machine for an incoming VM. If the VMM is shutting down, stops the machine and returns false.
    pub fn set_incoming(&self, machine: &Arc<M>) -> bool {
        let ending = {
            let mut inner = self.inner();
            inner.machine = Some(Arc::clone(machine));
            inner.ending
        };
        if ending {
            machine.stop();
        }
        !ending
    }

    /// Drops the reference to the machine for an incoming VM. Returns false, and keeps the machine, if the VMM is
    /// shutting down.
    pub fn drop_incoming(&self) -> bool {
        let mut inner = self.inner();
        // The caller has another reference, so this does not stop the machine, which would wait with the lock held.
        let drops = !inner.ending;
        if drops {
            inner.machine = None;
        }
        drops
    }

    /// Resumes a VM that has arrived, if it ran at the source and `paused` is false.
    pub fn set_arrived(&self, machine: &M, arrival: Arrival, paused: bool) {
        let running = arrival.running && !paused;
        if running {
            machine.resume();
        }
        {
            let mut inner = self.inner();
            inner.state = if running { VmmState::Running } else { VmmState::Paused };
            inner.connection = None;
        }
        baton_faults::pass(Point::TargetVmmResumed);
        // Confirmed after the state is set: a client that reads the source's report must find the VM here.
        arrival.confirm(running);
        tracing::info!("migration: the VM has arrived and {}", if running { "runs" } else { "is paused" });
    }

    /// Keeps the connection of a migration that begins, so that [`Self::stop`] can shut it down.
    pub fn migration_started(&self, connection: ShutdownHandle) {
        let mut inner = self.inner();
        if inner.ending {
            connection.shut_down();
        }
        inner.connection = Some(connection);
    }

    /// Drops the connection of an incoming migration that ended without a VM.
    pub fn migration_ended(&self) {
        self.inner().connection = None;
    }

    /// Returns the status for the control socket.
    pub fn status(&self) -> VmmStatus {
        let inner = self.inner();
        let net = inner.machine.as_deref().map_or_else(|| self.absent.clone(), Guest::net_status);
        let migration = inner.last_migration.clone();
        VmmStatus { state: inner.state, cpus: self.cpus, memory: self.memory, net, migration }
    }

    /// Begins to pause the VM and its devices. Sends `reply` when that is done.
    ///
    /// # Errors
    /// Returns an error, and sends no reply, if the operation is refused.
    pub fn pause(self: &Arc<Self>, reply: Reply) -> Result<(), LifecycleError> {
        self.change(Change::Pause, reply)
    }

    /// Begins to resume the VM and its devices. Sends `reply` when that is done.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(self: &Arc<Self>, reply: Reply) -> Result<(), LifecycleError> {
        self.change(Change::Resume, reply)
    }

    fn change(self: &Arc<Self>, change: Change, reply: Reply) -> Result<(), LifecycleError> {
        let mut inner = self.inner();
        let (machine, running) = inner.idle_vm()?;
        let (name, next) = match change {
            Change::Pause => ("pause", VmmState::Paused),
            Change::Resume => ("resume", VmmState::Running),
        };
        if inner.state == next {
            reply.send(serialised(&Done::DONE));
            return Ok(());
        }
        let lifecycle = Arc::clone(self);
        debug_assert_eq!(running, change == Change::Pause);
        inner.work(name, move || {
            let outcome = match change {
                Change::Pause => machine.pause(),
                Change::Resume => {
                    machine.resume();
                    Ok(())
                }
            };
            {
                let mut inner = lifecycle.inner();
                inner.change = None;
                if outcome.is_ok() {
                    inner.state = next;
                }
            }
            reply.send(match outcome {
                Ok(()) => serialised(&Done::DONE),
                Err(error) => Err(Refusal { error: error_chain(&error) }),
            });
        })?;
        inner.change = Some(change);
        Ok(())
    }

    /// Begins to migrate the VM. Sends `reply` when that is done.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn migrate(self: &Arc<Self>, request: MigrationRequest, reply: Reply) -> Result<(), LifecycleError> {
        let mut inner = self.inner();
        let (machine, running) = inner.idle_vm()?;
        let request = MigrationRequest { running, ..request };
        let lifecycle = Arc::clone(self);
        let before = inner.state;
        let dry_run = request.dry_run;
        inner.work("migration", move || {
            let report = machine.migrate(&request, |connection| lifecycle.migration_started(connection));
            let next = match report {
                MigrationReport::Completed { .. } => VmmState::Postmigrate,
                _ => before,
            };
            tracing::info!("migration: {report:?}");
            let outcome = serialised(&report);
            {
                let mut inner = lifecycle.inner();
                inner.state = next;
                inner.connection = None;
                if !dry_run {
                    inner.last_migration = Some(report);
                }
            }
            reply.send(outcome);
        })?;
        inner.state = VmmState::Migrating;
        Ok(())
    }

    /// Ends the operation in progress, then the VM.
    pub fn stop(&self) {
        let (work, machine, changing) = {
            let mut inner = self.inner();
            inner.ending = true;
            if let Some(connection) = &inner.connection {
                connection.shut_down();
            }
            (inner.work.take(), inner.machine.clone(), inner.change.is_some())
        };
        let stop = || machine.iter().for_each(|machine| machine.stop());
        // A migration ends as the ownership word decides. A pause or a resume is cut short.
        if changing {
            stop();
        }
        work.into_iter().for_each(join);
        stop();
    }
}

/// Returns the status of a device that does not exist yet.
fn absent(config: &NetConfig) -> NetStatus {
    NetStatus {
        socket: config.socket.display().to_string(),
        backend: Frontend::Disconnected,
        queue_pairs: config.queue_pairs,
        active_queue_pairs: 1,
        features: "0x0".to_owned(),
    }
}

fn serialised<T: Serialize>(value: &T) -> Outcome {
    serde_json::to_value(value).map_err(|error| Refusal { error: error.to_string() })
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("the thread of a pause, a resume or a migration panicked");
    }
}
