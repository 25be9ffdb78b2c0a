//! A process fails.

use anyhow::{Result, ensure};

use super::{Arena, Fate, WHOLE};
use crate::datapath::Datapath;
use crate::faults::{Action, Point};

/// Where something can fail, and what is said then.
const FAILURES: [(Point, &str); 5] = [
    (Point::SourceSessionConnected, "cannot begin a hand-over: fault point"),
    (Point::TargetSessionArrived, "greet: the target refuses: unusable: "),
    (Point::SourceSessionReady, "stage: source: the source cannot give the session: fault point"),
    (Point::TargetSessionGathered, "stage: the target refuses: unusable: "),
    (Point::SourceSessionFrozen, "freeze: source: the source cannot give the rings: fault point"),
];

/// Whatever can fail does, one after the other.
///
/// # Errors
/// If anything is not as it should be.
pub fn refuse_everywhere(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut arena = Arena::new(datapath, queue_pairs, 256)?;
    FAILURES.iter().try_for_each(|(point, said)| arena.refuse(*point, said))?;
    arena.end()
}

impl Arena {
    fn refuse(&mut self, point: Point, expected: &str) -> Result<()> {
        self.cell(point, Action::Fail, 1, WHOLE, |scene| {
            let said = scene.attempt().end_refused()?;
            ensure!(said.starts_with(expected), "{said}");
            scene.check_reached()?;
            Ok(Fate::Stays)
        })?;
        Ok(())
    }
}
