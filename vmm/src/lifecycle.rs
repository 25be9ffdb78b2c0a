//! What the VM is doing, and what may be asked of it meanwhile.
//!
//! ```text
//!   incoming ──taken──▶ running ◀─resume── paused ◀──taken, --paused── incoming
//!                          │   ──pause──▶     │
//!                          └───────┬──────────┘
//!                               migrate
//!                                  ▼
//!              ◀──rolled back── migrating ──completed──▶ postmigrate
//! ```
//! Each operation has a thread of its own, since it waits for back-ends. The state and the operation under way are what
//! keeps operations apart: whoever comes while the VM is paused, resumed or migrated is refused. To look at the state
//! never waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_control::later::Outcome;
use baton_control::{Promise, error_chain};
use baton_faults::Point;
use baton_protocol::control::{Done, MigrationReport, NetStatus, Refusal, VmmState, VmmStatus};
use serde::Serialize;
use thiserror::Error;

use crate::config::Config;
use crate::machine::{Machine, MachineError};
use crate::migration::source::{Wish, migrate};
use crate::migration::target::Arrival;
use crate::shutdown::ShutdownHandle;

/// Why something was not done to the VM.
#[derive(Debug, Error)]
pub enum LifecycleError {
    /// The VM cannot be stopped.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The VM has yet to come.
    #[error("the VM has yet to come: migrate it here first")]
    Incoming,
    /// The VM is about to stand still.
    #[error("the VM is being paused: wait for that to end")]
    Pausing,
    /// The VM is about to run on.
    #[error("the VM is being resumed: wait for that to end")]
    Resuming,
    /// The VM is on its way.
    #[error("the VM is being migrated: wait for that to end")]
    Migrating,
    /// The VMM ends.
    #[error("the VMM is about to end")]
    Ending,
    /// The VM is another VMM's.
    #[error("the VM has migrated: its memory and its network are the target's; quit this one")]
    Postmigrate,
    /// No thread.
    #[error("cannot start a thread for it")]
    Thread(#[source] std::io::Error),
}

/// A VM whose life this is: a [`Machine`], or what stands for one in a test.
pub trait Guest: Send + Sync + 'static {
    /// What the control socket says about the network devices. Waits for nothing.
    fn net_status(&self) -> Vec<NetStatus>;
    /// The first start.
    fn start(&self);
    /// Stops the vCPUs, then the devices.
    ///
    /// # Errors
    /// If a device cannot be stopped: then the VM runs on.
    fn pause(&self) -> Result<(), MachineError>;
    /// Lets the devices run, then the vCPUs.
    fn resume(&self);
    /// Moves the VM; `started` is given what ends the attempt early.
    fn migrate(&self, wish: &Wish, started: impl FnOnce(ShutdownHandle)) -> MigrationReport;
    /// Ends the VM, and whatever waits for its devices.
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

    fn migrate(&self, wish: &Wish, started: impl FnOnce(ShutdownHandle)) -> MigrationReport {
        let report = migrate(self, wish, started);
        if let MigrationReport::Completed { .. } = report {
            self.retire();
        }
        report
    }

    fn stop(&self) {
        self.stop();
    }
}

/// What is being done to a VM, besides a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Pause,
    Resume,
}

#[derive(Debug)]
struct Inner<M> {
    state: VmmState,
    /// The change under way: the state is that before it.
    change: Option<Change>,
    machine: Option<Arc<M>>,
    /// The thread of the last change or migration.
    work: Option<JoinHandle<()>>,
    /// What ends the migration that is under way, to this VMM or from it.
    connection: Option<ShutdownHandle>,
    /// How the last one from this VMM ended.
    last: Option<MigrationReport>,
    /// The VMM is about to end.
    ending: bool,
}

