//! A process is killed.

use std::os::unix::process::ExitStatusExt;

use anyhow::{Result, ensure};
use baton_protocol::control::VmmState;
use nix::sys::signal::Signal;

use super::{
    Arena, Target, check_no_tap, check_waits, end_backend, is_source, is_vmm, points, queues_held, quit_left,
    stays, until, waits,
};
use crate::faults::{Action, Faults, Party, Point};
use crate::local_migration::Kind;

/// Each process but the VMM that has the guest is killed, at each point: while the guest is to stay, and one guest does;
/// then while it is to move, and it moves on from place to place. At last it dies with its VMM.
///
/// # Errors
/// If anything is not as it should be.
pub fn kill_others(kind: Kind) -> Result<()> {
    let mut arena = Arena::new(kind, 1, Faults::default())?;
    for party in [Party::TargetVmm, Party::TargetBackend, Party::SourceBackend] {
        points(party, true).try_for_each(|point| arena.kill(point))?;
    }
    for party in [Party::SourceBackend, Party::TargetBackend, Party::SourceVmm] {
        points(party, false).try_for_each(|point| arena.kill(point))?;
    }
    arena.kill_guest(Point::TargetVmmTaken)
}

/// The VMM that has the guest is killed at each point, each time with a guest of its own.
///
/// # Errors
/// If anything is not as it should be.
pub fn kill_guests(kind: Kind) -> Result<()> {
    for point in points(Party::SourceVmm, true) {
        Arena::new(kind, 1, Faults::at(point, Action::Kill))?.kill_guest(point)?;
    }
    Arena::new(kind, 1, Faults::default())?.kill_guest(Point::TargetVmmResumed)
}

/// How the source reports it.
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

impl Arena {
    /// The process that comes by the point is killed there, and it is not the one that has the guest.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn kill(&mut self, point: Point) -> Result<()> {
        self.cell(point, Action::Kill, |arena, target| {
            if stays(point) { arena.kill_and_stay(point, target) } else { arena.kill_and_move(point, target) }
        })
    }

    fn kill_and_stay(&mut self, point: Point, target: &mut Target) -> Result<()> {
        let (phase, reason) = self.attempt(target).end_rolled_back()?;
        let (expected, because) = reported(point);
        ensure!(phase == expected && reason.starts_with(because), "{phase}: {reason}");
        self.expect_killed(target, point)?;
        match point.party() {
            // Which cannot go on without it; its VMM may have ended for that.
            Party::TargetVmm | Party::TargetBackend => check_no_tap(&target.stay)?,
            _ => {
                // The VM runs, and looks for its back-end.
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
            ensure!(attempt.end().is_err(), "a VMM that was killed has reported something");
        } else {
            attempt.end_completed()?;
        }
        self.expect_killed(target, point)?;
        let source = self.exchange(target);
        if point.party() != Party::SourceVmm {
            quit_left(source)?;
        }
        if point.party() != Party::SourceBackend {
            // Where the target's has not taken the TAP, the source's has it back, and is told to let it go.
            end_backend(source, point == Point::TargetBackendTaking)?;
        }
        if point.party() == Party::TargetBackend {
            self.replace_backend(Faults::default())?;
        }
        self.check_network()
    }

    /// The last cell of an arena: the VMM that has the guest is killed, and the guest with it. Nobody else runs it.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn kill_guest(mut self, point: Point) -> Result<()> {
        self.cell(point, Action::Kill, |arena, target| {
            let report = arena.attempt(target).end();
            arena.expect_killed(target, point)?;
            if is_source(point.party()) {
                ensure!(report.is_err(), "a VMM that was killed has reported {report:?}");
                ensure!(!target.stay.guest.log().contains("the VM is taken"), "{}", target.stay.guest.log());
                // Both back-ends lose their front-ends at the same time. A source that ends first leaves its TAP to the
                // target, which then keeps it to clean up.
                let source = &mut arena.traveller.stay;
                let heir = target.stay.backend.process.pid();
                until("the target had let the TAP go, or inherited it", || {
                    let inherited =
                        queues_held(heir, target.stay.tap)? > 0 && !source.backend.process.is_running()?;
                    Ok(inherited || waits(target)?)
                })?;
                if queues_held(heir, target.stay.tap)? == 0 {
                    check_waits(target)?;
                }
                return end_backend(source, true);
            }
            let source = &mut arena.traveller.stay;
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

    /// The process that comes by the point was killed there.
    fn expect_killed(&mut self, target: &mut Target, point: Point) -> Result<()> {
        let stay = if is_source(point.party()) { &mut self.traveller.stay } else { &mut target.stay };
        let status =
            if is_vmm(point.party()) { stay.guest.wait_end()? } else { stay.backend.process.wait()? };
        let killed = status.signal() == Some(Signal::SIGKILL as i32);
        ensure!(killed, "{} ended with {status}", point.name());
        self.check_reached(target, point, Action::Kill)
    }
}
