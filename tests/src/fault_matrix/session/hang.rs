//! Stops a process and continues it later.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::kill::phase;
use super::{Case, Fate, Fixture, LOSSLESS, at_each, check_ends, everywhere, is_source, points};
use crate::backend::TAP;
use crate::datapath::Datapath;
use crate::fault_matrix::hangs_at;
use crate::faults::{Action, Party, Point};
use crate::load::Demand;
use crate::netns;
use crate::process::{is_stopped, until};

/// The divisor of the timeouts of the process that does not hang. It must leave the other process enough time.
const HURRY: u32 = 8;

/// Stops each process at each of its fault points.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn hang_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    everywhere(datapath, queue_pairs, Fixture::hang)
}

/// Stops the source at each of its fault points before the commit, until the target gives up the attempt.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn oversleep_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let points = points(Party::SourceSession).filter(|point| is_before_commit(*point));
    at_each(points, datapath, queue_pairs, Fixture::oversleep)
}

/// Whether the target cannot own the session yet, as long as both processes live.
fn is_before_commit(point: Point) -> bool {
    !matches!(
        point,
        Point::SourceSessionCommitSent
            | Point::SourceSessionHandedOver
            | Point::SourceSessionReleased
            | Point::TargetSessionTaken
            | Point::TargetSessionRunning
            | Point::TargetSessionSettled
            | Point::TargetSessionActiveSent
    )
}

impl Case<'_> {
    /// Waits until the process is stopped at the point.
    fn wait_hanging(&mut self) -> Result<()> {
        let point = self.point;
        self.faulty().wait_until("it hung", |process| {
            Ok(hangs_at(point, process.pid(), &process.log())?.then_some(()))
        })
    }

    /// Continues the process, which must still be stopped.
    fn wake(&mut self) -> Result<()> {
        ensure!(is_stopped(self.faulty().pid())?, "the process is not stopped any more");
        self.faulty().signal(Signal::SIGCONT)
    }

    /// Checks that the target has not taken the session from the source.
    fn check_not_taken(&mut self) -> Result<()> {
        let status = self.target.backend.status()?;
        ensure!(status.tap.is_empty(), "the target has the session: {status:?}");
        Ok(())
    }
}

impl Fixture {
    /// Stops the process that reaches the point. Continues a target after the source has given it up, if the source can
    /// do so at this point; continues a source while the target still waits for it.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn hang(&mut self, point: Point) -> Result<()> {
        // A source must not give up a target that takes the session.
        let hurry = if is_source(point) || !is_before_commit(point) { 1 } else { HURRY };
        self.case(point, Action::Stop, hurry, LOSSLESS, |case| {
            let attempt = case.attempt();
            case.wait_hanging()?;
            match (is_source(point), is_before_commit(point)) {
                (true, true) => {
                    case.check_not_taken()?;
                    case.wake()?;
                    attempt.end_completed()?;
                    Ok(Fate::Moves)
                }
                (true, false) => {
                    case.target.wait_serving()?;
                    case.wake()?;
                    attempt.end_completed()?;
                    Ok(Fate::Moves)
                }
                (false, true) => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    ensure!(at == phase(point) && reason == "the target does not answer", "{at}: {reason}");
                    case.wake()?;
                    Ok(Fate::Stays)
                }
                (false, false) => {
                    match point {
                        Point::TargetSessionTaken | Point::TargetSessionRunning => {
                            case.source.process.wait_until("it had given the session up", |process| {
                                Ok(process.log().contains("it keeps the session until it dies").then_some(()))
                            })?;
                            case.wake()?;
                            attempt.end_completed()?;
                        }
                        // The source needs nothing more from the target.
                        Point::TargetSessionSettled => {
                            attempt.end_completed()?;
                            check_ends(&mut case.source.process)?;
                            case.wake()?;
                        }
                        // The source waits until the ownership word is settled.
                        _ => {
                            case.wake()?;
                            attempt.end_completed()?;
                        }
                    }
                    Ok(Fate::Moves)
                }
            }
        })?;
        Ok(())
    }

    /// Stops the source at the point until the target has given up the attempt.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn oversleep(&mut self, point: Point) -> Result<()> {
        self.case(point, Action::Stop, HURRY, LOSSLESS, |case| {
            let attempt = case.attempt();
            case.wait_hanging()?;
            case.target.check_waits()?;
            case.wake()?;
            let reason = match point {
                // Before Linux 6.5 the kernel cannot tell which process is connected, so the hand-over does not begin.
                Point::SourceSessionConnected => attempt.end_refused()?,
                _ => attempt.end_rolled_back()?.1,
            };
            ensure!(reason.ends_with("the target closed the connection"), "{reason}");
            Ok(Fate::Stays)
        })?;
        Ok(())
    }

    /// Stops the source at the point while more frames arrive than the TAP can queue. Only the frames that the TAP
    /// drops are lost.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn overflow(&mut self, point: Point) -> Result<()> {
        let before = self.dropped;
        let demand = Demand { in_flight: [u64::MAX, LOSSLESS.in_flight[1]], may_lose: u64::MAX, ..LOSSLESS };
        let outcome = self.case(point, Action::Stop, 1, demand, |case| {
            let attempt = case.attempt();
            case.wait_hanging()?;
            until("the TAP was full", || Ok(netns::counters(TAP)?.tx_dropped > before))?;
            case.wake()?;
            attempt.end_completed()?;
            Ok(Fate::Moves)
        })?;
        let dropped = self.dropped - before;
        ensure!(dropped > 0 && outcome.lost == [dropped, 0], "the TAP dropped {dropped}: {outcome:?}");
        Ok(())
    }
}
