//! Source and target of a live session over a link that loses, delays, repeats and cuts packets, while either end is
//! killed or stopped at any place, between any two of its actions, and time passes as it likes: never two owners, and
//! in the end one, if there is anyone who could; no message of the front-end is heard twice, in the wrong place, or with
//! old knowledge; no descriptor is left behind.
#![expect(clippy::unwrap_used, reason = "these are tests")]

#[path = "session_world/mod.rs"]
mod session_world;

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::end_reason::EndReason;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::Phase;
use baton_protocol::handover::prologue::SourcePrologue;
use baton_protocol::handover::session::source::{self, Source};
use baton_protocol::handover::session::target::{Taken, Target};
use baton_protocol::handover::wire::message::{Message, PROTOCOL, Stage};
use baton_protocol::ownership::{Owner, Word};
use proptest::prelude::*;
use session_world::{Deed, End, World};

fn ends() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Source), Just(End::Target)]
}

fn deeds() -> impl Strategy<Value = Deed> {
    prop_oneof![
        40 => ends().prop_map(Deed::Act),
        30 => ends().prop_map(Deed::Deliver),
        1 => ends().prop_map(Deed::Lose),
        1 => ends().prop_map(Deed::Repeat),
        1 => (ends(), any::<u8>()).prop_map(|(end, at)| Deed::Cut(end, at)),
        1 => ends().prop_map(Deed::Later),
        4 => Just(Deed::FrontendSays),
        8 => ends().prop_map(Deed::Hear),
        2 => prop_oneof![Just(1u64), Just(40), Just(150), Just(600), Just(3_000), Just(11_000), Just(31_000)]
            .prop_map(Deed::Pass),
        4 => ends().prop_map(Deed::Clock),
        1 => Just(Deed::Disconnect),
        4 => ends().prop_map(Deed::SeeEnd),
        1 => ends().prop_map(Deed::Kill),
        4 => ends().prop_map(Deed::SeeDeath),
        1 => ends().prop_map(Deed::Stop),
        2 => ends().prop_map(Deed::Continue),
        1 => Just(Deed::Cancel),
        1 => Just(Deed::Fail),
        1 => Just(Deed::Unwilling),
        1 => Just(Deed::BadCommit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn one_owner_always(deeds in proptest::collection::vec(deeds(), 0..160)) {
        let mut world = World::new(false);
        for deed in deeds {
            world.act(deed);
        }
        world.finish();
    }

    /// Neither end fails, ends or gives up: however late each message is read, the session is handed over.
    #[test]
    fn after_late_deliveries_alone_it_is_handed_over(deeds in proptest::collection::vec(late(), 0..160)) {
        let mut world = World::new(false);
        for deed in deeds {
            world.act(deed);
        }
        for end in [End::Source, End::Target] {
            world.act(Deed::Continue(end));
        }
        world.finish();
        assert!(matches!(world.source.state(), Some(Source::HandedOver(Some(_)))), "{world:?}");
        assert!(matches!(world.target.state(), Some(Target::Active(_))), "{world:?}");
    }

    /// From each place of an undisturbed hand-over on, one after the other.
    #[test]
    fn one_owner_from_everywhere(steps in 0..80usize, deeds in proptest::collection::vec(deeds(), 0..40)) {
        let mut world = World::new(false);
        for _ in 0..steps {
            world.undisturbed();
        }
        for deed in deeds {
            world.act(deed);
        }
        world.finish();
    }
}

/// What honest ends and their front-end do, and messages that take their time.
fn late() -> impl Strategy<Value = Deed> {
    prop_oneof![
        8 => ends().prop_map(Deed::Act),
        4 => ends().prop_map(Deed::Deliver),
        1 => Just(Deed::FrontendSays),
        2 => ends().prop_map(Deed::Hear),
        1 => ends().prop_map(Deed::Clock),
        1 => ends().prop_map(Deed::Stop),
        2 => ends().prop_map(Deed::Continue),
    ]
}

/// One of the ends is killed, or stopped until the other has settled everything, after each number of steps.
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
    for world in disturbed_everywhere(|world| world.act(Deed::Kill(End::Target))) {
        let settled = world.word.owner == Owner::Settled;
        assert_eq!(world.source.runs, !settled, "{world:?}");
    }
}

#[test]
fn a_source_killed_anywhere_leaves_the_session_to_a_target_that_holds_it() {
    let ended = disturbed_everywhere(|world| world.act(Deed::Kill(End::Source)));
    let survived =
        ended.iter().filter(|world| matches!(world.target.state(), Some(Target::Active(Taken::Survived))));
    assert!(survived.count() > 5);
    let first = ended.iter().position(|world| world.target.runs).unwrap();
    assert!(ended[first..].iter().all(|world| world.target.runs), "later it survives, too");
}

#[test]
fn a_source_that_sleeps_anywhere_serves_on_or_finds_it_handed_over() {
    let ended = disturbed_everywhere(|world| {
        world.act(Deed::Stop(End::Source));
        for _ in 0..400 {
            world.act(Deed::Pass(200));
            world.undisturbed();
            world.act(Deed::Clock(End::Target));
        }
    });
    for world in ended {
        assert_ne!(world.source.runs, world.target.runs, "{world:?}");
    }
}

#[test]
fn a_target_that_sleeps_anywhere_loses_or_has_taken_it() {
    let ended = disturbed_everywhere(|world| {
        world.act(Deed::Stop(End::Target));
        for _ in 0..400 {
            world.act(Deed::Pass(200));
            world.undisturbed();
            world.act(Deed::Clock(End::Source));
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
    world.act(Deed::Lose(End::Target));
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
    world.act(Deed::Stop(End::Source));
    world.act(Deed::Pass(29_000));
    world.act(Deed::Clock(End::Target));
    assert!(matches!(world.target.state(), Some(Target::Staged(_))));
    world.act(Deed::Pass(1_100));
    world.act(Deed::Clock(End::Target));
    assert!(matches!(world.target.state(), Some(Target::Ended)));
    world.finish();
    assert!(world.source.runs && !world.target.runs);
}

#[test]
fn a_target_that_says_too_early_that_it_runs_does_not_get_the_session() {
    let mut world = World::new(false);
    world.until_source(|state| matches!(state, Source::Committed { .. }));
    world.act(Deed::Stop(End::Target));
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
    world.act(Deed::BadCommit);
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
                world.act(Deed::Pass(20));
                world.act(Deed::Clock(End::Source));
                world.act(Deed::Clock(End::Target));
            }
            assert!(!(world.source.runs && world.target.runs));
        }
    }
}

#[test]
fn a_target_waits_two_seconds_for_what_must_come_next() {
    type Reached = fn(&Target<session_world::Fd, session_world::Held>) -> bool;
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
    world.act(Deed::Unwilling);
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
            world.act(Deed::Deliver(End::Source));
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
        world.act(Deed::Kill(End::Source));
        world.act(Deed::SeeDeath(End::Target));
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
    world.act(Deed::Disconnect);
    world.act(Deed::SeeEnd(End::Target));
    world.target_acts();
    assert!(matches!(world.target.state(), Some(Target::Staged(_))), "it is not known yet");
    world.act(Deed::Stop(End::Target));
    while world.undisturbed() {}
    assert_eq!(world.word.owner, Owner::Aborted);
    world.act(Deed::Continue(End::Target));
    world.target_after(100);
    assert!(matches!(world.target.state(), Some(Target::Ended)), "{world:?}");
    world.finish();
}

/// The target has taken the session, and the source does not hear of it.
fn lost() -> World {
    let mut world = World::new(false);
    world.until_target(|state| matches!(state, Target::Starting { .. }));
    world.act(Deed::Disconnect);
    world.act(Deed::SeeEnd(End::Source));
    world.source_acts();
    assert!(matches!(world.source.state(), Some(Source::Lost { .. })), "{world:?}");
    assert!(world.target.runs && !world.target.listens);
    world
}

/// It has, and hears the front-end.
fn settle(world: &mut World) {
    world.act(Deed::Act(End::Target));
    world.target_acts();
    assert_eq!(world.word.owner, Owner::Settled);
    world.act(Deed::FrontendSays);
    world.act(Deed::Hear(End::Target));
}

#[test]
fn a_source_that_lost_takes_back_only_what_was_not_settled() {
    for settled in [false, true] {
        let mut world = lost();
        if settled {
            settle(&mut world);
        }
        world.act(Deed::Kill(End::Target));
        world.act(Deed::SeeDeath(End::Source));
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
    world.act(Deed::Act(End::Target));
    world.target_acts();
    assert!(!world.target.runs && !world.target.listens);
}

#[test]
fn the_next_version_hands_over_to_this_one_and_back() {
    for next in [End::Source, End::Target] {
        let mut world = World::new(false);
        world.next = Some(next);
        while world.undisturbed() {}
        assert!(matches!(world.source.state(), Some(Source::HandedOver(Some(_)))), "{world:?}");
        assert!(matches!(world.target.state(), Some(Target::Active(Taken::Committed(_)))));
        world.finish();
    }
}

#[test]
fn the_next_version_is_refused_by_name_and_refuses_so() {
    for next in [End::Source, End::Target] {
        let mut world = World::new(false);
        world.next = Some(next);
        world.act(Deed::Unwilling);
        while world.undisturbed() {}
        let Some(SourcePrologue::Ended { reason: EndReason::Refused(reasons), .. }) = world.source.prologue()
        else {
            panic!("{world:?}")
        };
        assert_eq!(reasons.0[0].name, "front-end");
        world.finish();
    }
}

fn recording(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/session-v{version}-whole.bin"))
}

/// Every packet of a hand-over, one after the other, with the length of each in front.
#[test]
fn a_whole_hand_over_is_written_as_it_was() {
    let mut world = World::new(false);
    while world.undisturbed() {}
    let with_length = |packet: &Vec<u8>| {
        let length = u32::try_from(packet.len()).unwrap().to_le_bytes();
        length.into_iter().chain(packet.iter().copied()).collect::<Vec<u8>>()
    };
    let whole: Vec<u8> = world.sent.iter().flat_map(with_length).collect();
    let path = recording(PROTOCOL.versions.newest);
    if std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, &whole).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), whole, "{}", path.display());
}

