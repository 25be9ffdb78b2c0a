//! Kills a process at a fault point.

use anyhow::{Result, ensure};
use baton_protocol::control::VmmState;

use super::{
    Fixture, Target, check_no_tap, check_waits, end_backend, is_source, is_vmm, queues_held, quit_left,
    rolls_back,
};
use crate::fault_matrix::{check_killed, points};
use crate::faults::{Action, Faults, Party, Point};
use crate::local_migration::Kind;
use crate::process::until;

/// Kills each process except the VMM that has the guest, at each of its fault points: first where the guest stays at
/// the source, then where it moves to the target. Finally kills the VMM that has the guest.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn kill_others(kind: Kind) -> Result<()> {
    let mut fixture = Fixture::new(kind, 1, Faults::default())?;
    for party in [Party::TargetVmm, Party::TargetBackend, Party::SourceBackend] {
        points(party).filter(|point| rolls_back(*point)).try_for_each(|point| fixture.kill(point))?;
    }
    for party in [Party::SourceBackend, Party::TargetBackend, Party::SourceVmm] {
        points(party).filter(|point| !rolls_back(*point)).try_for_each(|point| fixture.kill(point))?;
    }
    fixture.kill_guest(Point::TargetVmmTaken)
}

/// Kills the VMM that has the guest, at each of its fault points. Boots a new guest for each.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn kill_guests(kind: Kind) -> Result<()> {
    for point in points(Party::SourceVmm).filter(|point| rolls_back(*point)) {
        Fixture::new(kind, 1, Faults::at(point, Action::Kill))?.kill_guest(point)?;
    }
    Fixture::new(kind, 1, Faults::default())?.kill_guest(Point::TargetVmmResumed)
}

/// The phase and the start of the reason that the source reports.
fn reported(point: Point) -> (&'static str, &'static str) {
    match point {
        Point::TargetVmmConnected | Point::TargetVmmGreeted => ("hello", "the target closed"),
        Point::TargetVmmPrepared => ("prepare", "the target closed"),
        Point::TargetVmmCommitting => ("commit", "the target closed"),
        Point::TargetBackendLoading => ("prepare", "the target refuses: tap: "),
        _ if point.party() == Party::TargetVmm => ("restore", "the target closed"),
        _ if point.party() == Party::TargetBackend => ("restore", "the target refuses: target: "),
        _ => ("stop", "back-end at "),
    }
}

impl Fixture {
    /// Kills the process that reaches the point, which is not the VMM that has the guest.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn kill(&mut self, point: Point) -> Result<()> {
        self.case(point, Action::Kill, |fixture, target| {
            if rolls_back(point) {
                fixture.kill_and_stay(point, target)
            } else {
                fixture.kill_and_move(point, target)
            }
        })
    }

    fn kill_and_stay(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let (phase, reason) = self.attempt(target).end_rolled_back()?;
        let (expected, because) = reported(point);
        ensure!(phase == expected && reason.starts_with(because), "{phase}: {reason}");
        self.expect_killed(target, point)?;
        match point.party() {
            // The target cannot go on without the process; its VMM may have ended.
            Party::TargetVmm | Party::TargetBackend => check_no_tap(&target.stay)?,
            _ => {
                // The VM runs and tries to reconnect to a back-end.
                self.replace_backend(Faults::default())?;
                check_waits(target)?;
            }
        }
        self.check_network()?;
        self.check_held()
    }

    fn kill_and_move(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let attempt = self.attempt(target);
        if point.party() == Party::SourceVmm {
            ensure!(attempt.end().is_err(), "a killed VMM sent a report");
        } else {
            attempt.end_completed()?;
        }
        self.expect_killed(target, point)?;
        let source = self.exchange(target);
        if point.party() != Party::SourceVmm {
            quit_left(source)?;
        }
        if point.party() != Party::SourceBackend {
            // If the target's back-end did not take the TAP, the source's has it back and exits only on a signal.
            end_backend(source, point == Point::TargetBackendTaking)?;
        }
        if point.party() == Party::TargetBackend {
            self.replace_backend(Faults::default())?;
        }
        self.check_network()
    }

    /// The last case of a fixture: kills the VMM that has the guest. No other process runs the guest.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn kill_guest(mut self, point: Point) -> Result<()> {
        self.case(point, Action::Kill, |fixture, target| {
            let report = fixture.attempt(target).end();
            fixture.expect_killed(target, point)?;
            if is_source(point.party()) {
                ensure!(report.is_err(), "a killed VMM reported {report:?}");
                ensure!(!target.stay.guest.log().contains("took the VM"), "{}", target.stay.guest.log());
                check_waits(target)?;
                // A VMM that boots the guest again can use the TAP through the back-end that had it, or finds it free.
                return end_backend(&mut fixture.traveller.stay, true);
            }
            let source = &mut fixture.traveller.stay;
            ensure!(source.status()?.state == VmmState::Postmigrate, "{report:?}");
            let processes = [source.backend.process.pid(), target.stay.backend.process.pid()];
            until("one back-end had the TAP", || {
                let held = processes.map(|process| queues_held(process, target.stay.tap).unwrap_or(0) > 0);
                Ok(held[0] != held[1])
            })?;
            quit_left(source)?;
            end_backend(source, true)
        })
    }

    /// Checks that the process that reaches the point was killed there.
    fn expect_killed(&mut self, target: &mut Target, point: Point) -> Result<()> {
        let stay = if is_source(point.party()) { &mut self.traveller.stay } else { &mut target.stay };
        let status =
            if is_vmm(point.party()) { stay.guest.wait_end()? } else { stay.backend.process.wait()? };
        check_killed(status)?;
        self.check_reached(target, point, Action::Kill)
    }
}
