//! Source and target over a link that loses, repeats and cuts messages, with either end killed or hanging at any time:
//! the VM never runs at both, and where both ends live never at neither.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::VecDeque;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::migration::facts::MachineFacts;
use baton_protocol::migration::message::{Hello, Message, PROGRAM, Prepare, State};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::source::{self, Source};
use baton_protocol::migration::state::{PlatformState, SerialState, VmState};
use baton_protocol::migration::target::{self, Target};
use baton_protocol::ownership::{Owner, Word};
use baton_protocol::reasons::Reasons;
use proptest::prelude::*;

/// What is done to the two ends and to what is between them.
#[derive(Clone, Copy, Debug)]
enum Deed {
    DeliverToTarget,
    DeliverToSource,
    Lose(bool),
    Repeat(bool),
    SourceTimeout,
    TargetTimeout,
    Disconnect,
    KillSource,
    KillTarget,
    /// From now on it does nothing.
    SourceHangs,
    /// What is asked of this end next fails.
    SourceFails,
    TargetFails,
}

fn deeds() -> impl Strategy<Value = Deed> {
    prop_oneof![
        14 => Just(Deed::DeliverToTarget),
        14 => Just(Deed::DeliverToSource),
        1 => any::<bool>().prop_map(Deed::Lose),
        1 => any::<bool>().prop_map(Deed::Repeat),
        1 => Just(Deed::SourceTimeout),
        1 => Just(Deed::TargetTimeout),
        1 => Just(Deed::Disconnect),
        1 => Just(Deed::KillSource),
        1 => Just(Deed::KillTarget),
        1 => Just(Deed::SourceHangs),
        1 => Just(Deed::SourceFails),
        1 => Just(Deed::TargetFails),
    ]
}

/// Both ends, and what they share.
struct World {
    source: Option<Source>,
    target: Option<Target>,
    source_runs: bool,
    target_runs: bool,
    word: Word,
    to_source: VecDeque<Message>,
    to_target: VecDeque<Message>,
    connected: bool,
    source_fails: bool,
    target_fails: bool,
    source_hangs: bool,
}

impl World {
    fn new(dry_run: bool) -> Self {
        let hello =
            Hello { program: PROGRAM.to_owned(), dry_run, local: false, machine: MachineFacts::default() };
        let (source, actions) = Source::begin(hello);
        let mut world = Self {
            source: Some(source),
            target: Some(Target::Waiting),
            source_runs: true,
            target_runs: false,
            word: Word::INITIAL,
            to_source: VecDeque::new(),
            to_target: VecDeque::new(),
            connected: true,
            source_fails: false,
            target_fails: false,
            source_hangs: false,
        };
        world.source_acts(actions);
        world
    }

    fn swap(&mut self, from: Word, to: Word) -> bool {
        let won = self.word == from;
        if won {
            self.word = to;
        }
        won
    }

    /// Over the wire, as bytes.
    fn send(queue: &mut VecDeque<Message>, message: &Message) {
        queue.push_back(Message::decode(&message.encode().unwrap()).unwrap());
    }

    fn source_steps(&mut self, event: source::Event) {
        let Some(source) = self.source.take() else { return };
        let (source, actions) = source.step(event);
        let over = source.is_over();
        self.source = Some(source);
        self.source_acts(actions);
        if over && self.connected {
            self.disconnect_source_side();
        }
    }

    fn source_acts(&mut self, actions: Vec<source::Action>) {
        for action in actions {
            let fails = std::mem::take(&mut self.source_fails);
            let event = match action {
                source::Action::Resume => {
                    self.source_runs = true;
                    None
                }
                source::Action::Withdraw { from, to } => {
                    Some(source::Event::Swapped { won: self.swap(from, to) })
                }
                source::Action::Offer(word) => {
                    assert!(!self.source_runs, "offered while it runs");
                    assert!(self.swap(Word::INITIAL, word));
                    None
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
            if let Some(event) = event {
                self.source_steps(event);
                return;
            }
        }
    }

    fn target_steps(&mut self, event: target::Event) {
        let Some(target) = self.target.take() else { return };
        let (target, actions) = target.step(event);
        self.target = Some(target);
        for action in actions {
            let event = match action {
                target::Action::Send(message) => {
                    Self::send(&mut self.to_source, &message);
                    continue;
                }
                target::Action::Activate => {
                    self.target_runs = true;
                    Self::send(&mut self.to_source, &target::active(true));
                    continue;
                }
                target::Action::Take { from, to } => target::Event::Swapped { won: self.swap(from, to) },
                target::Action::Judge(_) | target::Action::Prepare(_) | target::Action::Restore(_) => {
                    if std::mem::take(&mut self.target_fails) {
                        target::Event::Failed(Reasons::of([Refusal::Busy]))
                    } else {
                        target::Event::Done
                    }
                }
            };
            self.target_steps(event);
        }
    }

    fn disconnect_source_side(&mut self) {
        self.connected = false;
    }

    fn do_deed(&mut self, deed: Deed) {
        match deed {
            Deed::DeliverToTarget => match self.to_target.pop_front() {
                Some(message) => self.target_steps(target::Event::Message(message)),
                None if !self.connected => self.target_steps(target::Event::Closed),
                None => {}
            },
            Deed::DeliverToSource | Deed::SourceTimeout if self.source_hangs => {}
            Deed::SourceHangs => self.source_hangs = true,
            Deed::DeliverToSource => match self.to_source.pop_front() {
                Some(message) => self.source_steps(source::Event::Message(message)),
                None if !self.connected => self.source_steps(source::Event::Closed),
                None => {}
            },
            Deed::Lose(source) => {
                drop(if source { &mut self.to_source } else { &mut self.to_target }.pop_front());
            }
            Deed::Repeat(source) => {
                let queue = if source { &mut self.to_source } else { &mut self.to_target };
                queue.extend(queue.front().cloned());
            }
            Deed::SourceTimeout => {
                if self.source.as_ref().is_some_and(|source| source.patience().is_some()) {
                    self.source_steps(source::Event::Timeout);
                }
            }
            Deed::TargetTimeout => {
                if self.target.as_ref().is_some_and(|target| target.patience().is_some()) {
                    self.target_steps(target::Event::Timeout);
                }
            }
            Deed::Disconnect => self.connected = false,
            Deed::KillSource => {
                self.source = None;
                self.source_runs = false;
                self.connected = false;
            }
            Deed::KillTarget => {
                self.target = None;
                self.target_runs = false;
                self.connected = false;
            }
            Deed::SourceFails => self.source_fails = true,
            Deed::TargetFails => self.target_fails = true,
        }
        self.check();
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.target_runs), "it runs at both");
        if self.target_runs {
            assert_eq!(self.word.owner, Owner::Target);
        }
        if self.source_runs {
            assert!(matches!(self.word.owner, Owner::Source | Owner::Aborted));
        }
        match &self.source {
            Some(Source::Completed) => assert_eq!(self.word.owner, Owner::Target),
            Some(Source::Ended { .. } | Source::Possible) => assert!(self.source_runs),
            _ => {}
        }
    }