impl<M> Inner<M> {
    /// The VM, if it is this VMM's to do something with, and whether it runs.
    fn own(&self) -> Result<(Arc<M>, bool), LifecycleError> {
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

    /// Has a thread of its own do this.
    fn work(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), LifecycleError> {
        let thread = Builder::new().name(name.to_owned()).spawn(work).map_err(LifecycleError::Thread)?;
        // The one before has set the state back: all that it has left to do is to end.
        self.work.replace(thread).into_iter().for_each(join);
        Ok(())
    }
}

/// The VM and its state.
#[derive(Debug)]
pub struct Lifecycle<M = Machine> {
    cpus: u8,
    memory: u64,
    inner: Mutex<Inner<M>>,
}

impl<M: Guest> Lifecycle<M> {
    /// No VM yet.
    pub fn new(config: &Config) -> Self {
        let state = VmmState::Incoming;
        let inner = Inner {
            state,
            change: None,
            machine: None,
            work: None,
            connection: None,
            last: None,
            ending: false,
        };
        Self { cpus: config.cpus, memory: config.memory.0, inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<M>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a VM that was booted run.
    pub fn start(&self, machine: M) {
        machine.start();
        let mut inner = self.inner();
        inner.machine = Some(Arc::new(machine));
        inner.state = VmmState::Running;
    }

    /// A place for a VM to come. False if the VMM is about to end: then it was closed again.
    pub fn await_arrival(&self, machine: &Arc<M>) -> bool {
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

    /// The VM has come; it runs on unless it did not, or is to be `paused`.
    pub fn arrive(&self, machine: &M, arrival: Arrival, paused: bool) {
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
        // Whoever hears of it finds the VM here.
        arrival.confirm(running);
        tracing::info!("migration: the VM is here and {}", if running { "runs" } else { "stands still" });
    }

    /// Notes what ends the migration that has begun.
    pub fn migration_started(&self, connection: ShutdownHandle) {
        let mut inner = self.inner();
        if inner.ending {
            connection.shut_down();
        }
        inner.connection = Some(connection);
    }

    /// It came to nothing: the source may hear that.
    pub fn migration_ended(&self) {
        self.inner().connection = None;
    }

    /// What the control socket says.
    pub fn status(&self) -> VmmStatus {
        let inner = self.inner();
        let net = inner.machine.as_deref().map(Guest::net_status).unwrap_or_default();
        let migration = inner.last.clone();
        VmmStatus { state: inner.state, cpus: self.cpus, memory: self.memory, net, migration }
    }

    /// Begins to make a running VM stand still, and its devices with it, and answers when that is over.
    ///
    /// # Errors
    /// If it is not to be done now; then nothing is answered.
    pub fn pause(self: &Arc<Self>, promise: Promise) -> Result<(), LifecycleError> {
        self.change(Change::Pause, promise)
    }

    /// Begins to let a VM that stands still run on, and answers when that is over.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(self: &Arc<Self>, promise: Promise) -> Result<(), LifecycleError> {
        self.change(Change::Resume, promise)
    }

    fn change(self: &Arc<Self>, change: Change, promise: Promise) -> Result<(), LifecycleError> {
        let mut inner = self.inner();
        let (machine, running) = inner.own()?;
        let (name, next) = match change {
            Change::Pause => ("pause", VmmState::Paused),
            Change::Resume => ("resume", VmmState::Running),
        };
        if inner.state == next {
            promise.keep(serialised(&Done::DONE));
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
            promise.keep(match outcome {
                Ok(()) => serialised(&Done::DONE),
                Err(error) => Err(Refusal { error: error_chain(&error) }),
            });
        })?;
        inner.change = Some(change);
        Ok(())
    }

    /// Begins to move the VM, on a thread of its own, and answers when that is over.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn migrate(self: &Arc<Self>, wish: Wish, promise: Promise) -> Result<(), LifecycleError> {
        let mut inner = self.inner();
        let (machine, running) = inner.own()?;
        let wish = Wish { running, ..wish };
        let lifecycle = Arc::clone(self);
        let before = inner.state;
        let asked_only = wish.dry_run;
        inner.work("migration", move || {
            let report = machine.migrate(&wish, |connection| lifecycle.migration_started(connection));
            let next = match report {
                MigrationReport::Completed { .. } => VmmState::Postmigrate,
                _ => before,
            };
            tracing::info!("migration: {report:?}");
            let reply = serialised(&report);
            {
                let mut inner = lifecycle.inner();
                inner.state = next;
                inner.connection = None;
                if !asked_only {
                    inner.last = Some(report);
                }
            }
            promise.keep(reply);
        })?;
        inner.state = VmmState::Migrating;
        Ok(())
    }

    /// Ends the VM, and first whatever is being done to it.
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
        // A migration may end as the word wants it; a change of what ends has no such use.
        if changing {
            stop();
        }
        work.into_iter().for_each(join);
        stop();
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
