//! The source and the target of a device's hand-over, after the prologue. The ownership word changes immediately; each
//! message arrives as late as a test wants.

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
    fn device_never_has_two_owners_and_is_never_lost(operations in proptest::collection::vec(operations(), 0..80)) {
        let mut world = World::new();
        for operation in operations {
            world.act(operation);
        }
        world.check_not_lost();
    }

    /// If neither end refuses, fails or dies, the source stays armed however late each message is read, and hands the
    /// device over the next time its rings stop.
    #[test]
    fn late_messages_alone_do_not_prevent_an_armed_handover(operations in proptest::collection::vec(late(), 0..80)) {
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

/// Operations of well-behaved ends, with late messages.
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
fn target_takes_the_device_when_its_first_ring_starts() {
    let mut world = offered();
    world.act(Operation::TargetRing);
    assert!(world.target_uses);
    world.act(Operation::DeliverToSource);
    assert_eq!(world.source, Some(Source::HandedOver));
    assert!(world.source.unwrap().is_done());
}

#[test]
fn source_takes_the_device_back_for_its_own_ring_and_offers_it_again() {
    let mut world = offered();
    world.act(Operation::SourceRing);
    assert!(world.source_uses);
    // A ring of the target that starts before the RETRACT arrives does not get the device.
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
fn ring_started_before_the_offer_takes_the_device_when_it_is_offered() {
    let mut world = World::new();
    world.act(Operation::TargetRing);
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    assert!(world.target_uses);
}

#[test]
fn target_keeps_the_offered_device_when_the_source_ends() {
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
fn source_takes_back_when_front_end_leaves_without_checking_device_state() {
    let mut world = offered();
    world.act(Operation::FrontendLeaves { moved: false });
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Unasked)));
    world.act(Operation::TargetRing);
    assert!(!world.target_uses);
}

#[test]
fn source_takes_back_when_the_target_dies() {
    let mut world = offered();
    world.act(Operation::KillTarget);
    world.act(Operation::DeliverToSource);
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Closed)));
}

#[test]
fn cancelled_offer_cannot_be_taken() {
    let mut world = offered();
    world.act(Operation::Cancel);
    assert!(world.source_uses);
    world.act(Operation::TargetRing);
    assert!(!world.target_uses);
    assert_eq!(world.word.owner, Owner::Aborted);
}

#[test]
fn source_takes_back_a_refused_offer() {
    let mut world = World::new();
    world.act(Operation::Unwilling);
    world.act(Operation::Suspend);
    world.act(Operation::DeliverToTarget);
    world.act(Operation::DeliverToSource);
    assert!(world.source_uses);
}

#[test]
fn withdrawn_offer_that_is_read_late_does_not_end_the_handover() {
    let mut world = World::new();
    world.act(Operation::Suspend);
    world.act(Operation::SourceRing);
    world.deliver_all();
    assert!(matches!(world.source, Some(Source::Armed { .. })), "{world:?}");
    assert_eq!(world.target, Some(Target::Ready));
    assert!(world.linked);
}

#[test]
fn last_offer_counts_when_several_are_read_late() {
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
fn offer_that_contradicts_the_word_is_refused() {
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
fn invalid_word_leaves_the_device_to_the_source() {
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
fn source_gives_up_the_device_only_to_a_word_that_names_the_target() {
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
