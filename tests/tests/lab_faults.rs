//! Wherever one of the four processes of a local migration dies, hangs or fails, there is one VM, and it has its network.

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

/// The points where a hung process is given up soonest; `make soak` has all points.
#[test]
fn a_process_that_hangs_is_given_up() -> Result<()> {
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
fn a_step_that_fails_leaves_the_guest_where_it_is() -> Result<()> {
    lab::run(|| refuse_everywhere(KIND))
}