#[test]
fn a_hand_over_with_each_version_so_far_goes_as_it_went() {
    for version in PROTOCOL.versions.oldest..=PROTOCOL.versions.newest {
        let whole = std::fs::read(recording(version)).unwrap();
        let mut rest = &whole[..];
        let (mut with_source, mut with_target) = (World::new(false), World::new(false));
        let offered = Word::INITIAL.offered().unwrap();
        while let Some((length, packets)) = rest.split_first_chunk::<4>() {
            let (packet, others) = packets.split_at(usize::try_from(u32::from_le_bytes(*length)).unwrap());
            rest = others;
            // Who said it, and what it did to the word before.
            let (from, word) = match Message::decode(packet).unwrap() {
                Message::Hello(hello) if hello.program == "source" => (End::Source, None),
                Message::Prepare(_) | Message::Stage(_) | Message::Descriptors(_) => (End::Source, None),
                Message::Commit(_) => (End::Source, Some(offered)),
                Message::Active(_) => (End::Target, offered.taken().unwrap().settled()),
                _ => (End::Target, None),
            };
            let (world, end) = match from {
                End::Source => (&mut with_target, End::Target),
                End::Target => (&mut with_source, End::Source),
            };
            world.word = word.unwrap_or(world.word);
            world.replay(end, packet);
        }
        assert!(matches!(with_source.source.state(), Some(Source::HandedOver(Some(_)))), "{with_source:?}");
        assert!(matches!(with_target.target.state(), Some(Target::Active(_))), "{with_target:?}");
    }
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
