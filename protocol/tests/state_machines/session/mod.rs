//! The source and the target of a session's hand-over. Either end may be killed or stopped between any two of its
//! actions. There are never two owners, and in the end there is one if a process lives that can own the session. No
//! message of the front-end is read twice, out of order, or by a process with a stale session. No descriptor leaks.

mod properties;
mod versions;
mod world;

use std::time::Duration;

use baton_protocol::end_reason::EndReason;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::Phase;
use baton_protocol::handover::prologue::SourcePrologue;
use baton_protocol::handover::session::source::{self, Source};
use baton_protocol::handover::session::target::{Taken, Target};
use baton_protocol::handover::wire::message::{Message, Stage};
use baton_protocol::ownership::{Owner, Word};
use world::{End, Operation, World};

/// Runs one hand-over per possible step and calls `disturb` after that step. Returns the finished worlds.
fn disturbed_everywhere(disturb: impl Fn(&mut World)) -> Vec<World> {
    let mut ended = Vec::new();
    for steps in 0..200 {
        let mut world = World::new(false);
        let whole = (0..steps).all(|_| world.undisturbed());
        disturb(&mut world);
        world.finish();
        ended.push(world);
        if !whole {
            return ended;
        }
    }
    panic!("the hand-over does not end");
}

#[test]
fn undisturbed_handover_completes_with_a_report() {
    let mut world = World::new(false);
    while world.undisturbed() {}
    let Some(Source::HandedOver(Some(report))) = world.source.state() else { panic!("{world:?}") };
    let phases: Vec<_> = report.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, ["check", "stage", "stop", "commit", "pass", "take", "start"]);
    let freeze: u64 = report.phases[2..].iter().map(|(_, took)| took).sum();
    assert_eq!(report.blackout_us, freeze);
    assert!(report.phases.iter().all(|(_, took)| *took > 0), "{report:?}");
    let Some(Target::Active(Taken::Committed(own))) = world.target.state() else { panic!("{world:?}") };
    assert_eq!(own.blackout_us, report.blackout_us);
    assert_eq!(world.word, Word { epoch: 1, owner: Owner::Settled });
    world.finish();
}

#[test]
fn dry_run_stops_and_holds_nothing() {
    let mut world = World::new(true);
    while world.undisturbed() {
        assert!(world.source.runs && world.source.listens);
    }
    let possible = SourcePrologue::Ended { phase: Phase::Check, reason: EndReason::Possible };
    assert_eq!(world.source.prologue(), Some(&possible));
    assert!(matches!(world.target.state(), Some(Target::Ended)));
    world.finish();
}

#[test]
fn source_keeps_the_session_when_target_is_killed_before_it_settles() {
    for world in disturbed_everywhere(|world| world.act(Operation::Kill(End::Target))) {
        let settled = world.word.owner == Owner::Settled;
        assert_eq!(world.source.runs, !settled, "{world:?}");
    }
}

#[test]
fn staged_target_survives_a_source_killed_at_any_step() {
    let ended = disturbed_everywhere(|world| world.act(Operation::Kill(End::Source)));
    let survived =
        ended.iter().filter(|world| matches!(world.target.state(), Some(Target::Active(Taken::Survived))));
    assert!(survived.count() > 5);
    let first = ended.iter().position(|world| world.target.runs).unwrap();
    assert!(
        ended[first..].iter().all(|world| world.target.runs),
        "once staged, the target survives at every later step"
    );
}

#[test]
fn exactly_one_end_serves_after_the_source_sleeps_at_any_step() {
    let ended = disturbed_everywhere(|world| {
        world.act(Operation::Stop(End::Source));
        for _ in 0..400 {
            world.act(Operation::Pass(200));
            world.undisturbed();
            world.act(Operation::Clock(End::Target));
        }
    });
    for world in ended {
        assert_ne!(world.source.runs, world.target.runs, "{world:?}");
    }
}

#[test]
fn exactly_one_end_serves_after_the_target_sleeps_at_any_step() {
    let ended = disturbed_everywhere(|world| {
        world.act(Operation::Stop(End::Target));
        for _ in 0..400 {
            world.act(Operation::Pass(200));
            world.undisturbed();
            world.act(Operation::Clock(End::Source));
        }
    });
    for world in ended {
        assert_ne!(world.source.runs, world.target.runs, "{world:?}");
    }
}

