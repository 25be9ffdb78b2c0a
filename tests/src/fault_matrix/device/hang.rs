//! Stops a process for longer than the other processes wait for it, then continues it.

use anyhow::{Result, ensure};
use baton_protocol::control::VmmState;
use nix::sys::signal::Signal;

use super::{
    Fixture, Target, check_no_tap, check_waits, end_backend, everywhere, is_source, quit_left, rolls_back,
    signal,
};
use crate::fault_matrix::hangs_at;
use crate::faults::{Action, Party, Point};
use crate::local_migration::Kind;
use crate::process::{is_stopped, until};

/// Stops each process at each of its fault points.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn hang_everywhere(kind: Kind) -> Result<()> {
    everywhere(kind, Fixture::hang)
}

impl Fixture {
    /// Stops the process that reaches the point, and continues it once the others have given it up.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn hang(&mut self, point: Point) -> Result<()> {
        self.case(point, Action::Stop, |fixture, target| {
            if rolls_back(point) {
                fixture.hang_and_stay(point, target)
            } else {
                fixture.hang_and_move(point, target)
            }
        })
    }

    /// Waits until the process hangs.
    fn wait_hanging(&self, point: Point, target: &Target) -> Result<u32> {
        until(&format!("{} was reached", point.name()), || {
            let (process, log) = self.process_at(target, point);
            hangs_at(point, process, &log)
        })?;
        Ok(self.process_at(target, point).0)
    }

    fn hang_and_stay(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let attempt = self.attempt(target);
        let hanging = self.wait_hanging(point, target)?;
        if point.party() == Party::SourceVmm {
            // The guest hangs, too. The target gives up the attempt and must not run the guest.
            check_waits(target)?;
            ensure!(is_stopped(hanging)?, "the process at {} is not stopped any more", point.name());
            signal(hanging, Signal::SIGCONT)?;
            attempt.end_rolled_back()?;
            self.check_network()?;
            self.check_held()?;
            return check_waits(target);
        }
        let (phase, reason) = attempt.end_rolled_back()?;
        let silent = ["the target does not answer", "no reply within"];
        ensure!(silent.iter().any(|text| reason.contains(text)), "{phase}: {reason}");
        ensure!(is_stopped(hanging)?, "the process at {} is not stopped any more", point.name());
        if is_source(point.party()) {
            // The guest runs; only its network hangs.
            ensure!(self.traveller.stay.status()?.state == VmmState::Running);
        } else {
            self.check_network()?;
        }
        signal(hanging, Signal::SIGCONT)?;
        match point.party() {
            // The target's VMM cannot accept a guest without this back-end, and may have ended.
            Party::TargetBackend => check_no_tap(&target.stay)?,
            _ => check_waits(target)?,
        }
        self.check_network()?;
        self.check_held()
    }

    fn hang_and_move(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let attempt = self.attempt(target);
        let hanging = self.wait_hanging(point, target)?;
        if point.party() == Party::SourceVmm {
            // The target runs the VM while the source hangs.
            until("the target ran", || Ok(target.stay.status()?.state == VmmState::Running))?;
            let source = self.exchange(target);
            self.check_network()?;
            ensure!(is_stopped(hanging)?, "the process at {} is not stopped any more", point.name());
            signal(hanging, Signal::SIGCONT)?;
            attempt.end_completed()?;
            quit_left(source)?;
            end_backend(source, false)?;
            return self.check_network();
        }
        attempt.end_completed()?;
        ensure!(is_stopped(hanging)?, "the process at {} is not stopped any more", point.name());
        let source = self.exchange(target);
        match point.party() {
            Party::SourceBackend => {
                self.check_network()?;
                quit_left(source)?;
                signal(hanging, Signal::SIGCONT)?;
            }
            _ => {
                signal(hanging, Signal::SIGCONT)?;
                self.check_network()?;
                quit_left(source)?;
            }
        }
        end_backend(source, false)?;
        self.check_network()
    }
}
