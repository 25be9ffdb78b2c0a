//! Makes each step that can fail do so, one after the other, in the same processes.

use anyhow::{Context, Result, ensure};
use baton_protocol::control::VmmState;

use super::{Fixture, Target, check_waits};
use crate::faults::{Action, Faults, Party, Point};
use crate::local_migration::Kind;

/// The points where a step can fail, in the order of an attempt, and the start of the source's report.
const FAILURES: [(Point, &str); 19] = [
    (Point::SourceVmmConnected, "hello: "),
    (Point::TargetVmmConnected, "hello: the target closed"),
    (Point::TargetVmmGreeted, "hello: the target refuses: target: "),
    (Point::SourceVmmGreeted, "hello: "),
    (Point::TargetBackendLoading, "prepare: the target refuses: tap: "),
    (Point::TargetVmmPrepared, "prepare: the target refuses: target: "),
    (Point::SourceVmmPrepared, "prepare: "),
    (Point::SourceVmmVcpusStopped, "stop: "),
    (Point::SourceVmmRingsStopped, "stop: "),
    (Point::SourceBackendSaving, "stop: back-end at "),
    (Point::SourceBackendOffered, "stop: back-end at "),
    (Point::SourceVmmDevicesOffered, "stop: "),
    (Point::SourceVmmSaved, "stop: "),
    (Point::SourceVmmStateSent, "stop: "),
    (Point::TargetVmmStateReceived, "restore: the target refuses: target: "),
    (Point::TargetVmmDevicesAdopted, "restore: the target refuses: target: "),
    (Point::TargetVmmRestored, "restore: the target refuses: target: "),
    (Point::SourceVmmReady, "restore: "),
    (Point::SourceVmmOffered, "commit: "),
];

/// Makes each step fail once, then lets the guest move.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn refuse_everywhere(kind: Kind) -> Result<()> {
    let last = (Point::TargetVmmCommitting, "commit: the target closed");
    let failures: Vec<_> = FAILURES.into_iter().chain([last]).collect();
    // The offer has a separate case, because any attempt that ends after it was sent may deliver it to the target's
    // back-end.
    let offer = Point::TargetBackendOfferReceived;
    let sessions = [Party::SourceSession, Party::TargetSession];
    let of_migrations = |point: &&Point| !sessions.contains(&point.party());
    let could = Point::ALL.iter().filter(of_migrations).filter(|point| point.fails()).count();
    ensure!(
        failures.len() + 1 == could,
        "the list has {} points and the offer, but {could} points can fail",
        failures.len()
    );
    // The target reaches some of its points again: when the source fails after it connected or sent the state, and
    // twice at the end.
    let again = [
        Point::TargetVmmConnected,
        Point::TargetVmmStateReceived,
        Point::TargetVmmCommitting,
        Point::TargetVmmCommitting,
    ];
    let faults = || Faults::at_each(failures.iter().map(|(point, _)| *point).chain(again), Action::Fail);
    let mut fixture = Fixture::new(kind, 1, faults())?;
    let mut target = fixture.place(faults())?;
    let mut other = fixture.place(Faults::at(offer, Action::Fail))?;
    let mut fails = |target: &mut Target, point, expected: &str| {
        let mut case = || {
            let (phase, reason) = fixture.attempt(target).end_rolled_back()?;
            let text = format!("{phase}: {reason}");
            ensure!(text.starts_with(expected), "{text}");
            fixture.check_reached(target, point, Action::Fail)?;
            fixture.check_network()?;
            check_waits(target)?;
            fixture.check_held()
        };
        let result = case();
        result.with_context(|| format!("{}\n{}", point.name(), fixture.traveller.evidence()))
    };
    for (point, expected) in failures {
        fails(&mut target, point, expected)?;
    }
    fails(&mut other, offer, "restore: the target refuses: target: ")?;
    drop(other);
    // No fault is left.
    fixture.attempt(&target).end_completed()?;
    fixture.traveller.settle(target.stay)?;
    ensure!(fixture.traveller.stay.status()?.state == VmmState::Running);
    fixture.check_network()?;
    fixture.end()
}
