//! A process has no descriptor to spare.

use anyhow::{Result, ensure};

use super::{Arena, Fate, WHOLE, is_source, points};
use crate::datapath::Datapath;
use crate::faults::{Action, Party, Point};
use crate::process::limit_descriptors;

/// Each process runs out of descriptors at each point.
///
/// # Errors
/// If anything is not as it should be.
pub fn starve_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut arena = Arena::new(datapath, queue_pairs, 256)?;
    for party in [Party::TargetSession, Party::SourceSession] {
        points(party).try_for_each(|point| arena.starve(point))?;
    }
    arena.end()
}

/// What is said where a descriptor is still needed after this point.
fn refusal(point: Point) -> Option<&'static str> {
    Some(match point {
        Point::SourceSessionConnected => "cannot begin a hand-over: Too many open files",
        Point::SourceSessionGreeted | Point::SourceSessionReady => {
            "stage: source: the source cannot give the session: cannot set up the ownership word: Too many"
        }
        Point::TargetSessionArrived => {
            "greet: the target refuses: unusable: the target cannot use the source: "
        }
        Point::TargetSessionJudged | Point::TargetSessionGathering => {
            "stage: the target refuses: unusable: the target cannot use a message: not all descriptors"
        }
        Point::TargetSessionGathered => "stage: the target refuses: unusable: the target cannot use ",
        _ => return None,
    })
}

impl Arena {
    /// The process that comes by the point gets no descriptor any more, until the attempt is over. Where none is needed
    /// after that, the session moves.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn starve(&mut self, point: Point) -> Result<()> {
        self.cell(point, Action::NoFile, 1, WHOLE, |scene| {
            let attempt = scene.attempt();
            let fate = match refusal(point) {
                Some(expected) => {
                    let said = attempt.end_refused()?;
                    ensure!(said.starts_with(expected), "{said}");
                    Fate::Stays
                }
                None => {
                    attempt.end_completed()?;
                    Fate::Moves
                }
            };
            scene.check_reached()?;
            // A source from which it has moved ends.
            if fate == Fate::Stays || !is_source(point) {
                limit_descriptors(scene.faulty().pid(), None)?;
            }
            Ok(fate)
        })?;
        Ok(())
    }
}
