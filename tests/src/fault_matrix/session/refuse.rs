//! Makes a step of the hand-over fail.

use anyhow::{Result, ensure};

use super::{Fate, Fixture, LOSSLESS};
use crate::datapath::Datapath;
use crate::faults::{Action, Point};

/// The points where a step can fail, and the start of the source's report.
const FAILURES: [(Point, &str); 5] = [
    (Point::SourceSessionConnected, "cannot begin a hand-over: fault point"),
    (Point::TargetSessionArrived, "greet: the target refuses: unusable: "),
    (Point::SourceSessionReady, "stage: source: the source cannot hand over the session: fault point"),
    (Point::TargetSessionGathered, "stage: the target refuses: unusable: "),
    (Point::SourceSessionFrozen, "freeze: source: the source cannot hand over the rings: fault point"),
];

/// Makes each step fail once.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn refuse_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut fixture = Fixture::new(datapath, queue_pairs, 256)?;
    FAILURES.iter().try_for_each(|(point, said)| fixture.refuse(*point, said))?;
    fixture.end()
}

impl Fixture {
    fn refuse(&mut self, point: Point, expected: &str) -> Result<()> {
        self.case(point, Action::Fail, 1, LOSSLESS, |case| {
            let said = case.attempt().end_refused()?;
            ensure!(said.starts_with(expected), "{said}");
            case.check_reached()?;
            Ok(Fate::Stays)
        })?;
        Ok(())
    }
}
