//! Property tests: a session never has two owners and ends with one, whatever happens in whatever order.

use baton_protocol::handover::session::source::Source;
use baton_protocol::handover::session::target::Target;
use proptest::prelude::*;

use super::world::{End, Operation, World};

fn ends() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Source), Just(End::Target)]
}

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![
        40 => ends().prop_map(Operation::Act),
        30 => ends().prop_map(Operation::Deliver),
        1 => ends().prop_map(Operation::Lose),
        1 => ends().prop_map(Operation::Repeat),
        1 => (ends(), any::<u8>()).prop_map(|(end, at)| Operation::Cut(end, at)),
        1 => ends().prop_map(Operation::Later),
        4 => Just(Operation::FrontendSays),
        8 => ends().prop_map(Operation::Hear),
        2 => prop_oneof![Just(1u64), Just(40), Just(150), Just(600), Just(3_000), Just(11_000), Just(31_000)]
            .prop_map(Operation::Pass),
        4 => ends().prop_map(Operation::Clock),
        1 => Just(Operation::Disconnect),
        4 => ends().prop_map(Operation::SeeEnd),
        1 => ends().prop_map(Operation::Kill),
        4 => ends().prop_map(Operation::SeeDeath),
        1 => ends().prop_map(Operation::Stop),
        2 => ends().prop_map(Operation::Continue),
        1 => Just(Operation::Cancel),
        1 => Just(Operation::Fail),
        1 => Just(Operation::Unwilling),
        1 => Just(Operation::BadCommit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn session_always_has_at_most_one_owner(operations in proptest::collection::vec(operations(), 0..160)) {
        let mut world = World::new(false);
        for operation in operations {
            world.act(operation);
        }
        world.finish();
    }

    /// If neither end fails, dies or gives up, the session is handed over however late each message is read.
    #[test]
    fn late_messages_alone_do_not_prevent_the_handover(operations in proptest::collection::vec(late(), 0..160)) {
        let mut world = World::new(false);
        for operation in operations {
            world.act(operation);
        }
        for end in [End::Source, End::Target] {
            world.act(Operation::Continue(end));
        }
        world.finish();
        assert!(matches!(world.source.state(), Some(Source::HandedOver(Some(_)))), "{world:?}");
        assert!(matches!(world.target.state(), Some(Target::Active(_))), "{world:?}");
    }

    /// Disturbs the hand-over after `steps` undisturbed steps.
    #[test]
    fn session_has_at_most_one_owner_after_any_step(
        steps in 0..80usize,
        operations in proptest::collection::vec(operations(), 0..40),
    ) {
        let mut world = World::new(false);
        for _ in 0..steps {
            world.undisturbed();
        }
        for operation in operations {
            world.act(operation);
        }
        world.finish();
    }
}

/// Operations of well-behaved ends and their front-end, with late messages.
fn late() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => ends().prop_map(Operation::Act),
        4 => ends().prop_map(Operation::Deliver),
        1 => Just(Operation::FrontendSays),
        2 => ends().prop_map(Operation::Hear),
        1 => ends().prop_map(Operation::Clock),
        1 => ends().prop_map(Operation::Stop),
        2 => ends().prop_map(Operation::Continue),
    ]
}
