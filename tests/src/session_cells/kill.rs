//! A process is killed.

use std::os::unix::process::ExitStatusExt;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{Arena, Fate, Scene, WHOLE, check_ends, is_source, points};
use crate::datapath::Datapath;
use crate::faults::{Action, Party, Point};
use crate::load::{Demand, Outcome};

/// The most frames that a queue pair takes at once.
const BATCH: u64 = 64;

/// Each process is killed at each point.
///
/// # Errors
/// If anything is not as it should be.
pub fn kill_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut arena = Arena::new(datapath, queue_pairs, 256)?;
    for party in [Party::TargetSession, Party::SourceSession] {
        points(party).try_for_each(|point| arena.kill(point))?;
    }
    arena.end()
}

/// Each process is killed while its rings run, in the middle of a batch of frames.
///
/// # Errors
/// If anything is not as it should be.
pub fn kill_in_batches(queue_pairs: u16) -> Result<()> {
    // The kernel's batches are its own.
    let mut arena = Arena::new(Datapath::Userspace, queue_pairs, 256)?;
    arena.kill_at_work()?;
    arena.end()
}

/// What becomes of a session whose descriptors go in one packet.
fn fate(point: Point) -> Fate {
    match point {
        // The target has nothing yet.
        Point::SourceSessionConnected | Point::SourceSessionGreeted | Point::SourceSessionReady => Fate::Lost,
        Point::SourceSessionStageSent
        | Point::SourceSessionStaged
        | Point::SourceSessionFrozen
        | Point::SourceSessionOffered => Fate::Inherited,
        Point::TargetSessionTaken | Point::TargetSessionRunning | Point::TargetSessionActiveSent => {
            Fate::Returns
        }
        // The front-end may have been heard by one that is dead: nobody knows its session any more.
        Point::TargetSessionSettled => Fate::Lost,
        _ if is_source(point) => Fate::Moves,
        _ => Fate::Stays,
    }
}

/// How far the source says that it was.
pub(super) fn phase(point: Point) -> &'static str {
    match point {
        Point::TargetSessionArrived => "greet",
        Point::TargetSessionJudged => "check",
        Point::TargetSessionGathering | Point::TargetSessionGathered | Point::TargetSessionStaged => "stage",
        _ => "commit",
    }
}

/// Whether rings run in the process that is killed, whose successor knows of them only what the rings say.
fn works(point: Point) -> bool {
    matches!(
        point,
        Point::SourceSessionStageSent
            | Point::SourceSessionStaged
            | Point::TargetSessionRunning
            | Point::TargetSessionActiveSent
    )
}

impl Arena {
    /// The process that comes by the point is killed there.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn kill(&mut self, point: Point) -> Result<()> {
        self.kill_by(point, Action::Kill, fate(point)).map(drop)
    }

    /// Likewise, where that leads to something else.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn kill_for(&mut self, point: Point, fate: Fate) -> Result<()> {
        self.kill_by(point, Action::Kill, fate).map(drop)
    }

    /// Wherever rings run in the process that is killed, it is while it moves frames: what it had moved and not told of
    /// is lost, or goes out twice.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn kill_at_work(&mut self) -> Result<()> {
        for point in Point::ALL.iter().copied().filter(|point| works(*point)) {
            let received = self.kill_by(point, Action::Receiving, fate(point))?;
            ensure!(received.lost[0] > 0, "it was not receiving: {received:?}");
            let sent = self.kill_by(point, Action::Sending, fate(point))?;
            ensure!(sent.doubled[1] > 0, "it was not sending: {sent:?}");
        }
        Ok(())
    }

    fn kill_by(&mut self, point: Point, action: Action, fate: Fate) -> Result<Outcome> {
        let batch = BATCH * u64::from(self.options.queue_pairs);
        let demand = match fate {
            // Of what nobody serves nothing arrives.
            Fate::Lost => Demand { rate: 0, ..WHOLE },
            _ if works(point) => Demand { may_lose: batch, may_double: batch, ..WHOLE },
            _ => WHOLE,
        };
        self.cell(point, action, 1, demand, |scene| {
            let attempt = scene.attempt();
            match fate {
                _ if is_source(point) => {
                    let report = attempt.end();
                    ensure!(report.is_err(), "a back-end that was killed has reported {report:?}");
                }
                Fate::Stays => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    // Its descriptors are closed before it is dead; and closing the kernel's may take longer than nobody
                    // may serve.
                    let mut gone = vec!["the target died", "the target closed the connection"];
                    gone.extend((at == "commit").then_some("the target does not answer"));
                    ensure!(at == phase(point) && gone.contains(&reason.as_str()), "{at}: {reason}");
                }
                Fate::Returns => {
                    let (at, reason) = attempt.end_rolled_back()?;
                    ensure!(at == "commit" && reason.ends_with("has taken it back"), "{at}: {reason}");
                }
                _ => {
                    attempt.end_completed()?;
                    check_ends(&mut scene.source.process)?;
                }
            }
            scene.expect_killed()?;
            if matches!(fate, Fate::Moves | Fate::Inherited) {
                scene.target.wait_serving()?;
            }
            Ok(fate)
        })
    }
}

impl Scene<'_> {
    fn expect_killed(&mut self) -> Result<()> {
        self.check_reached()?;
        let status = self.faulty().wait()?;
        ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status}");
        Ok(())
    }
}
