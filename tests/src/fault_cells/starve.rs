//! A process has no descriptor to spare.

use anyhow::{Result, bail};
use baton_protocol::control::MigrationReport;

use super::{Arena, Target, check_no_tap, check_waits, end_backend, is_vmm, quit_left, until};
use crate::faults::{Action, Point};
use crate::process::limit_descriptors;

impl Arena {
    /// The process that comes by the point gets no descriptor any more, until the attempt is over. Whether that matters
    /// depends on what is left to do: the VM has moved then, or it has not.
    ///
    /// # Errors
    /// If anything is not as it should be.
    pub fn starve(&mut self, point: Point) -> Result<()> {
        self.cell(point, Action::NoFile, |arena, target| {
            let report = arena.attempt(target).end()?;
            eprintln!("{}: {report:?}", point.name());
            // The back-ends may come by a little later.
            until(&format!("{} was reached", point.name()), || {
                Ok(arena.check_reached(target, point, Action::NoFile).is_ok())
            })?;
            arena.feed(target, point);
            match report {
                MigrationReport::Completed { .. } => {
                    let source = arena.exchange(target);
                    arena.check_network()?;
                    quit_left(source)?;
                    end_backend(source, false)?;
                    arena.check_network()
                }
                MigrationReport::RolledBack { .. } => {
                    arena.check_network()?;
                    if is_vmm(point.party()) && target.stay.status().is_err() {
                        // A target that could make no other place has ended.
                        check_no_tap(&target.stay)?;
                    } else {
                        check_waits(target)?;
                    }
                    arena.check_held()
                }
                other => bail!("{other:?}"),
            }
        })
    }

    /// Gives the process descriptors again.
    fn feed(&self, target: &Target, point: Point) {
        let (process, _) = self.process_at(target, point);
        // One that has ended needs none.
        let _ = u32::try_from(process.as_raw()).map(|process| limit_descriptors(process, None));
    }
}
