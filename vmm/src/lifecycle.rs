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
//! The state is what keeps operations apart: whoever finds the VM migrating is refused. To look at it never waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_control::Promise;
use baton_faults::Point;
use baton_protocol::control::{MigrationReport, Refusal, VmmState, VmmStatus};
use thiserror::Error;

use crate::config::Config;
use crate::machine::{Machine, MachineError};
use crate::migration::Cutter;
use crate::migration::source::{Wish, migrate};
use crate::migration::target::Arrival;

/// Why something was not done to the VM.
#[derive(Debug, Error)]
pub enum LifecycleError {
    /// The VM cannot be stopped.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The VM has yet to come.
    #[error("the VM has yet to come: migrate it here first")]
    Incoming,
    /// The VM is on its way.
    #[error("the VM is being migrated: wait for that to end")]
    Migrating,
    /// The VM is another VMM's.
    #[error("the VM has migrated: its memory and its network are the target's; quit this one")]
    Postmigrate,
    /// No thread.
    #[error("cannot start a migration's thread")]
    Thread(#[source] std::io::Error),
}

#[derive(Debug)]
struct Inner {
    state: VmmState,
    machine: Option<Arc<Machine>>,
    migration: Option<JoinHandle<()>>,
    /// What ends the migration that is under way, to this VMM or from it.
    cutter: Option<Cutter>,
    /// How the last one from this VMM ended.
    last: Option<MigrationReport>,
    /// The VMM is about to end.
    ending: bool,
}

/// The VM and its state.
#[derive(Debug)]
pub struct Lifecycle {
    cpus: u8,
    memory: u64,
    inner: Mutex<Inner>,
}

impl Lifecycle {
    /// No VM yet.
    pub fn new(config: &Config) -> Self {
        let state = VmmState::Incoming;
        let inner = Inner { state, machine: None, migration: None, cutter: None, last: None, ending: false };
        Self { cpus: config.cpus, memory: config.memory.0, inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a VM that was booted run.
    pub fn start(&self, machine: Machine) {
        machine.start();
        let mut inner = self.inner();
        inner.machine = Some(Arc::new(machine));
        inner.state = VmmState::Running;
    }

    /// A place for a VM to come. False if the VMM is about to end: then it was closed again.
    pub fn await_arrival(&self, machine: &Arc<Machine>) -> bool {
        let mut inner = self.inner();
        inner.machine = Some(Arc::clone(machine));
        if inner.ending {
            machine.stop();
        }
        !inner.ending
    }

    /// The VM has come; it runs on unless it did not, or is to be `paused`.
    pub fn arrive(&self, machine: &Machine, arrival: Arrival, paused: bool) {
        let running = arrival.running && !paused;
        if running {
            machine.resume();
        }
        {
            let mut inner = self.inner();
            inner.state = if running { VmmState::Running } else { VmmState::Paused };
            inner.cutter = None;
        }
        baton_faults::pass(Point::TargetVmmResumed);
        // Whoever hears of it finds the VM here.
        arrival.confirm(running);
        tracing::info!("migration: the VM is here and {}", if running { "runs" } else { "stands still" });
    }

    /// Notes what ends the migration that has begun.
    pub fn migration_started(&self, cutter: Cutter) {
        let mut inner = self.inner();
        if inner.ending {
            cutter.cut();
        }
        inner.cutter = Some(cutter);
    }

    /// It came to nothing: the source may hear that.
    pub fn migration_ended(&self) {
        self.inner().cutter = None;
    }

    /// What the control socket says.
    pub fn status(&self) -> VmmStatus {
        let inner = self.inner();
        let net = inner.machine.as_deref().map(Machine::net_status).unwrap_or_default();
        let migration = inner.last.clone();
        VmmStatus { state: inner.state, cpus: self.cpus, memory: self.memory, net, migration }
    }

    /// The VM, if it is this VMM's to do something with, and whether it runs.
    fn own(&self) -> Result<(Arc<Machine>, bool), LifecycleError> {
        let inner = self.inner();
        let running = match inner.state {
            VmmState::Running => true,
            VmmState::Paused => false,
            VmmState::Incoming => return Err(LifecycleError::Incoming),
            VmmState::Migrating => return Err(LifecycleError::Migrating),
            VmmState::Postmigrate => return Err(LifecycleError::Postmigrate),
        };
        let machine = inner.machine.clone().ok_or(LifecycleError::Incoming)?;
        Ok((machine, running))
    }

    /// Makes a running VM stand still, and its devices with it.
    pub fn pause(&self) -> Result<(), LifecycleError> {
        let (machine, running) = self.own()?;
        if running {
            machine.pause()?;
            self.inner().state = VmmState::Paused;
        }
        Ok(())
    }

    /// Lets a VM that stands still run on.
    pub fn resume(&self) -> Result<(), LifecycleError> {
        let (machine, running) = self.own()?;
        if !running {
            machine.resume();
            self.inner().state = VmmState::Running;
        }
        Ok(())
    }

    /// Begins to move the VM, on a thread of its own, and answers when that is over.
    pub fn migrate(self: &Arc<Self>, wish: Wish, promise: Promise) -> Result<(), LifecycleError> {
        let (machine, running) = self.own()?;
        let wish = Wish { running, ..wish };
        let mut inner = self.inner();
        if let Some(before) = inner.migration.take() {
            // It has set the state back: all that it has left to do is to end.
            join(before);
        }
        let lifecycle = Arc::clone(self);
        let before = inner.state;
        let asked_only = wish.dry_run;
        let thread = Builder::new().name("migration".to_owned()).spawn(move || {
            let report = migrate(&machine, &wish, |cutter| lifecycle.migration_started(cutter));
            let next = match report {
                MigrationReport::Completed { .. } => {
                    machine.retire();
                    VmmState::Postmigrate
                }
                _ => before,
            };
            tracing::info!("migration: {report:?}");
            let reply = serde_json::to_value(&report);
            {
                let mut inner = lifecycle.inner();
                inner.state = next;
                inner.cutter = None;
                if !asked_only {
                    inner.last = Some(report);
                }
            }
            promise.keep(reply.map_err(|error| Refusal { error: error.to_string() }));
        });
        inner.migration = Some(thread.map_err(LifecycleError::Thread)?);
        inner.state = VmmState::Migrating;
        Ok(())
    }

    /// Ends the VM, and first whatever is being done to it.
    pub fn stop(&self) {
        let (migration, machine) = {
            let mut inner = self.inner();
            inner.ending = true;
            if let Some(cutter) = &inner.cutter {
                cutter.cut();
            }
            (inner.migration.take(), inner.machine.clone())
        };
        migration.into_iter().for_each(join);
        if let Some(machine) = machine {
            machine.stop();
        }
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a migration's thread panicked");
    }
}
