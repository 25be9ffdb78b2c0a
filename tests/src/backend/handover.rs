//! Hand-overs of a test's back-end: asks for them, waits for their states, and lets the target take the source's place.

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
    /// If it refuses.
    pub fn hand_over_to(&mut self, path: &Path, dry_run: bool) -> Result<serde_json::Value> {
        let path = Some(path.display().to_string());
        self.ask(&Request::Handover { path, on_suspend: false, dry_run, cancel: false })
    }

    /// Hands the session over to a waiting target, which takes the place of this back-end; returns the report.
    ///
    /// # Errors
    /// If the hand-over fails, or the source does not end by itself.
    pub fn become_target(&mut self, target: Self) -> Result<SessionReport> {
        let report = self.ask_hand_over_to(&target)?;
        self.succeed(target, report)
    }

    /// The same on a machine so busy that the target may be too slow; see [`in_time`].
    ///
    /// # Errors
    /// As [`Self::become_target`].
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

    /// Waits until this back-end ends after a hand-over; the target takes its place.
    ///
    /// # Errors
    /// If it does not end by itself.
    pub fn is_succeeded_by(&mut self, target: Self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.code() == Some(0), "{status}; log:\n{}", self.process.log());
        ensure!(!self.control.exists() || self.control == target.control, "its control socket is left");
        drop(self.succeeded_by(target));
        Ok(())
    }

    /// Lets the target, which has the session, take the place of this back-end; returns the process of the source.
    pub fn succeeded_by(&mut self, mut target: Self) -> Process {
        target.socket.clone_from(&self.socket);
        let source = std::mem::replace(self, target);
        self.origin = source.origin.or(Some(source.directory));
        source.process
    }

    /// The path of the socket on which a target waits.
    pub fn incoming(&self) -> PathBuf {
        self.directory().join(INCOMING)
    }

    /// Arms the back-end: when its rings stop, it hands its device over to a target that waits at `path`.
    ///
    /// # Errors
    /// If it refuses.
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
    /// If it refuses.
    pub fn cancel(&mut self) -> Result<serde_json::Value> {
        self.ask(&Request::Handover { path: None, on_suspend: false, dry_run: false, cancel: true })
    }

    /// Waits until no hand-over is under way.
    ///
    /// # Errors
    /// If a hand-over stays under way.
    pub fn wait_no_handover(&mut self) -> Result<()> {
        until("nothing was handed over", || Ok(self.status()?.handover.is_none()))
    }

    /// Waits until a hand-over reaches this state; returns its status.
    ///
    /// # Errors
    /// If it never does.
    pub fn wait_handover(&mut self, state: HandoverState) -> Result<HandoverStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let handover = self.status()?.handover;
            if let Some(handover) = handover.as_ref().filter(|handover| handover.state == state) {
                return Ok(handover.clone());
            }
            ensure!(
                Instant::now() < deadline,
                "the hand-over stays {handover:?}; log:\n{}",
                self.process.log()
            );
        }
    }
}

/// Repeats an attempt to hand a session over that the source rolls back because the target does not answer in time, as may
/// happen on an emulated machine. Each repetition is logged; a rollback must lose nothing either.
///
/// # Errors
/// Those of `attempt`.
pub fn in_time(mut attempt: impl FnMut() -> Result<SessionReport>) -> Result<SessionReport> {
    const ATTEMPTS: usize = 3;
    for _ in 1..ATTEMPTS {
        let report = attempt()?;
        let is_slow = |reason: &str| reason == "the target does not answer";
        if !matches!(&report, SessionReport::RolledBack { reason, .. } if is_slow(reason)) {
            return Ok(report);
        }
        eprintln!("asked again: {report:?}");
    }
    attempt()
}
