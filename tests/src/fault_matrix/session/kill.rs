//! Kills a process at a fault point.

use anyhow::{Result, ensure};

use super::{Case, Fate, Fixture, LOSSLESS, at_each, check_ends, everywhere, is_source};
use crate::datapath::Datapath;
use crate::fault_matrix::check_killed;
use crate::faults::{Action, Point};
use crate::load::{Demand, Outcome};

/// The most frames in a batch of a queue pair.
const BATCH: u64 = 64;

/// Kills each process at each of its fault points.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn kill_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    everywhere(datapath, queue_pairs, Fixture::kill)
}

/// Kills each process within a batch of frames, at each point where its rings run: the frames that it has moved and not
/// yet reported to the driver are lost, or sent twice.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn kill_in_batches(queue_pairs: u16) -> Result<()> {
    // With vhost-net the kernel moves the batches.
    let points = Point::ALL.iter().copied().filter(|point| rings_run(*point));
    at_each(points, Datapath::Userspace, queue_pairs, |fixture, point| {
        let received = fixture.kill_by(point, Action::Receiving, fate(point))?;
        ensure!(received.lost[0] > 0, "the process was not receiving: {received:?}");
        let sent = fixture.kill_by(point, Action::Sending, fate(point))?;
        ensure!(sent.doubled[1] > 0, "the process was not sending: {sent:?}");
        Ok(())
    })
}

/// The fate of a session whose descriptors fit in one packet.
fn fate(point: Point) -> Fate {
    match point {
        // The target has received nothing yet.
        Point::SourceSessionConnected | Point::SourceSessionGreeted | Point::SourceSessionReady => Fate::Lost,
        Point::SourceSessionStageSent
        | Point::SourceSessionStaged
        | Point::SourceSessionFrozen
        | Point::SourceSessionOffered => Fate::Inherited,
        Point::TargetSessionTaken | Point::TargetSessionRunning | Point::TargetSessionActiveSent => {
            Fate::Returns
        }
        // The dead target may have read messages from the front-end: no process knows the session's state any more.
        Point::TargetSessionSettled => Fate::Lost,
        _ if is_source(point) => Fate::Moves,
        _ => Fate::Stays,
    }
}

/// The phase that the source reports.
pub(super) fn phase(point: Point) -> &'static str {
    match point {
        Point::TargetSessionArrived => "greet",
        Point::TargetSessionJudged => "check",
        Point::TargetSessionGathering | Point::TargetSessionGathered | Point::TargetSessionStaged => "stage",
        _ => "commit",
    }
}

/// Whether the rings run in the process that reaches this point. Its successor knows only what the rings say.
fn rings_run(point: Point) -> bool {
    matches!(
        point,
        Point::SourceSessionStageSent
            | Point::SourceSessionStaged
            | Point::TargetSessionRunning
            | Point::TargetSessionActiveSent
    )
}

impl Fixture {
    /// Kills the process that reaches the point.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn kill(&mut self, point: Point) -> Result<()> {
        self.kill_by(point, Action::Kill, fate(point)).map(drop)
    }

    /// Kills the process that reaches the point, in a session that has this fate because it takes more than one packet.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn kill_for(&mut self, point: Point, fate: Fate) -> Result<()> {
        self.kill_by(point, Action::Kill, fate).map(drop)
    }

    fn kill_by(&mut self, point: Point, action: Action, fate: Fate) -> Result<Outcome> {
        let batch = BATCH * u64::from(self.options.queue_pairs);
        let demand = match fate {
            // No frame arrives while no process serves.
            Fate::Lost => Demand { rate: 0, ..LOSSLESS },
            _ if rings_run(point) => Demand { may_lose: batch, may_double: batch, ..LOSSLESS },
            _ => LOSSLESS,
        };
        self.case(point, action, 1, demand, |case| {
            let attempt = case.attempt();
            match fate {
                _ if is_source(point) => {
                    let report = attempt.end();
                    ensure!(report.is_err(), "a killed back-end reported {report:?}");
                }
                Fate::Stays => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    // The kernel closes the target's descriptors before the process counts as dead, and closing those
                    // of vhost-net may take longer than the commit timeout.
                    let mut gone = vec!["the target died", "the target closed the connection"];
                    gone.extend((at == "commit").then_some("the target does not answer"));
                    ensure!(at == phase(point) && gone.contains(&reason.as_str()), "{at}: {reason}");
                }
                Fate::Returns => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    ensure!(at == "commit" && reason.ends_with("took it back"), "{at}: {reason}");
                }
                _ => {
                    attempt.end_completed()?;
                    check_ends(&mut case.source.process)?;
                }
            }
            case.expect_killed()?;
            if matches!(fate, Fate::Moves | Fate::Inherited) {
                case.target.wait_serving()?;
            }
            Ok(fate)
        })
    }
}

impl Case<'_> {
    fn expect_killed(&mut self) -> Result<()> {
        self.check_reached()?;
        check_killed(self.faulty().wait()?)
    }
}