#[test]
fn rollback_reports_its_phase_and_reason() {
    let until = |reached: fn(&Source) -> bool| {
        let mut world = World::new(false);
        world.until_source(reached);
        world.tell_source(source::Event::Closed);
        world.finish();
        match world.source.state() {
            Some(Source::Ended { phase, reason }) => (phase.name(), reason.clone()),
            state => panic!("{state:?}"),
        }
    };
    let closed = EndReason::Closed;
    assert_eq!(until(|state| matches!(state, Source::Staging { .. })), ("stage", closed.clone()));
    assert_eq!(until(|state| matches!(state, Source::Freezing { .. })), ("freeze", closed.clone()));
    let mut world = World::new(false);
    world.until_source(|state| matches!(state, Source::Committed { .. }));
    world.act(Operation::Lose(End::Target));
    world.source_after(499);
    assert!(matches!(world.source.state(), Some(Source::Committed { .. })));
    world.source_after(2);
    assert_eq!(
        world.source.state(),
        Some(&Source::Ended { phase: Phase::Commit, reason: EndReason::Silent }),
    );
    world.finish();
    assert!(world.source.runs);
}

#[test]
fn source_waits_ten_seconds_for_staging() {
    type Case = (fn(&Source) -> bool, u64);
    let cases: [Case; 1] = [(|state| matches!(state, Source::Staging { .. }), 10_000)];
    for (reached, patience) in cases {
        let mut world = World::new(false);
        world.until_source(reached);
        world.source_after(patience - 1);
        assert!(world.source.state().is_some_and(reached), "{world:?}");
        world.source_after(1);
        assert!(matches!(world.source.state(), Some(Source::Ended { reason: EndReason::Silent, .. })));
        world.finish();
        assert!(world.source.runs);
    }
}

#[test]
fn target_holds_a_staged_session_for_thirty_seconds() {
    let mut world = World::new(false);
    world.until_source(|state| matches!(state, Source::Freezing { .. }));
    world.act(Operation::Stop(End::Source));
    world.act(Operation::Pass(29_000));
    world.act(Operation::Clock(End::Target));
    assert!(matches!(world.target.state(), Some(Target::Staged(_))));
    world.act(Operation::Pass(1_100));
    world.act(Operation::Clock(End::Target));
    assert!(matches!(world.target.state(), Some(Target::Ended)));
    world.finish();
    assert!(world.source.runs && !world.target.runs);
}

#[test]
fn premature_active_does_not_give_the_target_the_session() {
    let mut world = World::new(false);
    world.until_source(|state| matches!(state, Source::Committed { .. }));
    world.act(Operation::Stop(End::Target));
    let active = baton_protocol::handover::wire::message::Active { epoch: 1, times: Default::default() };
    world.tell_source(source::Event::Message(Message::Active(active)));
    world.source_acts();
    assert!(matches!(world.source.state(), Some(Source::Ended { reason: EndReason::Untrue, .. })));
    world.finish();
    assert!(world.source.runs && !world.target.runs);
}

#[test]
fn source_continues_after_the_target_refuses_its_commit() {
    let mut world = World::new(false);
    world.act(Operation::BadCommit);
    while world.undisturbed() {}
    world.finish();
    let Some(Source::Ended { phase: Phase::Commit, reason: EndReason::Refused(reasons) }) =
        world.source.state()
    else {
        panic!("{world:?}")
    };
    assert_eq!(reasons.0[0].name, "commit");
    assert!(world.source.runs);
}

#[test]
fn overwritten_word_does_not_create_a_second_owner() {
    let scribbles = [Owner::Source, Owner::Offered, Owner::Target, Owner::Aborted, Owner::Settled];
    for owner in scribbles {
        for steps in 0..80 {
            let mut world = World::new(false);
            for _ in 0..steps {
                world.undisturbed();
            }
            // Only scribble while the session can still be taken.
            if !matches!(world.word.owner, Owner::Source | Owner::Offered) {
                break;
            }
            world.word = Word { epoch: 1, owner };
            world.scribbled = true;
            for _ in 0..200 {
                world.undisturbed();
                world.act(Operation::Pass(20));
                world.act(Operation::Clock(End::Source));
                world.act(Operation::Clock(End::Target));
            }
            assert!(!(world.source.runs && world.target.runs));
        }
    }
}

#[test]
fn target_waits_five_seconds_for_stage_and_descriptors() {
    type Reached = fn(&Target<world::Fd, world::Held>) -> bool;
    let cases: [Reached; 2] =
        [|state| matches!(state, Target::Ready { .. }), |state| matches!(state, Target::Gathering { .. })];
    for reached in cases {
        let mut world = World::new(false);
        world.until_target(reached);
        world.target_after(4_999);
        assert!(world.target.state().is_some_and(reached), "{world:?}");
        world.target_after(1);
        assert!(matches!(world.target.state(), Some(Target::Ended)), "{world:?}");
        world.finish();
        assert!(world.source.runs);
    }
}

#[test]
fn target_names_its_reason_for_refusing_to_stage() {
    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Gathering { .. }));
    world.act(Operation::Unwilling);
    while world.undisturbed() {}
    let Some(Source::Ended { phase: Phase::Stage, reason: EndReason::Refused(reasons) }) =
        world.source.state()
    else {
        panic!("{world:?}")
    };
    assert_eq!(reasons.0[0].name, "front-end");
    world.finish();
}

