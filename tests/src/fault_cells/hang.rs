//! A process hangs, longer than anybody waits for it, and later goes on.

use anyhow::{Result, ensure};
use baton_protocol::control::VmmState;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{
    Arena, Target, check_no_tap, check_waits, end_backend, is_source, quit_left, signal, stays, until,
};
use crate::faults::{Action, Party, Point, has_reached};
use crate::process;

/// Whether a process is stopped.
fn is_stopped(process: Pid) -> Result<bool> {
    process::is_stopped(u32::try_from(process.as_raw())?)
}

impl Arena {
    /// The process that comes by the point stops there, and goes on when the others have given it up.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn hang(&mut self, point: Point) -> Result<()> {
        self.cell(point, Action::Stop, |arena, target| {
            if stays(point) { arena.hang_and_stay(point, target) } else { arena.hang_and_move(point, target) }
        })
    }

    /// Waits until the process hangs.
    fn wait_hanging(&self, point: Point, target: &Target) -> Result<Pid> {
        until(&format!("{} was reached", point.name()), || {
            let (process, log) = self.process_at(target, point);
            Ok(has_reached(&log, point, Action::Stop) && is_stopped(process)?)
        })?;
        Ok(self.process_at(target, point).0)
    }

    fn hang_and_stay(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let attempt = self.attempt(target);
        let hanging = self.wait_hanging(point, target)?;
        if point.party() == Party::SourceVmm {
            // The guest hangs with it, and nobody else may run it: the target gives it up.
            check_waits(target)?;
            ensure!(is_stopped(hanging)?, "{} goes on", point.name());
            signal(hanging, Signal::SIGCONT)?;
            attempt.end_rolled_back()?;
            self.check_network()?;
            self.check_held()?;
            return check_waits(target);
        }
        let (phase, reason) = attempt.end_rolled_back()?;
        let silent = ["the target does not answer", "no answer within"];
        ensure!(silent.iter().any(|text| reason.contains(text)), "{phase}: {reason}");
        ensure!(is_stopped(hanging)?, "{} goes on", point.name());
        if is_source(point.party()) {
            // The guest runs, but its network hangs.
            ensure!(self.traveller.stay.status()?.state == VmmState::Running);
        } else {
            self.check_network()?;
        }
        signal(hanging, Signal::SIGCONT)?;
        match point.party() {
            // Its VMM cannot make a place without it, and may have ended for that.
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
            // Whatever the source does, the VM is the target's.
            until("the target ran", || Ok(target.stay.status()?.state == VmmState::Running))?;
            let source = self.exchange(target);
            self.check_network()?;
            ensure!(is_stopped(hanging)?, "{} goes on", point.name());
            signal(hanging, Signal::SIGCONT)?;
            attempt.end_completed()?;
            quit_left(source)?;
            end_backend(source, false)?;
            return self.check_network();
        }
        attempt.end_completed()?;
        ensure!(is_stopped(hanging)?, "{} goes on", point.name());
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
