//! The fault matrix: at each fault point of a hand-over one process is killed, hangs, fails or runs out of descriptors.
//!
//! [`device`] moves a VM together with its TAP from one pair of processes to another, [`session`] moves a session from
//! one back-end to another. A *case* is one attempt with one fault. The cases of a fixture use the same VM, or the same
//! front-end, for as long as it lives.

pub mod device;
pub mod session;

use std::fmt::Debug;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use baton_protocol::control::{MigrationReport, SessionReport};
use nix::sys::signal::Signal;

use crate::faults::{Action, Party, Point, has_reached};
use crate::process::{Process, is_stopped, until};

/// The report of the source of a hand-over.
trait Report: Debug + Send + 'static {
    fn is_completed(&self) -> bool;

    /// The phase and the reason of a rollback.
    fn rolled_back(&self) -> Option<(&str, &str)>;
}

impl Report for MigrationReport {
    fn is_completed(&self) -> bool {
        matches!(self, Self::Completed { .. })
    }

    fn rolled_back(&self) -> Option<(&str, &str)> {
        if let Self::RolledBack { phase, reason } = self { Some((phase, reason)) } else { None }
    }
}

impl Report for SessionReport {
    fn is_completed(&self) -> bool {
        matches!(self, Self::Completed { .. })
    }

    fn rolled_back(&self) -> Option<(&str, &str)> {
        if let Self::RolledBack { phase, reason } = self { Some((phase, reason)) } else { None }
    }
}

/// A hand-over in progress: a thread that waits for the report of the source.
#[derive(Debug)]
struct Attempt<R>(JoinHandle<Result<R>>);

impl<R: Report> Attempt<R> {
    fn start(request: impl FnOnce() -> Result<R> + Send + 'static) -> Self {
        Self(thread::spawn(request))
    }

    /// Waits for the report, or for the error that the source answers with.
    fn end(self) -> Result<R> {
        until("the attempt ended", || Ok(self.0.is_finished()))?;
        self.0.join().map_err(|_| anyhow!("the attempt panicked"))?
    }

    /// Expects a rollback; returns its phase and its reason.
    fn end_rolled_back(self) -> Result<(String, String)> {
        let report = self.end()?;
        let (phase, reason) = report.rolled_back().with_context(|| format!("not rolled back: {report:?}"))?;
        Ok((phase.to_owned(), reason.to_owned()))
    }

    /// Expects the hand-over to complete.
    fn end_completed(self) -> Result<()> {
        let report = self.end()?;
        ensure!(report.is_completed(), "not completed: {report:?}");
        Ok(())
    }
}

/// All fault points of a party, in the order in which it reaches them.
fn points(party: Party) -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(move |point| point.party() == party)
}

/// Runs a case, logs how long it took, and names it in its error.
fn run_case<T>(point: Point, action: Action, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let result = body();
    eprintln!("{}, {action:?}: {:?}", point.name(), began.elapsed());
    result.with_context(|| format!("{}, {action:?}", point.name()))
}

/// Whether the process with this log has stopped at the fault point.
fn hangs_at(point: Point, pid: u32, log: &str) -> Result<bool> {
    Ok(has_reached(log, point, Action::Stop) && is_stopped(pid)?)
}

/// Checks that a process killed itself.
fn check_killed(status: ExitStatus) -> Result<()> {
    ensure!(status.signal() == Some(Signal::SIGKILL as i32), "not killed: {status}");
    Ok(())
}

/// Waits until a back-end ends, and checks that it succeeds.
fn check_ends(backend: &mut Process) -> Result<()> {
    let status = backend.wait()?;
    let log = backend.log();
    ensure!(status.success() && !log.contains("panicked"), "a back-end ended with {status}:\n{log}");
    Ok(())
}
