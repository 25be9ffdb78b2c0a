//! The source and the target of a VM's migration, over a link that loses and repeats messages. Either end may be
//! killed, and the source may hang, at any time. The VM never runs at both ends and, if both live, ends up running at
//! one. Each end performs one action at a time, and each message arrives as late as a test wants, independently of the
//! word.

use std::collections::VecDeque;
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::migration::facts::MachineFacts;
use baton_protocol::migration::message::{Hello, Message, PROGRAM, Prepare, State};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::source::{self, Source};
use baton_protocol::migration::state::{PlatformState, SerialState, VmState};
use baton_protocol::migration::target::{self, Target};
use baton_protocol::ownership::{Owner, SwapOutcome, Word};
use baton_protocol::reasons::Reasons;
use proptest::prelude::*;

/// An operation on the two ends or the link between them.
#[derive(Clone, Copy, Debug)]
enum Operation {
    SourceActs,
    TargetActs,
    DeliverToTarget,
    DeliverToSource,
    Lose(bool),
    Repeat(bool),
    SourceTimeout,
    TargetTimeout,
    Disconnect,
    KillSource,
    KillTarget,
    SourceHangs,
    SourceFails,
    TargetFails,
}

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![
        20 => Just(Operation::SourceActs),
        20 => Just(Operation::TargetActs),
        14 => Just(Operation::DeliverToTarget),
        14 => Just(Operation::DeliverToSource),
        1 => any::<bool>().prop_map(Operation::Lose),
        1 => any::<bool>().prop_map(Operation::Repeat),
        1 => Just(Operation::SourceTimeout),
        1 => Just(Operation::TargetTimeout),
        1 => Just(Operation::Disconnect),
        1 => Just(Operation::KillSource),
        1 => Just(Operation::KillTarget),
        1 => Just(Operation::SourceHangs),
        1 => Just(Operation::SourceFails),
        1 => Just(Operation::TargetFails),
    ]
}

/// Both ends and the state that they share.
struct World {
    source: Option<Source>,
    source_todo: VecDeque<source::Action>,
    target: Option<Target>,
    target_todo: VecDeque<target::Action>,
    source_runs: bool,
    target_runs: bool,
    now: Duration,
    word: Word,
    to_source: VecDeque<Message>,
    to_target: VecDeque<Message>,
    connected: bool,
    source_fails: bool,
    target_fails: bool,
    source_hangs: bool,
    /// The word is invalid.
    garbage: bool,
}

impl World {
    fn new(dry_run: bool) -> Self {
        let hello =
            Hello { program: PROGRAM.to_owned(), dry_run, local: false, machine: MachineFacts::default() };
        let (source, actions) = Source::begin(hello, Duration::ZERO);
        Self {
            source: Some(source),
            source_todo: actions.into(),
            target: Some(Target::begin(Duration::ZERO)),
            target_todo: VecDeque::new(),
            source_runs: true,
            target_runs: false,
            now: Duration::ZERO,
            word: Word::INITIAL,
            to_source: VecDeque::new(),
            to_target: VecDeque::new(),
            connected: true,
            source_fails: false,
            target_fails: false,
            source_hangs: false,
            garbage: false,
        }
    }

    fn swap(&mut self, from: Word, to: Word) -> SwapOutcome {
        if self.garbage {
            return SwapOutcome::Meaningless;
        }
        if self.word != from {
            return SwapOutcome::Lost(self.word);
        }
        self.word = to;
        SwapOutcome::Won
    }

    /// Sends a message, encoded and decoded.
    fn send(queue: &mut VecDeque<Message>, message: &Message) {
        queue.push_back(Message::decode(&message.encode().unwrap()).unwrap());
    }

    fn source_steps(&mut self, event: source::Event) {
        let Some(source) = self.source.take() else { return };
        let (source, actions) = source.step(event, self.now);
        self.source = Some(source);
        self.source_todo = actions.into();
        self.source_ends();
    }

    /// Closes the connection if the source is done.
    fn source_ends(&mut self) {
        if self.source_todo.is_empty() && self.source.as_ref().is_some_and(Source::is_over) {
            self.connected = false;
        }
    }

