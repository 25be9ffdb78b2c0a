//! The source and the target of a device's hand-over, from the end of the prologue on. The ownership word changes at once;
//! each message arrives as late as a test wants.

mod world;

use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::device::source::Source;
use baton_protocol::handover::device::target::Target;
use baton_protocol::ownership::{Owner, Word};
use proptest::prelude::*;
use world::{Operation, World};

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![
        12 => Just(Operation::DeliverToTarget),
        12 => Just(Operation::DeliverToSource),
        1 => any::<bool>().prop_map(Operation::Lose),
        2 => any::<bool>().prop_map(Operation::Repeat),
        1 => any::<(bool, u8)>().prop_map(|(way, at)| Operation::Cut(way, at)),
        2 => any::<bool>().prop_map(Operation::Later),
        5 => Just(Operation::Suspend),
        2 => Just(Operation::SourceRing),
        2 => Just(Operation::TargetRing),
        1 => Just(Operation::TargetRingStops),
        1 => any::<bool>().prop_map(|moved| Operation::FrontendLeaves { moved }),
        1 => Just(Operation::Cancel),
        1 => Just(Operation::Disconnect),
        1 => Just(Operation::KillSource),
        1 => Just(Operation::KillTarget),
        1 => Just(Operation::Unwilling),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_owners_and_never_none(operations in proptest::collection::vec(operations(), 0..80)) {
        let mut world = World::new();
        for operation in operations {
            world.act(operation);
        }
        world.check_not_lost();
    }

    /// Neither end refuses, fails or ends: however late each message is read, the source stays armed, and its next stop
    /// hands the device over.
    #[test]
    fn after_late_deliveries_alone_an_armed_hand_over_goes_through(operations in proptest::collection::vec(late(), 0..80)) {
        let mut world = World::new();
        for operation in operations {
            world.act(operation);
        }
        world.deliver_all();
        if !world.target_uses {
            world.act(Operation::TargetRingStops);
            world.act(Operation::SourceRing);
            world.deliver_all();
            assert!(matches!(world.source, Some(Source::Armed { .. })), "{world:?}");
            world.act(Operation::Suspend);
            world.deliver_all();
            world.act(Operation::TargetRing);
            world.deliver_all();
        }
        assert!(world.target_uses, "{world:?}");
        assert_eq!(world.source, Some(Source::HandedOver));
    }
}

/// What honest ends do, and messages that take their time.
fn late() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => Just(Operation::DeliverToTarget),
        4 => Just(Operation::DeliverToSource),
        4 => Just(Operation::Suspend),
        4 => Just(Operation::SourceRing),
        1 => Just(Operation::TargetRing),
        1 => Just(Operation::TargetRingStops),
    ]
}

fn offered() -> World {
    let mut world = World::new();
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    world.act(Operation::DeliverToSource);
    assert!(matches!(world.source, Some(Source::Offered { adopted: true, .. })));
    assert!(!world.source_uses && !world.target_uses);
    world
}

#[test]
fn the_targets_first_ring_takes_the_device() {
    let mut world = offered();
    world.act(Operation::TargetRing);
    assert!(world.target_uses);
    world.act(Operation::DeliverToSource);
    assert_eq!(world.source, Some(Source::HandedOver));
    assert!(world.source.unwrap().is_done());
}

#[test]
fn the_sources_own_ring_takes_it_back_and_it_can_be_offered_again() {
    let mut world = offered();
    world.act(Operation::SourceRing);
    assert!(world.source_uses);
    // A ring of the target's that starts before it hears of that gets nothing.
    world.act(Operation::TargetRing);
    assert_eq!(world.target, Some(Target::Ready));
    world.act(Operation::TargetRingStops);
    world.act(Operation::DeliverToTarget);
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    world.act(Operation::TargetRing);
    assert!(world.target_uses);
    assert_eq!(world.word, Word { epoch: 2, owner: Owner::Target });
}

#[test]
fn a_ring_that_started_before_the_offer_takes_it_when_it_comes() {
    let mut world = World::new();
    world.act(Operation::TargetRing);
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    assert!(world.target_uses);
}

