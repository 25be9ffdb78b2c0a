//! The prologue of device and session hand-overs, over a link that loses, repeats and truncates messages. Either end
//! may refuse, die or fall silent.

use std::collections::VecDeque;
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::Phase;
use baton_protocol::handover::prologue::{
    Introduction, PATIENCE, Purpose, SourceAction, SourceEvent, SourcePrologue, TargetAction, TargetEvent,
    TargetPrologue,
};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{Hello, Message, PROTOCOL, Prepare};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::SessionState;
use baton_protocol::version::Versions;
use proptest::prelude::*;

/// A step of a test. `true` is the direction to the target.
#[derive(Clone, Copy, Debug)]
enum Step {
    Deliver(bool),
    Lose(bool),
    Repeat(bool),
    Cut(bool, u8),
    Pass(u64),
    SourceDies,
    TargetDies,
    Cancel,
    TargetRefuses,
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => any::<bool>().prop_map(Step::Deliver),
        1 => any::<bool>().prop_map(Step::Lose),
        1 => any::<bool>().prop_map(Step::Repeat),
        1 => any::<(bool, u8)>().prop_map(|(way, at)| Step::Cut(way, at)),
        1 => prop_oneof![Just(1u64), Just(1_000), Just(2_500)].prop_map(Step::Pass),
        1 => Just(Step::SourceDies),
        1 => Just(Step::TargetDies),
        1 => Just(Step::Cancel),
        1 => Just(Step::TargetRefuses),
    ]
}

#[derive(Debug)]
struct World {
    purpose: Purpose,
    source: SourcePrologue,
    target: TargetPrologue,
    to_source: VecDeque<Vec<u8>>,
    to_target: VecDeque<Vec<u8>>,
    linked: bool,
    refuses: bool,
    now: Duration,
}

impl World {
    fn new(purpose: Purpose, dry_run: bool) -> Self {
        let (source, hello) = SourcePrologue::begin(purpose, "source", dry_run, Duration::ZERO);
        let own = Introduction { program: "target".to_owned(), wants_vhost: true };
        Self {
            purpose,
            source,
            target: TargetPrologue::begin(own, Duration::ZERO),
            to_source: VecDeque::new(),
            to_target: VecDeque::from([hello.encode().unwrap()]),
            linked: true,
            refuses: false,
            now: Duration::ZERO,
        }
    }

    fn tell_source(&mut self, event: SourceEvent) {
        let (source, actions) = self.source.clone().step(event, self.now);
        self.source = source;
        for action in actions {
            match action {
                SourceAction::Prepare => {
                    let session = (self.purpose == Purpose::Session).then(Box::<SessionState>::default);
                    let prepare = Message::Prepare(Prepare { device: DeviceState::default(), session });
                    self.to_target.push_back(prepare.encode().unwrap());
                }
                SourceAction::Close => self.linked = false,
            }
        }
    }

    fn tell_target(&mut self, event: TargetEvent) {
        let (target, actions) = self.target.clone().step(event, self.now);
        self.target = target;
        for action in actions {
            match action {
                TargetAction::Judge(purpose, prepare) => {
                    assert_eq!(purpose, self.purpose);
                    assert_eq!(prepare.session.is_some(), purpose == Purpose::Session);
                    let verdict = if self.refuses { Err(Refusal::Busy.into()) } else { Ok(()) };
                    self.tell_target(TargetEvent::Judged(verdict));
                }
                TargetAction::Send(message) => self.to_source.push_back(message.encode().unwrap()),
                TargetAction::Close => self.linked = false,
            }
        }
    }

    fn deliver(&mut self, to_target: bool) {
        let queue = if to_target { &mut self.to_target } else { &mut self.to_source };
        let message = queue.pop_front().map(|packet| Message::decode(&packet));
        match (message, to_target) {
            (Some(Ok(message)), true) => self.tell_target(TargetEvent::Message(message)),
            (Some(Ok(message)), false) => self.tell_source(SourceEvent::Message(message)),
            (None, _) if self.linked => {}
            (_, true) => self.tell_target(TargetEvent::Closed),
            (_, false) => self.tell_source(SourceEvent::Closed),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Deliver(way) => self.deliver(way),
            Step::Lose(way) => drop(self.queue(way).pop_front()),
            Step::Repeat(way) => {
                let packet = self.queue(way).front().cloned();
                self.queue(way).extend(packet);
            }
            Step::Cut(way, at) => {
                if let Some(packet) = self.queue(way).front_mut() {
                    packet.truncate(usize::from(at));
                }
            }
            Step::Pass(milliseconds) => {
                self.now += Duration::from_millis(milliseconds);
                self.tell_source(SourceEvent::Time);
                self.tell_target(TargetEvent::Time);
            }
            Step::SourceDies => self.tell_target(TargetEvent::Dead),
            Step::TargetDies => self.tell_source(SourceEvent::Dead),
            Step::Cancel => self.tell_source(SourceEvent::Cancel),
            Step::TargetRefuses => self.refuses = true,
        }
    }

    fn queue(&mut self, to_target: bool) -> &mut VecDeque<Vec<u8>> {
        if to_target { &mut self.to_target } else { &mut self.to_source }
    }

    /// Delivers everything, then lets time pass until neither end has a deadline.
    fn finish(&mut self) {
        for _ in 0..8 {
            while !self.to_target.is_empty() || !self.to_source.is_empty() {
                self.deliver(true);
                self.deliver(false);
            }
            self.step(Step::Pass(2_500));
        }
    }
}