    fn source_acts(&mut self) {
        let Some(action) = self.source_todo.pop_front() else { return };
        let fails = std::mem::take(&mut self.source_fails);
        let event = match action {
            source::Action::Resume => {
                self.source_runs = true;
                None
            }
            source::Action::Withdraw { from, to } => Some(source::Event::Swapped(self.swap(from, to))),
            source::Action::Offer(word) => {
                assert!(!self.source_runs, "the source offers a running VM");
                let result = self.swap(Word::INITIAL, word);
                (result != SwapOutcome::Won).then(|| source::Event::Failed("the word".to_owned()))
            }
            _ if fails => Some(source::Event::Failed("a test".to_owned())),
            source::Action::Send(message) => {
                Self::send(&mut self.to_target, &message);
                None
            }
            source::Action::Prepare => {
                let prepare = Prepare { ram: Vec::new(), fds: FdManifest::default(), net: Vec::new() };
                Self::send(&mut self.to_target, &Message::Prepare(prepare));
                None
            }
            source::Action::Stop => {
                self.source_runs = false;
                let vm = VmState {
                    vcpus: Vec::new(),
                    platform: PlatformState::default(),
                    serial: SerialState::default(),
                    net: Vec::new(),
                };
                Self::send(&mut self.to_target, &Message::State(State { running: true, vm }));
                Some(source::Event::Stopped)
            }
        };
        match event {
            // The event replaces the remaining actions.
            Some(event) => self.source_steps(event),
            None => self.source_ends(),
        }
    }

    fn target_steps(&mut self, event: target::Event) {
        let Some(target) = self.target.take() else { return };
        let (target, actions) = target.step(event, self.now);
        self.target = Some(target);
        self.target_todo = actions.into();
    }

    fn target_acts(&mut self) {
        let event = match self.target_todo.pop_front() {
            None => return,
            Some(target::Action::Send(message)) => return Self::send(&mut self.to_source, &message),
            Some(target::Action::Activate) => {
                self.target_runs = true;
                return Self::send(&mut self.to_source, &target::active(true));
            }
            Some(target::Action::Take { from, to }) => target::Event::Swapped(self.swap(from, to)),
            Some(target::Action::Judge(_) | target::Action::Prepare(_) | target::Action::Restore(_)) => {
                if std::mem::take(&mut self.target_fails) {
                    target::Event::Failed(Reasons::of([Refusal::Busy]))
                } else {
                    target::Event::Done
                }
            }
        };
        self.target_steps(event);
    }

