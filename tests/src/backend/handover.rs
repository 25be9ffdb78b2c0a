//! Hand-overs of a test's back-end: requests them, waits for their states, and puts the target in the source's place.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use baton_protocol::control::{HandoverState, HandoverStatus, Request, SessionReport};

use super::{Backend, INCOMING};
use crate::process::{PATIENCE, Process, until};

impl Backend {
    /// Asks the back-end to hand its session over to a target that waits at `path`.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn hand_over_to(&mut self, path: &Path, dry_run: bool) -> Result<serde_json::Value> {
        let path = Some(path.display().to_string());
        self.ask(&Request::Handover { path, on_suspend: false, dry_run, cancel: false })
    }

    /// Hands the session over to a waiting target, which replaces this back-end. Returns the report.
    ///
    /// # Errors
    /// Returns an error if the hand-over fails or the source does not exit.
    pub fn become_target(&mut self, target: Self) -> Result<SessionReport> {
        let report = self.ask_hand_over_to(&target)?;
        self.succeed(target, report)
    }

    /// As [`Self::become_target`], for a machine so busy that the target may answer too late; see [`in_time`].
    ///
    /// # Errors
    /// Returns the errors of [`Self::become_target`].
    pub fn become_busy_target(&mut self, target: Self) -> Result<SessionReport> {
        let report = in_time(|| self.ask_hand_over_to(&target))?;
        self.succeed(target, report)
    }

    fn ask_hand_over_to(&mut self, target: &Self) -> Result<SessionReport> {
        let answer = self.hand_over_to(&target.incoming(), false)?;
        serde_json::from_value(answer.clone()).with_context(|| format!("{answer}"))
    }

    fn succeed(&mut self, target: Self, report: SessionReport) -> Result<SessionReport> {
        ensure!(
            matches!(report, SessionReport::Completed { .. }),
            "{report:?}; log:\n{}",
            self.process.log()
        );
        self.is_succeeded_by(target)?;
        Ok(report)
    }

    /// Waits until this back-end exits after a hand-over and puts the target in its place.
    ///
    /// # Errors
    /// Returns an error if the back-end does not exit, or exits with a failure.
    pub fn is_succeeded_by(&mut self, target: Self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.code() == Some(0), "{status}; log:\n{}", self.process.log());
        ensure!(
            !self.control.exists() || self.control == target.control,
            "the source left its control socket behind"
        );
        drop(self.succeeded_by(target));
        Ok(())
    }

    /// Puts the target, which has the session, in the place of this back-end. Returns the process of the source.
    pub fn succeeded_by(&mut self, mut target: Self) -> Process {
        target.socket.clone_from(&self.socket);
        let source = std::mem::replace(self, target);
        self.origin = source.origin.or(Some(source.directory));
        source.process
    }

    /// The path of the socket on which this target waits.
    pub fn incoming(&self) -> PathBuf {
        self.directory().join(INCOMING)
    }

    /// Arms the back-end: when its rings stop, it hands its device over to a target that waits at `path`.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn arm(&mut self, path: &Path) -> Result<serde_json::Value> {
        self.ask(&Request::Handover {
            path: Some(path.display().to_string()),
            on_suspend: true,
            dry_run: false,
            cancel: false,
        })
    }

    /// Cancels the hand-over.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn cancel(&mut self) -> Result<serde_json::Value> {
        self.ask(&Request::Handover { path: None, on_suspend: false, dry_run: false, cancel: true })
    }

    /// Waits until no hand-over is in progress.
    ///
    /// # Errors
    /// Returns an error if a hand-over remains in progress.
    pub fn wait_no_handover(&mut self) -> Result<()> {
        until("no hand-over was in progress", || Ok(self.status()?.handover.is_none()))
    }

    /// Waits until a hand-over reaches this state. Returns its status.
    ///
    /// # Errors
    /// Returns an error if no hand-over reaches the state in time.
    pub fn wait_handover(&mut self, state: HandoverState) -> Result<HandoverStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let handover = self.status()?.handover;
            if let Some(handover) = handover.as_ref().filter(|handover| handover.state == state) {
                return Ok(handover.clone());
            }
            ensure!(
                Instant::now() < deadline,
                "the hand-over remains {handover:?}; log:\n{}",
                self.process.log()
            );
        }
    }
}

/// Retries a session hand-over that the source rolls back because the target does not answer in time, as may happen on
/// an emulated machine. Logs each retry. No rollback may lose a frame either.
///
/// # Errors
/// Returns the errors of `attempt`.
pub fn in_time(mut attempt: impl FnMut() -> Result<SessionReport>) -> Result<SessionReport> {
    const ATTEMPTS: usize = 3;
    for _ in 1..ATTEMPTS {
        let report = attempt()?;
        let is_slow = |reason: &str| reason == "the target does not answer";
        if !matches!(&report, SessionReport::RolledBack { reason, .. } if is_slow(reason)) {
            return Ok(report);
        }
        eprintln!("retrying the hand-over: {report:?}");
    }
    attempt()
}
