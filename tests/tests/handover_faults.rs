//! Faults in either back-end of a session's hand-over: it dies, hangs, fails or runs out of descriptors at any fault
//! point. One back-end serves afterwards, as long as one that can serve is alive.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::fault_matrix::session::hang::{hang_everywhere, oversleep_everywhere};
use baton_tests::fault_matrix::session::kill::{kill_everywhere, kill_in_batches};
use baton_tests::fault_matrix::session::refuse::refuse_everywhere;
use baton_tests::fault_matrix::session::starve::starve_everywhere;
use baton_tests::fault_matrix::session::{Fate, Fixture};
use baton_tests::faults::Point;

#[test]
fn session_survives_when_source_or_target_is_killed() -> Result<()> {
    kill_everywhere(Datapath::Userspace, 2)
}

#[test]
fn hung_process_is_waited_for_or_given_up() -> Result<()> {
    hang_everywhere(Datapath::Userspace, 2)
}

#[test]
fn source_serves_again_when_it_wakes_after_target_gave_up() -> Result<()> {
    oversleep_everywhere(Datapath::Userspace, 2)
}

#[test]
fn session_stays_with_source_when_descriptors_run_out() -> Result<()> {
    starve_everywhere(Datapath::Userspace, 2)
}

#[test]
fn failed_step_leaves_session_with_source() -> Result<()> {
    refuse_everywhere(Datapath::Userspace, 2)
}

#[test]
fn process_killed_within_a_batch_loses_at_most_that_batch() -> Result<()> {
    kill_in_batches(2)
}

#[test]
fn hung_source_loses_only_frames_that_overflow_the_tap() -> Result<()> {
    let mut fixture = Fixture::new(Datapath::Userspace, 1, 256)?;
    fixture.overflow(Point::SourceSessionStaged)?;
    fixture.overflow(Point::SourceSessionOffered)?;
    fixture.end()
}

/// The descriptors of this many queue pairs do not fit in one packet.
#[test]
fn session_in_several_packets_stays_with_source_until_all_arrive() -> Result<()> {
    let mut fixture = Fixture::new(Datapath::Userspace, 64, 32)?;
    fixture.kill(Point::TargetSessionGathering)?;
    fixture.hang(Point::TargetSessionGathering)?;
    fixture.starve(Point::TargetSessionGathering)?;
    fixture.hang(Point::SourceSessionStageSent)?;
    fixture.kill_for(Point::SourceSessionStageSent, Fate::Lost)?;
    fixture.end()
}
