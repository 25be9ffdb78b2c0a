//! Wherever one of the two back-ends of a session's hand-over dies, hangs, fails or runs out of descriptors, there is one
//! that serves, as long as one lives which can.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::session_cells::hang::{hang_everywhere, oversleep_everywhere};
use baton_tests::session_cells::kill::kill_everywhere;
use baton_tests::session_cells::refuse::refuse_everywhere;
use baton_tests::session_cells::starve::starve_everywhere;

#[test]
fn a_session_survives_whoever_is_killed() -> Result<()> {
    kill_everywhere(Datapath::Userspace, 2)
}

#[test]
fn whoever_hangs_is_waited_for_or_given_up() -> Result<()> {
    hang_everywhere(Datapath::Userspace, 2)
}

#[test]
fn a_source_that_was_given_up_serves_on_when_it_wakes() -> Result<()> {
    oversleep_everywhere(Datapath::Userspace, 2)
}

#[test]
fn a_session_that_cannot_move_for_want_of_descriptors_stays() -> Result<()> {
    starve_everywhere(Datapath::Userspace, 2)
}

#[test]
fn whatever_fails_leaves_the_session_where_it_is() -> Result<()> {
    refuse_everywhere(Datapath::Userspace, 2)
}