    /// Lets both ends come to their end by time alone.
    fn finish(&mut self) {
        self.connected &= self.source_hangs;
        let hangs = self.source_hangs;
        let orphaned = (hangs || self.source.is_none())
            && self.target == Some(Target::Ready)
            && self.word.owner == Owner::Offered
            && self.to_target.iter().all(|message| matches!(message, Message::Commit(_)));
        for _ in 0..40 {
            self.do_deed(Deed::DeliverToTarget);
            self.do_deed(Deed::TargetTimeout);
            self.do_deed(Deed::DeliverToSource);
            self.do_deed(Deed::SourceTimeout);
        }
        // And a source that hangs or was killed after its offer leaves it to a target that is ready for it.
        assert!(!orphaned || self.target_runs, "the target did not take what was offered to it");
        // One that hung finds out later.
        self.source_hangs = false;
        for _ in 0..40 {
            self.do_deed(Deed::DeliverToSource);
            self.do_deed(Deed::SourceTimeout);
        }
        let source_lives = self.source.is_some();
        let target_lives = self.target.is_some();
        if let Some(source) = &self.source {
            assert!(source.is_over(), "{source:?}");
        }
        if source_lives && target_lives {
            assert!(self.source_runs || self.target_runs, "it runs at neither");
        }
        // A target that was killed after it had taken the VM takes it along.
        if source_lives && self.word.owner != Owner::Target {
            assert!(self.source_runs, "the source has the VM, and it stands still");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_two_and_never_none(dry_run in prop::bool::weighted(0.05), deeds in prop::collection::vec(deeds(), 0..40)) {
        let mut world = World::new(dry_run);
        for deed in deeds {
            world.do_deed(deed);
        }
        world.finish();
    }
}

#[test]
fn undisturbed_it_moves() {
    let mut world = World::new(false);
    for _ in 0..10 {
        world.do_deed(Deed::DeliverToTarget);
        world.do_deed(Deed::DeliverToSource);
    }
    assert_eq!((&world.source, &world.target), (&Some(Source::Completed), &Some(Target::Active)));
    assert!(world.target_runs && !world.source_runs);
}

#[test]
fn a_dry_run_stops_nothing() {
    let mut world = World::new(true);
    for _ in 0..10 {
        world.do_deed(Deed::DeliverToTarget);
        world.do_deed(Deed::DeliverToSource);
        assert!(world.source_runs);
    }
    assert_eq!(world.source, Some(Source::Possible));
}

/// As far as the target being ready; `offered`: the source, too, but its COMMIT is lost with it.
fn hanging(offered: bool) -> World {
    let mut world = World::new(false);
    while world.target != Some(Target::Ready) {
        world.do_deed(Deed::DeliverToTarget);
        if world.target != Some(Target::Ready) || offered {
            world.do_deed(Deed::DeliverToSource);
        }
    }
    world.to_target.clear();
    world.do_deed(Deed::SourceHangs);
    world.do_deed(Deed::TargetTimeout);
    world
}

#[test]
fn a_source_that_hangs_after_its_offer_leaves_the_vm_to_its_target() {
    let mut world = hanging(true);
    assert!(world.target_runs);
    world.source_hangs = false;
    world.do_deed(Deed::SourceTimeout);
    assert_eq!(world.source, Some(Source::Completed));
}

#[test]
fn a_source_that_hangs_before_its_offer_has_the_vm_when_it_goes_on() {
    let mut world = hanging(false);
    assert!(matches!(world.target, Some(Target::Ended { .. })) && !world.target_runs);
    world.source_hangs = false;
    world.finish();
    assert!(world.source_runs);
}
