//! Whatever can fail on the way fails, one after the other, in the same four processes.

use anyhow::{Context, Result, ensure};
use baton_protocol::control::VmmState;

use super::{Arena, Target, check_waits};
use crate::faults::{Action, Faults, Party, Point};
use crate::local_migration::Kind;

/// In the order in which an attempt comes by, with what the source reports.
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

/// All of these, and then nothing.
///
/// # Errors
/// If anything is not as it should be.
pub fn refuse_everywhere(kind: Kind) -> Result<()> {
    let last = (Point::TargetVmmCommitting, "commit: the target closed");
    let failures: Vec<_> = FAILURES.into_iter().chain([last]).collect();
    // The offer may come to the target's back-end in any attempt that ends after it was sent: it has a cell of its own.
    let offer = Point::TargetBackendOfferReceived;
    let sessions = [Party::SourceSession, Party::TargetSession];
    let of_migrations = |point: &&Point| !sessions.contains(&point.party());
    let could = Point::ALL.iter().filter(of_migrations).filter(|point| point.fails()).count();
    ensure!(failures.len() + 1 == could, "of {could} points these are only {}", failures.len());
    // The target comes by also where the source fails after it has connected, has sent the state, and twice at the end.
    let again = [
        Point::TargetVmmConnected,
        Point::TargetVmmStateReceived,
        Point::TargetVmmCommitting,
        Point::TargetVmmCommitting,
    ];
    let faults = || Faults::at_each(failures.iter().map(|(point, _)| *point).chain(again), Action::Fail);
    let mut arena = Arena::new(kind, 1, faults())?;
    let mut target = arena.place(faults())?;
    let mut other = arena.place(Faults::at(offer, Action::Fail))?;
    let mut fails = |target: &mut Target, point, expected: &str| {
        let mut cell = || {
            let (phase, reason) = arena.attempt(target).end_rolled_back()?;
            let text = format!("{phase}: {reason}");
            ensure!(text.starts_with(expected), "{text}");
            arena.check_reached(target, point, Action::Fail)?;
            arena.check_network()?;
            check_waits(target)?;
            arena.check_held()
        };
        let result = cell();
        result.with_context(|| format!("{}\n{}", point.name(), arena.traveller.evidence()))
    };
    for (point, expected) in failures {
        fails(&mut target, point, expected)?;
    }
    fails(&mut other, offer, "restore: the target refuses: target: ")?;
    drop(other);
    // All is spent.
    arena.attempt(&target).end_completed()?;
    arena.traveller.settle(target.stay)?;
    ensure!(arena.traveller.stay.status()?.state == VmmState::Running);
    arena.check_network()?;
    arena.end()
}
