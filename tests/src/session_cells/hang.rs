//! A process hangs, and later goes on.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::kill::phase;
use super::{Arena, Fate, Scene, WHOLE, check_ends, is_source, points, until};
use crate::backend::TAP;
use crate::datapath::Datapath;
use crate::faults::{Action, Party, Point, has_reached};
use crate::load::Demand;
use crate::netns;
use crate::process::is_stopped;

/// How much shorter than usual it is waited for who hangs. Who does not must have its time, too.
const HURRY: u32 = 8;

/// Each process hangs at each point.
///
/// # Errors
/// If anything is not as it should be.
pub fn hang_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut arena = Arena::new(datapath, queue_pairs, 256)?;
    for party in [Party::TargetSession, Party::SourceSession] {
        points(party).try_for_each(|point| arena.hang(point))?;
    }
    arena.end()
}

/// A source hangs until it is given up, wherever it has not committed its session.
///
/// # Errors
/// If anything is not as it should be.
pub fn oversleep_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut arena = Arena::new(datapath, queue_pairs, 256)?;
    points(Party::SourceSession)
        .filter(|point| is_before(*point))
        .try_for_each(|point| arena.oversleep(point))?;
    arena.end()
}

/// Whether the word cannot be the target's yet while both live.
fn is_before(point: Point) -> bool {
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

impl Scene<'_> {
    /// Waits until the process hangs.
    fn wait_hanging(&mut self) -> Result<()> {
        let (point, action) = (self.point, self.action);
        self.faulty().wait_until("it hung", |process| {
            Ok((has_reached(&process.log(), point, action) && is_stopped(process.pid())?).then_some(()))
        })
    }

    /// It goes on.
    fn wake(&mut self) -> Result<()> {
        ensure!(is_stopped(self.faulty().pid())?, "it goes on by itself");
        self.faulty().signal(Signal::SIGCONT)
    }

    /// Nobody has taken the session from a source that hangs.
    fn check_not_taken(&mut self) -> Result<()> {
        let status = self.target.backend.status()?;
        ensure!(status.tap.is_empty(), "the target has the session: {status:?}");
        Ok(())
    }
}

impl Arena {
    /// The process that comes by the point stops there. A target is given up, if it can be, and goes on then. A source
    /// goes on while the target still waits for it.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn hang(&mut self, point: Point) -> Result<()> {
        // A source that waits for a target which takes it must not give up before that.
        let hurry = if is_source(point) || !is_before(point) { 1 } else { HURRY };
        self.cell(point, Action::Stop, hurry, WHOLE, |scene| {
            let attempt = scene.attempt();
            scene.wait_hanging()?;
            match (is_source(point), is_before(point)) {
                (true, true) => {
                    scene.check_not_taken()?;
                    scene.wake()?;
                    attempt.end_completed()?;
                    Ok(Fate::Moves)
                }
                (true, false) => {
                    // Whatever the source does.
                    scene.target.wait_serving()?;
                    scene.wake()?;
                    attempt.end_completed()?;
                    Ok(Fate::Moves)
                }
                (false, true) => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    ensure!(at == phase(point) && reason == "the target does not answer", "{at}: {reason}");
                    scene.wake()?;
                    Ok(Fate::Stays)
                }
                (false, false) => {
                    match point {
                        Point::TargetSessionTaken | Point::TargetSessionRunning => {
                            scene.source.process.wait_until("it had given the session up", |process| {
                                Ok(process.log().contains("it has it while it lives").then_some(()))
                            })?;
                            scene.wake()?;
                            attempt.end_completed()?;
                        }
                        // The source needs no more of the target's to go.
                        Point::TargetSessionSettled => {
                            attempt.end_completed()?;
                            check_ends(&mut scene.source.process)?;
                            scene.wake()?;
                        }
                        // It was told, and waits for the word to be settled.
                        _ => {
                            scene.wake()?;
                            attempt.end_completed()?;
                        }
                    }
                    Ok(Fate::Moves)
                }
            }
        })?;
        Ok(())
    }

    /// The source stops at the point until the target has given it up.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn oversleep(&mut self, point: Point) -> Result<()> {
        self.cell(point, Action::Stop, HURRY, WHOLE, |scene| {
            let attempt = scene.attempt();
            scene.wait_hanging()?;
            scene.target.check_waits()?;
            scene.wake()?;
            let reason = match point {
                // Where the kernel cannot say who was there (before Linux 6.5), it was not begun.
                Point::SourceSessionConnected => attempt.end_refused()?,
                _ => attempt.end_rolled_back()?.1,
            };
            ensure!(reason.ends_with("the target closed the connection"), "{reason}");
            Ok(Fate::Stays)
        })?;
        Ok(())
    }

    /// The source stops at the point, while more comes than the TAP has room for: nothing else is lost.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn overflow(&mut self, point: Point) -> Result<()> {
        let before = self.dropped;
        let demand = Demand { under_way: [u64::MAX, WHOLE.under_way[1]], may_lose: u64::MAX, ..WHOLE };
        let outcome = self.cell(point, Action::Stop, 1, demand, |scene| {
            let attempt = scene.attempt();
            scene.wait_hanging()?;
            until("the TAP was full", || Ok(netns::counters(TAP)?.tx_dropped > before))?;
            scene.wake()?;
            attempt.end_completed()?;
            Ok(Fate::Moves)
        })?;
        let dropped = self.dropped - before;
        ensure!(dropped > 0 && outcome.lost == [dropped, 0], "the TAP dropped {dropped}: {outcome:?}");
        Ok(())
    }
}
