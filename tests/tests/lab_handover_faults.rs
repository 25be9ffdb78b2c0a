//! Faults in either back-end of a session's hand-over with the kernel's datapath: it dies, hangs or runs out of
//! descriptors, and one back-end serves afterwards.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::fault_matrix::session::Fixture;
use baton_tests::faults::Point;
use baton_tests::lab;

/// Only the points around the change of owner. `make soak` covers all points.
#[test]
fn session_on_vhost_net_survives_faults() -> Result<()> {
    lab::run(|| {
        let mut fixture = Fixture::new(Datapath::VhostNet, 2, 256)?;
        for point in [
            Point::TargetSessionStaged,
            Point::TargetSessionTaking,
            Point::TargetSessionTaken,
            Point::TargetSessionRunning,
            Point::SourceSessionStaged,
            Point::SourceSessionOffered,
            Point::SourceSessionCommitSent,
        ] {
            fixture.kill(point)?;
        }
        fixture.hang(Point::SourceSessionOffered)?;
        fixture.hang(Point::TargetSessionRunning)?;
        fixture.starve(Point::TargetSessionGathered)?;
        fixture.end()
    })
}
