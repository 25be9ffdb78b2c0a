//! Makes a process run out of descriptors.

use anyhow::{Result, bail};
use baton_protocol::control::MigrationReport;

use super::{Fixture, Target, check_no_tap, check_waits, end_backend, everywhere, is_vmm, quit_left};
use crate::faults::{Action, Point};
use crate::local_migration::Kind;
use crate::process::{limit_descriptors, until};

/// Makes each process run out of descriptors at each of its fault points.
///
/// # Errors
/// Returns an error if a process does not do what the matrix expects.
pub fn starve_everywhere(kind: Kind) -> Result<()> {
    everywhere(kind, Fixture::starve)
}

impl Fixture {
    /// Prevents the process that reaches the point from opening descriptors until the attempt ends. The VM moves if the
    /// rest of the attempt needs none.
    ///
    /// # Errors
    /// Returns an error if a process does not do what the matrix expects.
    pub fn starve(&mut self, point: Point) -> Result<()> {
        self.case(point, Action::NoFile, |fixture, target| {
            let report = fixture.attempt(target).end()?;
            eprintln!("{}: {report:?}", point.name());
            // The back-ends may reach the point a little later.
            until(&format!("{} was reached", point.name()), || {
                Ok(fixture.check_reached(target, point, Action::NoFile).is_ok())
            })?;
            fixture.restore_limit(target, point);
            match report {
                MigrationReport::Completed { .. } => {
                    let source = fixture.exchange(target);
                    fixture.check_network()?;
                    quit_left(source)?;
                    end_backend(source, false)?;
                    fixture.check_network()
                }
                MigrationReport::RolledBack { .. } => {
                    fixture.check_network()?;
                    if is_vmm(point.party()) && target.stay.status().is_err() {
                        // A target that could not prepare for another guest has ended.
                        check_no_tap(&target.stay)?;
                    } else {
                        check_waits(target)?;
                    }
                    fixture.check_held()
                }
                other => bail!("{other:?}"),
            }
        })
    }

    /// Allows the process to open descriptors again.
    fn restore_limit(&self, target: &Target, point: Point) {
        let (process, _) = self.process_at(target, point);
        // It may have ended.
        let _ = limit_descriptors(process, None);
    }
}