    /// Performs an operation, then all actions of both ends.
    fn step(&mut self, operation: Operation) {
        self.apply(operation);
        while !self.target_todo.is_empty() || !self.source_todo.is_empty() && !self.source_hangs {
            self.apply(Operation::SourceActs);
            self.apply(Operation::TargetActs);
        }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::DeliverToSource | Operation::SourceTimeout | Operation::SourceActs
                if self.source_hangs => {}
            Operation::SourceActs => self.source_acts(),
            Operation::TargetActs => self.target_acts(),
            // An end with pending actions checks neither the connection nor its deadline.
            Operation::DeliverToTarget | Operation::TargetTimeout if !self.target_todo.is_empty() => {}
            Operation::DeliverToSource | Operation::SourceTimeout if !self.source_todo.is_empty() => {}
            Operation::DeliverToTarget => match self.to_target.pop_front() {
                Some(message) => self.target_steps(target::Event::Message(message)),
                None if !self.connected => self.target_steps(target::Event::Closed),
                None => {}
            },
            Operation::SourceHangs => self.source_hangs = true,
            Operation::DeliverToSource => match self.to_source.pop_front() {
                Some(message) => self.source_steps(source::Event::Message(message)),
                None if !self.connected => self.source_steps(source::Event::Closed),
                None => {}
            },
            Operation::Lose(source) => {
                drop(if source { &mut self.to_source } else { &mut self.to_target }.pop_front());
            }
            Operation::Repeat(source) => {
                let queue = if source { &mut self.to_source } else { &mut self.to_target };
                queue.extend(queue.front().cloned());
            }
            Operation::SourceTimeout => {
                if let Some(deadline) = self.source.as_ref().and_then(Source::deadline) {
                    self.now = self.now.max(deadline);
                    self.source_steps(source::Event::Time);
                }
            }
            Operation::TargetTimeout => {
                if let Some(deadline) = self.target.as_ref().and_then(Target::deadline) {
                    self.now = self.now.max(deadline);
                    self.target_steps(target::Event::Time);
                }
            }
            Operation::Disconnect => self.connected = false,
            Operation::KillSource => {
                self.source = None;
                self.source_todo.clear();
                self.source_runs = false;
                self.connected = false;
            }
            Operation::KillTarget => {
                self.target = None;
                self.target_todo.clear();
                self.target_runs = false;
                self.connected = false;
            }
            Operation::SourceFails => self.source_fails = true,
            Operation::TargetFails => self.target_fails = true,
        }
        self.check();
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.target_runs), "the VM runs at both ends");
        if self.garbage {
            return;
        }
        if self.target_runs {
            assert_eq!(self.word.owner, Owner::Target);
        }
        if self.source_runs {
            assert!(matches!(self.word.owner, Owner::Source | Owner::Aborted));
        }
        match &self.source {
            Some(Source::Completed) => assert_eq!(self.word.owner, Owner::Target),
            Some(Source::Ended { .. } | Source::Possible) => {
                assert!(self.source_runs || !self.source_todo.is_empty());
            }
            _ => {}
        }
    }

    /// Lets both ends finish by timeouts alone, then checks the end state.
    fn finish(&mut self) {
        self.connected &= self.source_hangs;
        let hangs = self.source_hangs;
        while !self.target_todo.is_empty() {
            self.apply(Operation::TargetActs);
        }
        let orphaned = (hangs || self.source.is_none())
            && matches!(self.target, Some(Target::Ready { .. }))
            && self.word.owner == Owner::Offered
            && self.to_target.iter().all(|message| matches!(message, Message::Commit(_)));
        for _ in 0..40 {
            self.step(Operation::DeliverToTarget);
            self.step(Operation::TargetTimeout);
            self.step(Operation::DeliverToSource);
            self.step(Operation::SourceTimeout);
        }
        // A ready target takes the VM of a source that hangs or died after its offer.
        assert!(!orphaned || self.target_runs, "the target did not take the offered VM");
        // A source that hung learns the outcome later.
        self.source_hangs = false;
        for _ in 0..40 {
            self.step(Operation::DeliverToSource);
            self.step(Operation::SourceTimeout);
        }
        let source_lives = self.source.is_some();
        let target_lives = self.target.is_some();
        if let Some(source) = &self.source {
            assert!(source.is_over(), "{source:?}");
        }
        if source_lives && target_lives {
            assert!(self.source_runs || self.target_runs, "the VM runs at neither end");
        }
        // A target that is killed after it took the VM takes the VM with it.
        if source_lives && (self.garbage || self.word.owner != Owner::Target) {
            assert!(self.source_runs, "the source owns the VM but does not run it");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn vm_never_has_two_owners_and_is_never_lost(
        dry_run in prop::bool::weighted(0.05),
        operations in prop::collection::vec(operations(), 0..80),
    ) {
        let mut world = World::new(dry_run);
        for operation in operations {
            world.apply(operation);
        }
        world.finish();
    }

    /// If neither end fails, dies or gives up, the VM moves however late each message is read.
    #[test]
    fn late_messages_alone_do_not_prevent_the_migration(operations in prop::collection::vec(late(), 0..60)) {
        let mut world = World::new(false);
        for operation in operations {
            world.apply(operation);
        }
        for _ in 0..10 {
            world.step(Operation::DeliverToTarget);
            world.step(Operation::DeliverToSource);
        }
        assert_eq!((&world.source, &world.target), (&Some(Source::Completed), &Some(Target::Active)));
        assert!(world.target_runs && !world.source_runs);
    }

    /// With timeouts as well, the first swap wins, and both ends learn the outcome.
    #[test]
    fn both_ends_agree_on_the_owner_after_late_messages_and_timeouts(
        operations in prop::collection::vec(prop_oneof![8 => late(), 1 => Just(Operation::TargetTimeout), 1 => Just(Operation::SourceTimeout)], 0..80),
    ) {
        let mut world = World::new(false);
        for operation in operations {
            world.apply(operation);
        }
        world.finish();
        let completed = world.source == Some(Source::Completed);
        assert_eq!(completed, world.target == Some(Target::Active));
        assert_eq!((completed, !completed), (world.target_runs, world.source_runs));
    }
}

/// Operations of well-behaved ends, with late messages.
fn late() -> impl Strategy<Value = Operation> {
    prop_oneof![
        Just(Operation::SourceActs),
        Just(Operation::TargetActs),
        Just(Operation::DeliverToTarget),
        Just(Operation::DeliverToSource),
    ]
}

#[test]
fn undisturbed_migration_completes() {
    let mut world = World::new(false);
    for _ in 0..10 {
        world.step(Operation::DeliverToTarget);
        world.step(Operation::DeliverToSource);
    }
    assert_eq!((&world.source, &world.target), (&Some(Source::Completed), &Some(Target::Active)));
    assert!(world.target_runs && !world.source_runs);
}

#[test]
fn dry_run_does_not_stop_the_vm() {
    let mut world = World::new(true);
    for _ in 0..10 {
        world.step(Operation::DeliverToTarget);
        world.step(Operation::DeliverToSource);
        assert!(world.source_runs);
    }
    assert_eq!(world.source, Some(Source::Possible));
}

/// Returns a world in which the target is ready, the source hangs, and the target has timed out. With `offered`, the
/// source has offered the VM, but its COMMIT is lost.
fn hanging(offered: bool) -> World {
    let mut world = World::new(false);
    while !matches!(world.target, Some(Target::Ready { .. })) {
        world.step(Operation::DeliverToTarget);
        if !matches!(world.target, Some(Target::Ready { .. })) || offered {
            world.step(Operation::DeliverToSource);
        }
    }
    world.to_target.clear();
    world.step(Operation::SourceHangs);
    world.step(Operation::TargetTimeout);
    world
}

#[test]
fn target_takes_the_vm_when_the_source_hangs_after_its_offer() {
    let mut world = hanging(true);
    assert!(world.target_runs);
    world.source_hangs = false;
    world.step(Operation::SourceTimeout);
    assert_eq!(world.source, Some(Source::Completed));
}

#[test]
fn source_keeps_the_vm_when_it_hangs_before_its_offer() {
    let mut world = hanging(false);
    assert!(matches!(world.target, Some(Target::Ended { .. })) && !world.target_runs);
    world.source_hangs = false;
    world.finish();
    assert!(world.source_runs);
}

#[test]
fn invalid_word_leaves_the_vm_to_the_source() {
    for steps in 0..12 {
        let mut world = World::new(false);
        for _ in 0..steps {
            world.step(Operation::DeliverToTarget);
            world.step(Operation::DeliverToSource);
        }
        // The target already owns the VM from here on.
        if world.word.owner == Owner::Target {
            return;
        }
        world.garbage = true;
        world.step(Operation::DeliverToTarget);
        world.finish();
        assert!(
            world.source_runs && !world.target_runs,
            "after {steps}: {:?} {:?}",
            world.source,
            world.target
        );
    }
    panic!("the target did not take the VM");
}

#[test]
fn source_gives_up_the_vm_only_to_a_word_that_names_the_target() {
    for owner in [Owner::Source, Owner::Offered, Owner::Target, Owner::Aborted, Owner::Settled] {
        let mut world = offered();
        world.word = Word { epoch: 7, owner };
        // Bypasses `apply`, which checks the word after each operation.
        world.source_steps(source::Event::Closed);
        while !world.source_todo.is_empty() {
            world.source_acts();
        }
        let completed = world.source == Some(Source::Completed);
        assert_eq!((completed, world.source_runs), (owner.is_target(), !owner.is_target()));
    }
}

/// Returns a world in which the source has offered the VM and its COMMIT is in transit.
fn offered() -> World {
    let mut world = World::new(false);
    while world.word.owner != Owner::Offered {
        world.step(Operation::DeliverToTarget);
        world.step(Operation::DeliverToSource);
    }
    world
}

#[test]
fn commit_read_after_the_offer_was_withdrawn_starts_nothing() {
    let mut world = offered();
    world.step(Operation::SourceTimeout);
    assert!(world.source_runs);
    world.step(Operation::DeliverToTarget);
    assert!(!world.target_runs && matches!(world.target, Some(Target::Ended { .. })));
}