fn purposes() -> impl Strategy<Value = Purpose> {
    prop_oneof![Just(Purpose::Device), Just(Purpose::Session)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn source_agrees_only_after_the_target_has_agreed(
        purpose in purposes(),
        dry_run: bool,
        steps in proptest::collection::vec(steps(), 0..30),
    ) {
        let mut world = World::new(purpose, dry_run);
        for step in steps {
            world.step(step);
            let agreed = matches!(world.source, SourcePrologue::Agreed { .. });
            prop_assert!(!agreed || world.target == TargetPrologue::Agreed(purpose), "{world:?}");
            prop_assert!(!agreed || !dry_run, "{world:?}");
        }
        world.finish();
        prop_assert_eq!((world.source.deadline(), world.target.deadline()), (None, None));
    }
}

#[test]
fn both_ends_agree_if_undisturbed() {
    for purpose in [Purpose::Device, Purpose::Session] {
        let mut world = World::new(purpose, false);
        world.finish();
        // Only the source of a session can provide vhost-net instances.
        let wants_vhost = purpose == Purpose::Session;
        assert_eq!(world.source, SourcePrologue::Agreed { wants_vhost });
        assert_eq!(world.target, TargetPrologue::Agreed(purpose));
        assert!(world.linked);
    }
}

#[test]
fn dry_run_ends_when_the_target_agrees() {
    let mut world = World::new(Purpose::Session, true);
    world.finish();
    assert_eq!(world.source, SourcePrologue::Ended { phase: Phase::Check, reason: EndReason::Possible });
    assert!(!world.linked);
}

#[test]
fn each_end_gives_up_after_two_seconds_of_silence() {
    let just_before = PATIENCE - Duration::from_millis(1);
    for delivered in 0..4 {
        let mut world = World::new(Purpose::Device, false);
        for turn in 0..delivered {
            world.deliver(turn % 2 == 0);
        }
        if matches!(world.source, SourcePrologue::Agreed { .. }) {
            panic!("the source agreed after {delivered} messages");
        }
        world.to_target.clear();
        world.to_source.clear();
        world.step(Step::Pass(u64::try_from(just_before.as_millis()).unwrap()));
        assert!(world.source.deadline().is_some(), "{world:?}");
        world.step(Step::Pass(1));
        let phase = if delivered < 2 { Phase::Greet } else { Phase::Check };
        assert_eq!(world.source, SourcePrologue::Ended { phase, reason: EndReason::Silent });
        assert_eq!(world.target.deadline(), None, "{world:?}");
    }
}

#[test]
fn end_reports_its_phase_and_reason() {
    type Case = (SourceEvent, EndReason);
    let cases: [Case; 5] = [
        (SourceEvent::Closed, EndReason::Closed),
        (SourceEvent::Dead, EndReason::Dead),
        (SourceEvent::Cancel, EndReason::Cancelled),
        (SourceEvent::Message(Message::Adopted(of_offer())), EndReason::Wrong("ADOPTED")),
        (refusal(), EndReason::Refused(Refusal::Busy.into())),
    ];
    for (event, reason) in cases {
        for (delivered, phase) in [(0, Phase::Greet), (2, Phase::Check)] {
            let mut world = World::new(Purpose::Session, false);
            for turn in 0..delivered {
                world.deliver(turn % 2 == 0);
            }
            world.tell_source(event.clone());
            assert_eq!(world.source, SourcePrologue::Ended { phase, reason: reason.clone() });
            assert!(!world.linked);
        }
    }
}

fn of_offer() -> baton_protocol::handover::wire::message::OfOffer {
    baton_protocol::handover::wire::message::OfOffer { epoch: 1 }
}

fn refusal() -> SourceEvent {
    let reasons = Refusal::Busy.into();
    SourceEvent::Message(Message::Refuse(baton_protocol::handover::wire::message::Refuse { reasons }))
}

/// Returns the name of the reason with which a target refuses after these events.
fn refused(events: &[TargetEvent]) -> String {
    let own = Introduction { program: String::new(), wants_vhost: false };
    let mut target = TargetPrologue::begin(own, Duration::ZERO);
    let mut last = Vec::new();
    for event in events {
        (target, last) = target.step(event.clone(), Duration::ZERO);
    }
    assert_eq!(target, TargetPrologue::Ended);
    match &last[..] {
        [TargetAction::Send(Message::Refuse(refuse)), TargetAction::Close] => {
            refuse.reasons.0[0].name.clone()
        }
        actions => panic!("{actions:?}"),
    }
}

#[test]
fn target_names_the_reason_for_its_refusal() {
    let hello = |purpose: &str| {
        let (purpose, program) = (purpose.to_owned(), String::new());
        TargetEvent::Message(Message::Hello(Hello { purpose, program, dry_run: false, wants_vhost: false }))
    };
    let prepare =
        TargetEvent::Message(Message::Prepare(Prepare { device: DeviceState::default(), session: None }));
    assert_eq!(refused(&[hello("kernel")]), "purpose");
    assert_eq!(refused(&[hello("session"), prepare.clone()]), "session");
    let busy = TargetEvent::Judged(Err(Refusal::Busy.into()));
    assert_eq!(refused(&[hello("device"), prepare, busy]), "busy");
    let later = Versions { oldest: PROTOCOL.versions.newest + 1, newest: PROTOCOL.versions.newest + 1 };
    let error = PROTOCOL.versions.common(later).unwrap_err();
    assert_eq!(refused(&[TargetEvent::Stranger(error)]), "version");
}
