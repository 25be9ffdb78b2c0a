//! Faults in any of the four processes of a local migration: it dies, hangs or fails. The guest never runs twice, dies
//! only with its VMM, and keeps its network.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::fault_matrix::device::kill::{kill_guests, kill_others};
use baton_tests::fault_matrix::device::refuse::refuse_everywhere;
use baton_tests::fault_matrix::device::{Fixture, HURRY};
use baton_tests::faults::{Faults, Point};
use baton_tests::lab;
use baton_tests::local_migration::Kind;

const KIND: Kind = Kind { datapath: Datapath::Userspace, queue_pairs: 2 };

#[test]
fn guest_survives_when_any_other_process_is_killed() -> Result<()> {
    lab::run(|| kill_others(KIND))
}

#[test]
fn guest_that_dies_with_its_vmm_runs_nowhere_else() -> Result<()> {
    lab::run(|| kill_guests(KIND))
}

/// Only the points where a hung process is given up soonest. `make soak` covers all points.
#[test]
fn hung_process_is_given_up() -> Result<()> {
    lab::run(|| {
        let mut fixture = Fixture::new(KIND, HURRY, Faults::default())?;
        for point in [
            Point::TargetVmmConnected,
            Point::TargetVmmRestored,
            Point::TargetVmmCommitting,
            Point::SourceBackendOffered,
            Point::TargetBackendAdopted,
            Point::SourceVmmReady,
            Point::TargetVmmTaken,
            Point::TargetBackendTaking,
            Point::SourceBackendAdopted,
            Point::SourceVmmOffered,
        ] {
            fixture.hang(point)?;
        }
        fixture.end()
    })
}

#[test]
fn failed_step_leaves_guest_at_source() -> Result<()> {
    lab::run(|| refuse_everywhere(KIND))
}
