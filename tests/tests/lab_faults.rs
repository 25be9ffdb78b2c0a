//! Wherever one of the four processes of a local migration dies, hangs or fails, there is one VM, and it has its network.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::fault_cells::Arena;
use baton_tests::fault_cells::kill::{kill_guests, kill_others};
use baton_tests::fault_cells::refuse::refuse_everywhere;
use baton_tests::faults::{Faults, Point};
use baton_tests::lab;
use baton_tests::local_migration::Kind;

const KIND: Kind = Kind { datapath: Datapath::Userspace, queue_pairs: 2 };

/// How much shorter than usual it is waited for what hangs. What does not must have its time in the lab, too.
const HURRY: u32 = 4;

#[test]
fn one_guest_survives_whoever_else_is_killed() -> Result<()> {
    lab::run(|| kill_others(KIND))
}

#[test]
fn a_guest_dies_with_its_vmm_and_nobody_runs_it_then() -> Result<()> {
    lab::run(|| kill_guests(KIND))
}

/// Where a process hangs for which it takes least time to be given up; `make soak` has all of them.
#[test]
fn whoever_hangs_is_given_up() -> Result<()> {
    lab::run(|| {
        let mut arena = Arena::new(KIND, HURRY, Faults::default())?;
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
            arena.hang(point)?;
        }
        arena.end()
    })
}

/// Whatever can fail does, one after the other.
#[test]
fn whatever_fails_leaves_the_guest_where_it_is() -> Result<()> {
    lab::run(|| refuse_everywhere(KIND))
}
