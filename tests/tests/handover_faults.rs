//! Wherever one of the two back-ends of a session's hand-over dies, hangs, fails or runs out of descriptors, one back-end
//! serves, as long as one that can serve lives.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::fault_matrix::session::hang::{hang_everywhere, oversleep_everywhere};
use baton_tests::fault_matrix::session::kill::{kill_everywhere, kill_in_batches};
use baton_tests::fault_matrix::session::refuse::refuse_everywhere;
use baton_tests::fault_matrix::session::starve::starve_everywhere;
use baton_tests::fault_matrix::session::{Fate, Fixture};
use baton_tests::faults::Point;

#[test]
fn a_session_survives_when_a_process_is_killed() -> Result<()> {
    kill_everywhere(Datapath::Userspace, 2)
}

#[test]
fn a_process_that_hangs_is_waited_for_or_given_up() -> Result<()> {
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
fn a_step_that_fails_leaves_the_session_where_it_is() -> Result<()> {
    refuse_everywhere(Datapath::Userspace, 2)
}

#[test]
fn a_process_killed_within_a_batch_loses_at_most_that_batch() -> Result<()> {
    kill_in_batches(2)
}

#[test]
fn a_source_that_hangs_loses_only_what_overflows_the_tap() -> Result<()> {
    let mut fixture = Fixture::new(Datapath::Userspace, 1, 256)?;
    fixture.overflow(Point::SourceSessionStaged)?;
    fixture.overflow(Point::SourceSessionOffered)?;
    fixture.end()
}

/// The descriptors of this many queue pairs do not fit in one packet.
#[test]
fn a_session_in_several_packets_is_the_sources_until_all_are_there() -> Result<()> {
    let mut fixture = Fixture::new(Datapath::Userspace, 64, 32)?;
    fixture.kill(Point::TargetSessionGathering)?;
    fixture.hang(Point::TargetSessionGathering)?;
    fixture.starve(Point::TargetSessionGathering)?;
    fixture.hang(Point::SourceSessionStageSent)?;
    fixture.kill_for(Point::SourceSessionStageSent, Fate::Lost)?;
    fixture.end()
}