#[test]
fn a_source_that_ends_while_it_offers_leaves_the_device_to_the_target() {
    let mut world = offered();
    world.act(Operation::FrontendLeaves { moved: true });
    assert!(world.source.as_ref().unwrap().is_done());
    world.act(Operation::KillSource);
    world.act(Operation::DeliverToTarget);
    assert!(matches!(world.target, Some(Target::Adopted { linked: false, .. })));
    world.act(Operation::TargetRing);
    assert!(world.target_uses);
}

#[test]
fn a_front_end_that_left_too_early_leaves_the_device_to_the_source() {
    let mut world = offered();
    world.act(Operation::FrontendLeaves { moved: false });
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Unasked)));
    world.act(Operation::TargetRing);
    assert!(!world.target_uses);
}

#[test]
fn a_target_that_dies_leaves_the_device_to_the_source() {
    let mut world = offered();
    world.act(Operation::KillTarget);
    world.act(Operation::DeliverToSource);
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Closed)));
}

#[test]
fn a_cancelled_offer_cannot_be_taken() {
    let mut world = offered();
    world.act(Operation::Cancel);
    assert!(world.source_uses);
    world.act(Operation::TargetRing);
    assert!(!world.target_uses);
    assert_eq!(world.word.owner, Owner::Aborted);
}

#[test]
fn a_refused_offer_goes_back() {
    let mut world = World::new();
    world.act(Operation::Unwilling);
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    world.act(Operation::DeliverToSource);
    assert!(world.source_uses);
}

#[test]
fn an_offer_that_is_read_after_it_was_taken_back_ends_nothing() {
    let mut world = World::new();
    world.act(Operation::Suspend);
    world.act(Operation::SourceRing);
    world.deliver_all();
    assert!(matches!(world.source, Some(Source::Armed { .. })), "{world:?}");
    assert_eq!(world.target, Some(Target::Ready));
    assert!(world.linked);
}

#[test]
fn the_last_of_several_offers_counts_when_all_are_read_late() {
    let mut world = World::new();
    for _ in 0..3 {
        world.act(Operation::Suspend);
        world.act(Operation::SourceRing);
    }
    world.act(Operation::Suspend);
    world.deliver_all();
    assert!(matches!(world.source, Some(Source::Offered { adopted: true, .. })), "{world:?}");
    world.act(Operation::TargetRing);
    assert!(world.target_uses);
    assert_eq!(world.word, Word { epoch: 4, owner: Owner::Target });
}

#[test]
fn an_offer_that_cannot_have_been_made_is_refused() {
    for word in [
        Word { epoch: 0, owner: Owner::Source },
        Word { epoch: 0, owner: Owner::Offered },
        Word { epoch: 1, owner: Owner::Target },
        Word { epoch: 1, owner: Owner::Settled },
    ] {
        let mut world = World::new();
        world.act(Operation::Suspend);
        world.word = word;
        world.scribbled = true;
        world.deliver_to_target();
        assert_eq!(world.target, Some(Target::Ended), "{word:?}");
    }
}

#[test]
fn a_word_without_a_meaning_leaves_the_device_to_the_source() {
    let ends = [
        Operation::SourceRing,
        Operation::Cancel,
        Operation::Disconnect,
        Operation::KillTarget,
        Operation::DeliverToTarget,
    ];
    for adopted in [false, true] {
        for end in ends {
            let mut world = if adopted { offered() } else { World::new() };
            world.act(Operation::Suspend);
            world.garbage = true;
            world.act(end);
            world.act(Operation::TargetRing);
            world.deliver_all();
            world.act(Operation::SourceRing);
            assert!(world.source_uses && !world.target_uses, "{end:?}: {world:?}");
            assert_eq!(world.source, Some(Source::Ended(EndReason::Meaningless)), "{end:?}");
        }
    }
}

#[test]
fn a_word_that_says_the_target_is_obeyed_and_no_other() {
    let scribbles = [Owner::Source, Owner::Offered, Owner::Target, Owner::Aborted, Owner::Settled];
    for owner in scribbles {
        let mut world = offered();
        world.word = Word { epoch: 7, owner };
        world.scribbled = true;
        world.act(Operation::SourceRing);
        let state =
            if owner.is_target() { Source::HandedOver } else { Source::Ended(EndReason::Meaningless) };
        assert_eq!(world.source, Some(state));
    }
}
