//! Faults in either back-end of a session's hand-over: it dies, hangs, fails or runs out of descriptors at any fault
//! point. One back-end serves afterwards, as long as one that can serve is alive.

use anyhow::{Result, ensure};
use baton_protocol::control::{BackendState, BackendStats, DirectionStats};
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::net::features;
use baton_tests::fault_matrix::session::hang::{hang_everywhere, oversleep_everywhere};
use baton_tests::fault_matrix::session::kill::{kill_everywhere, kill_in_batches};
use baton_tests::fault_matrix::session::refuse::refuse_everywhere;
use baton_tests::fault_matrix::session::starve::starve_everywhere;
use baton_tests::fault_matrix::session::{Fate, Fixture};
use baton_tests::faults::{Action, Faults, Point};
use baton_tests::process::until;

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

/// Returns all counters, always in the same order.
fn counters(stats: &BackendStats) -> Vec<u64> {
    let directions = stats.queue_pairs.iter().flat_map(|pair| [pair.rx, pair.tx]);
    let all = |direction| {
        let DirectionStats { frames, bytes, large_frames, largest_frame, dropped, discarded, kicks, calls } =
            direction;
        [frames, bytes, large_frames, largest_frame, dropped, Some(discarded), kicks, calls]
    };
    directions.flat_map(all).flatten().collect()
}

#[test]
fn survivor_continues_from_the_counters_of_stage() -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[])?;
    let features = Options::default().features | features::MQ;
    let mut device = rig.device(Options { queue_pairs: 2, features, ..Options::default() })?;
    rig.check_traffic(&mut device)?;
    for point in [Point::SourceSessionStageSent, Point::SourceSessionStaged, Point::SourceSessionOffered] {
        let faults = Faults::at(point, Action::Kill);
        rig.backend.become_target(Backend::waiting_with_faults(Datapath::Userspace, &[], &faults)?)?;
        rig.check_traffic(&mut device)?;
        let before = rig.backend.stats()?;
        let pairs = &before.queue_pairs;
        let moved = |direction: &DirectionStats| direction.frames > Some(0);
        // The kernel chooses the queue of a frame that the guest receives.
        let both = pairs.iter().all(|pair| moved(&pair.tx)) && pairs.iter().any(|pair| moved(&pair.rx));
        ensure!(both, "{before:?}");

        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let report = rig.backend.hand_over_to(&target.incoming(), false);
        ensure!(report.is_err(), "a killed back-end reported {report:?}");
        until("the target served", || Ok(target.status()?.state == BackendState::Serving))?;
        let after = target.stats()?;
        let (smaller, larger) = (counters(&before), counters(&after));
        ensure!(
            smaller.len() == larger.len()
                && smaller.iter().zip(&larger).all(|(before, after)| before <= after),
            "{}: {before:?}, then {after:?}",
            point.name()
        );
        rig.backend.succeeded_by(target).wait()?;
        rig.check_traffic(&mut device)?;
        for (pair, after) in after.queue_pairs.iter().enumerate() {
            rig.backend.wait_pair_stats(pair, |stats| stats.tx.frames > after.tx.frames)?;
        }
    }
    Ok(())
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
