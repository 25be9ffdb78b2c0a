//! The source and the target of a live session. Either end is killed or stopped between any two of its actions. There are
//! never two owners, and in the end there is one, if a process lives that can be. No message of the front-end is read twice,
//! out of order, or by a process with an outdated session; no descriptor leaks.

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

/// Runs hand-overs that `disturb` interrupts after each number of steps; returns the worlds at their ends.
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
    panic!("it does not end");
}

#[test]
fn undisturbed_it_is_handed_over_and_reported() {
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
fn a_dry_run_ends_before_anything_is_stopped_or_held() {
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
fn a_target_killed_anywhere_leaves_the_session_to_the_source() {
    for world in disturbed_everywhere(|world| world.act(Operation::Kill(End::Target))) {
        let settled = world.word.owner == Owner::Settled;
        assert_eq!(world.source.runs, !settled, "{world:?}");
    }
}

#[test]
fn a_source_killed_anywhere_leaves_the_session_to_a_target_that_holds_it() {
    let ended = disturbed_everywhere(|world| world.act(Operation::Kill(End::Source)));
    let survived =
        ended.iter().filter(|world| matches!(world.target.state(), Some(Target::Active(Taken::Survived))));
    assert!(survived.count() > 5);
    let first = ended.iter().position(|world| world.target.runs).unwrap();
    assert!(ended[first..].iter().all(|world| world.target.runs), "later it survives, too");
}

#[test]
fn a_source_that_sleeps_anywhere_serves_on_or_finds_it_handed_over() {
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
fn a_target_that_sleeps_anywhere_loses_or_has_taken_it() {
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
fn each_rollback_has_its_phase_and_reason() {
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
fn silence_is_endured_for_as_long_as_is_said() {
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
fn a_target_holds_the_session_for_half_a_minute() {
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
fn a_target_that_says_too_early_that_it_runs_does_not_get_the_session() {
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
fn a_bad_commit_is_refused_and_the_source_goes_on() {
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
fn what_a_peer_scribbles_into_the_word_makes_no_second_owner() {
    let scribbles = [Owner::Source, Owner::Offered, Owner::Target, Owner::Aborted, Owner::Settled];
    for owner in scribbles {
        for steps in 0..80 {
            let mut world = World::new(false);
            for _ in 0..steps {
                world.undisturbed();
            }
            // What was taken or aborted already is not offered any more.
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
fn a_target_waits_two_seconds_for_what_must_come_next() {
    type Reached = fn(&Target<world::Fd, world::Held>) -> bool;
    let cases: [Reached; 2] =
        [|state| matches!(state, Target::Ready { .. }), |state| matches!(state, Target::Gathering { .. })];
    for reached in cases {
        let mut world = World::new(false);
        world.until_target(reached);
        world.target_after(1_999);
        assert!(world.target.state().is_some_and(reached), "{world:?}");
        world.target_after(1);
        assert!(matches!(world.target.state(), Some(Target::Ended)), "{world:?}");
        world.finish();
        assert!(world.source.runs);
    }
}

#[test]
fn what_cannot_be_staged_is_refused_by_name() {
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
fn descriptors_without_end_or_without_names_are_refused() {
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
fn proof_of_death_is_enough_to_survive() {
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
fn an_aborted_session_is_dropped_soon_after() {
    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Staged(_)));
    world.act(Operation::Disconnect);
    world.act(Operation::SeeEnd(End::Target));
    world.target_acts();
    assert!(matches!(world.target.state(), Some(Target::Staged(_))), "it is not known yet");
    world.act(Operation::Stop(End::Target));
    while world.undisturbed() {}
    assert_eq!(world.word.owner, Owner::Aborted);
    world.act(Operation::Continue(End::Target));
    world.target_after(100);
    assert!(matches!(world.target.state(), Some(Target::Ended)), "{world:?}");
    world.finish();
}

/// The target has taken the session, and the source does not hear of it.
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

/// It has, and hears the front-end.
fn settle(world: &mut World) {
    world.act(Operation::Act(End::Target));
    world.target_acts();
    assert_eq!(world.word.owner, Owner::Settled);
    world.act(Operation::FrontendSays);
    world.act(Operation::Hear(End::Target));
}

#[test]
fn a_source_that_lost_takes_back_only_what_was_not_settled() {
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
fn a_source_that_lost_learns_from_the_word_that_it_may_go() {
    let mut world = lost();
    world.source_after(5_000);
    assert!(matches!(world.source.state(), Some(Source::Lost { .. })));
    settle(&mut world);
    world.source_after(100);
    assert_eq!(world.source.state(), Some(&Source::HandedOver(None)));
    world.finish();
}

#[test]
fn a_word_that_says_the_other_is_obeyed_even_if_it_cannot_be() {
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
fn every_state_knows_its_deadline() {
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
