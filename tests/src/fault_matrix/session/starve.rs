//! Makes a process run out of descriptors.

use anyhow::{Result, ensure};

use super::{Fate, Fixture, LOSSLESS, everywhere, is_source};
use crate::datapath::Datapath;
use crate::faults::{Action, Point};
use crate::process::limit_descriptors;

/// Makes each process run out of descriptors at each of its fault points.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn starve_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    everywhere(datapath, queue_pairs, Fixture::starve)
}

/// The refusal, if the process needs a descriptor after this point.
fn refusal(point: Point) -> Option<&'static str> {
    Some(match point {
        Point::SourceSessionConnected => "cannot begin a hand-over: Too many open files",
        Point::SourceSessionGreeted | Point::SourceSessionReady => {
            "stage: source: the source cannot hand over the session: cannot set up the ownership word: Too many"
        }
        Point::TargetSessionArrived => {
            "greet: the target refuses: unusable: the target cannot use the source: "
        }
        Point::TargetSessionJudged | Point::TargetSessionGathering => {
            "stage: the target refuses: unusable: the target cannot use a message: cannot receive all descriptors"
        }
        Point::TargetSessionGathered => "stage: the target refuses: unusable: the target cannot use ",
        _ => return None,
    })
}

impl Fixture {
    /// Prevents the process that reaches the point from opening descriptors until the attempt ends. The session moves
    /// if the rest of the attempt needs none.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn starve(&mut self, point: Point) -> Result<()> {
        self.case(point, Action::NoFile, 1, LOSSLESS, |case| {
            let attempt = case.attempt();
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
            case.check_reached()?;
            // A source that has handed over the session exits by itself.
            if fate == Fate::Stays || !is_source(point) {
                limit_descriptors(case.faulty().pid(), None)?;
            }
            Ok(fate)
        })?;
        Ok(())
    }
}
