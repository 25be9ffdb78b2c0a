//! Wherever one of the two back-ends of a session's hand-over dies, hangs, fails or runs out of descriptors, there is one
//! that serves, as long as one lives which can.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::faults::Point;
use baton_tests::session_cells::hang::{hang_everywhere, oversleep_everywhere};
use baton_tests::session_cells::kill::{kill_everywhere, kill_in_batches};
use baton_tests::session_cells::refuse::refuse_everywhere;
use baton_tests::session_cells::starve::starve_everywhere;
use baton_tests::session_cells::{Arena, Fate};

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

#[test]
fn who_is_killed_in_the_middle_of_a_batch_costs_no_more_than_that() -> Result<()> {
    kill_in_batches(2)
}

#[test]
fn a_source_that_hangs_costs_what_the_tap_has_no_room_for() -> Result<()> {
    let mut arena = Arena::new(Datapath::Userspace, 1, 256)?;
    arena.overflow(Point::SourceSessionStaged)?;
    arena.overflow(Point::SourceSessionOffered)?;
    arena.end()
}

/// So many queue pairs have more descriptors than go in a packet.
#[test]
fn a_session_in_several_packets_is_the_sources_until_all_are_there() -> Result<()> {
    let mut arena = Arena::new(Datapath::Userspace, 64, 32)?;
    arena.kill(Point::TargetSessionGathering)?;
    arena.hang(Point::TargetSessionGathering)?;
    arena.starve(Point::TargetSessionGathering)?;
    arena.hang(Point::SourceSessionStageSent)?;
    arena.kill_for(Point::SourceSessionStageSent, Fate::Lost)?;
    arena.end()
}