#[test]
fn too_many_or_unnamed_descriptors_are_refused() {
    let cases: [fn(&mut Stage); 2] = [|stage| stage.more = 9, |stage| stage.fds = FdManifest::default()];
    for change in cases {
        let mut world = World::new(false);
        world.until_target(|state| matches!(state, Target::Ready { .. }));
        while !world.source.state().is_some_and(|state| matches!(state, Source::Staging { .. })) {
            world.act(Operation::Deliver(End::Source));
        }
        world.source_acts();
        world.change_stage(change);
        while world.undisturbed() {}
        let Some(Source::Ended { phase: Phase::Stage, reason: EndReason::Refused(reasons) }) =
            world.source.state()
        else {
            panic!("{world:?}")
        };
        assert_eq!(reasons.0[0].name, "descriptors");
        world.finish();
    }
}

#[test]
fn target_takes_the_session_on_proof_of_the_sources_death() {
    for staging in [true, false] {
        let mut world = World::new(false);
        if staging {
            world.until_target(|state| matches!(state, Target::Staging { .. }));
        } else {
            world.until_target(|state| matches!(state, Target::Staged(_)));
        }
        world.act(Operation::Kill(End::Source));
        world.act(Operation::SeeDeath(End::Target));
        world.target_acts();
        assert_eq!(world.target.runs, !staging, "{world:?}");
        world.finish();
        assert!(world.target.runs);
    }
}

#[test]
fn target_drops_an_aborted_session_within_100_ms() {
    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Staged(_)));
    world.act(Operation::Disconnect);
    world.act(Operation::SeeEnd(End::Target));
    world.target_acts();
    assert!(
        matches!(world.target.state(), Some(Target::Staged(_))),
        "the target does not know of the abort yet"
    );
    world.act(Operation::Stop(End::Target));
    while world.undisturbed() {}
    assert_eq!(world.word.owner, Owner::Aborted);
    world.act(Operation::Continue(End::Target));
    world.target_after(100);
    assert!(matches!(world.target.state(), Some(Target::Ended)), "{world:?}");
    world.finish();
}

/// Returns a world in which the target has taken the session and the source only learns this from the word.
fn lost() -> World {
    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Starting { .. }));
    world.act(Operation::Disconnect);
    world.act(Operation::SeeEnd(End::Source));
    world.source_acts();
    assert!(matches!(world.source.state(), Some(Source::Lost { .. })), "{world:?}");
    assert!(world.target.runs && !world.target.listens);
    world
}

/// Lets the target settle and read from the front-end.
fn settle(world: &mut World) {
    world.act(Operation::Act(End::Target));
    world.target_acts();
    assert_eq!(world.word.owner, Owner::Settled);
    world.act(Operation::FrontendSays);
    world.act(Operation::Hear(End::Target));
}

#[test]
fn lost_source_takes_back_only_an_unsettled_session() {
    for settled in [false, true] {
        let mut world = lost();
        if settled {
            settle(&mut world);
        }
        world.act(Operation::Kill(End::Target));
        world.act(Operation::SeeDeath(End::Source));
        world.source_acts();
        assert_eq!(world.source.runs, !settled, "{world:?}");
        world.finish();
    }
}

#[test]
fn lost_source_learns_from_the_word_that_the_session_is_handed_over() {
    let mut world = lost();
    world.source_after(5_000);
    assert!(matches!(world.source.state(), Some(Source::Lost { .. })));
    settle(&mut world);
    world.source_after(100);
    assert_eq!(world.source.state(), Some(&Source::HandedOver(None)));
    world.finish();
}

#[test]
fn both_ends_stop_when_the_word_unexpectedly_names_the_peer() {
    let mut world = World::new(false);
    world.until_source(|state| matches!(state, Source::Staging { .. }));
    world.scribbled = true;
    world.word = Word { epoch: 0, owner: Owner::Target };
    world.tell_source(source::Event::Closed);
    world.source_acts();
    assert!(!world.source.runs && !world.source.listens);

    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Starting { .. }));
    assert!(world.target.runs);
    world.scribbled = true;
    world.word = Word { epoch: 1, owner: Owner::Aborted };
    world.act(Operation::Act(End::Target));
    world.target_acts();
    assert!(!world.target.runs && !world.target.listens);
}

#[test]
fn every_deadline_is_in_the_next_thirty_seconds() {
    let mut world = World::new(false);
    loop {
        for deadline in [world.source.deadline(), world.target.deadline()].into_iter().flatten() {
            assert!(deadline > world.now && deadline <= world.now + Duration::from_secs(30));
        }
        if !world.undisturbed() {
            break;
        }
    }
    assert_eq!((world.source.deadline(), world.target.deadline()), (None, None));
}
