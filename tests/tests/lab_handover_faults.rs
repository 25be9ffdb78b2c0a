//! With the kernel's datapath, too, there is one back-end that serves, whoever of a session's hand-over dies or hangs.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::faults::Point;
use baton_tests::lab;
use baton_tests::session_cells::Arena;

/// At the turns of a hand-over; `make soak` has all of it.
#[test]
fn the_kernel_works_for_whoever_serves() -> Result<()> {
    lab::run(|| {
        let mut arena = Arena::new(Datapath::VhostNet, 2, 256)?;
        for point in [
            Point::TargetSessionStaged,
            Point::TargetSessionTaking,
            Point::TargetSessionTaken,
            Point::TargetSessionRunning,
            Point::SourceSessionStaged,
            Point::SourceSessionOffered,
            Point::SourceSessionCommitSent,
        ] {
            arena.kill(point)?;
        }
        arena.hang(Point::SourceSessionOffered)?;
        arena.hang(Point::TargetSessionRunning)?;
        arena.starve(Point::TargetSessionGathered)?;
        arena.end()
    })
}
