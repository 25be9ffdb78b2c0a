//! Source and target of a device, once they have agreed, over a link that loses, delays, repeats and cuts messages, with either end killed at any time:
//! never two owners, and never none. The word changes at once, and each message arrives as late as a test likes.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::VecDeque;

use baton_protocol::codec::Message as _;
use baton_protocol::end_reason::EndReason;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::device::source::{self, Source};
use baton_protocol::handover::device::target::{self, Target};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{Message, Offer};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::ownership::{Offered, Owner, SwapOutcome, Word};
use proptest::prelude::*;

/// What is done to the two ends and to what is between them.
#[derive(Clone, Copy, Debug)]
enum Deed {
    DeliverToTarget,
    DeliverToSource,
    Lose(bool),
    Repeat(bool),
    Cut(bool, u8),
    Later(bool),
    Suspend,
    SourceRing,
    TargetRing,
    TargetRingStops,
    FrontendLeaves { moved: bool },
    Cancel,
    Disconnect,
    KillSource,
    KillTarget,
    Unwilling,
}

fn deeds() -> impl Strategy<Value = Deed> {
    prop_oneof![
        12 => Just(Deed::DeliverToTarget),
        12 => Just(Deed::DeliverToSource),
        1 => any::<bool>().prop_map(Deed::Lose),
        2 => any::<bool>().prop_map(Deed::Repeat),
        1 => any::<(bool, u8)>().prop_map(|(way, at)| Deed::Cut(way, at)),
        2 => any::<bool>().prop_map(Deed::Later),
        5 => Just(Deed::Suspend),
        2 => Just(Deed::SourceRing),
        2 => Just(Deed::TargetRing),
        1 => Just(Deed::TargetRingStops),
        1 => any::<bool>().prop_map(|moved| Deed::FrontendLeaves { moved }),
        1 => Just(Deed::Cancel),
        1 => Just(Deed::Disconnect),
        1 => Just(Deed::KillSource),
        1 => Just(Deed::KillTarget),
        1 => Just(Deed::Unwilling),
    ]
}

/// A device in the target's hands. One that is neither released, activated nor kept is a leak.
type Token = u32;

#[derive(Debug)]
struct World {
    word: Word,
    source: Option<Source>,
    source_uses: bool,
    target: Option<Target<Token>>,
    target_uses: bool,
    target_ring: bool,
    willing: bool,
    to_target: VecDeque<Vec<u8>>,
    to_source: VecDeque<Vec<u8>>,
    /// The connection is open between the two ends.
    linked: bool,
    /// The source, and the target, have not closed their end or seen the other closed.
    source_open: bool,
    target_open: bool,
    /// The word has a value without a meaning.
    garbage: bool,
    /// A test changed the word.
    scribbled: bool,
    made: u32,
    gone: u32,
}

impl World {
    fn new() -> Self {
        Self {
            word: Word::INITIAL,
            source: Some(Source::armed()),
            source_uses: true,
            target: Some(Target::Ready),
            target_uses: false,
            target_ring: false,
            willing: true,
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            linked: true,
            source_open: true,
            target_open: true,
            garbage: false,
            scribbled: false,
            made: 0,
            gone: 0,
        }
    }

    fn post_to_target(&mut self, message: &Message) {
        if self.linked {
            self.to_target.push_back(message.encode().unwrap());
        }
    }

    fn post_to_source(&mut self, message: &Message) {
        if self.linked {
            self.to_source.push_back(message.encode().unwrap());
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

    fn judge_offer(&self, epoch: u64) -> Offered {
        if self.garbage { Offered::Impossible } else { self.word.judge_offer(epoch) }
    }

    fn tell_source(&mut self, event: source::Event) {
        let Some(state) = self.source.take() else { return };
        let (state, actions) = state.step(event);
        self.source = Some(state);
        self.do_source(actions);
        self.check();
    }

    fn do_source(&mut self, actions: Vec<source::Action>) {
        for action in actions {
            match action {
                source::Action::Offer(word) => {
                    assert!(self.source_uses, "offers what it does not have");
                    self.source_uses = false;
                    let before = Word { epoch: word.epoch - 1, owner: Owner::Source };
                    if self.swap(before, word) != SwapOutcome::Won {
                        self.close_source();
                        self.tell_source(source::Event::Closed);
                        continue;
                    }
                    let device = DeviceState::default();
                    let fds = FdManifest::default();
                    self.post_to_target(&Message::Offer(Offer { epoch: word.epoch, device, fds }));
                }
                source::Action::Swap { from, to } => {
                    let result = self.swap(from, to);
                    self.tell_source(source::Event::Swapped(result));
                }
                source::Action::Resume => self.source_uses = true,
                source::Action::Release => assert!(!self.source_uses),
                source::Action::Send(message) => self.post_to_target(&message),
                source::Action::Close => self.close_source(),
            }
        }
    }

    fn tell_target(&mut self, event: target::Event<Token>) {
        let Some(state) = self.target.take() else { return };
        let (state, actions) = state.step(event);
        self.target = Some(state);
        self.do_target(actions);
        self.check();
    }

    fn do_target(&mut self, actions: Vec<target::Action<Token>>) {
        for action in actions {
            match action {
                target::Action::Adopt(offer) => {
                    let word = Word { epoch: offer.epoch, owner: Owner::Offered };
                    let event = match self.judge_offer(offer.epoch) {
                        Offered::Withdrawn => target::Event::Withdrawn,
                        Offered::Stands if self.willing => {
                            self.made += 1;
                            target::Event::Adoption(Ok((word, self.made)))
                        }
                        Offered::Stands | Offered::Impossible => {
                            target::Event::Adoption(Err(Refusal::Busy.into()))
                        }
                    };
                    self.tell_target(event);
                    if self.target_ring {
                        self.tell_target(target::Event::RingStarting);
                    }
                }
                target::Action::Swap { from, to } => {
                    let outcome = self.swap(from, to);
                    self.tell_target(target::Event::Swapped(outcome));
                }
                target::Action::Look => {
                    let word = Some(self.word).filter(|_| !self.garbage);
                    self.tell_target(target::Event::Seen(word));
                }
                target::Action::Activate(_) => {
                    self.gone += 1;
                    self.target_uses = true;
                }
                target::Action::Release(_) => self.gone += 1,
                target::Action::Send(message) => self.post_to_source(&message),
                target::Action::Close => self.close_target(),
            }
        }
    }

    /// The source hears no more. The target hears what the source has said, and then of the end.
    fn close_source(&mut self) {
        (self.linked, self.source_open) = (false, false);
        self.to_source.clear();
    }

    /// The same the other way round.
    fn close_target(&mut self) {
        (self.linked, self.target_open) = (false, false);
        self.to_target.clear();
    }

    fn deliver_to_target(&mut self) {
        match self.to_target.pop_front().map(|packet| Message::decode(&packet)) {
            Some(Ok(message)) => self.tell_target(target::Event::Message(message)),
            None if self.linked || !self.target_open => {}
            Some(Err(_)) | None => {
                self.close_target();
                self.tell_target(target::Event::Closed);
            }
        }
    }

    fn deliver_to_source(&mut self) {
        match self.to_source.pop_front().map(|packet| Message::decode(&packet)) {
            Some(Ok(message)) => self.tell_source(source::Event::Message(message)),
            None if self.linked || !self.source_open => {}
            Some(Err(_)) | None => {
                self.close_source();
                self.tell_source(source::Event::Closed);
            }
        }
    }

    /// Delivers all that is on its way, and what follows from it.
    fn deliver_all(&mut self) {
        while !self.to_target.is_empty()
            || !self.to_source.is_empty()
            || !self.linked && (self.source_open || self.target_open)
        {
            self.deliver_to_target();
            self.deliver_to_source();
        }
    }

    fn queue(&mut self, to_target: bool) -> &mut VecDeque<Vec<u8>> {
        if to_target { &mut self.to_target } else { &mut self.to_source }
    }

    fn act(&mut self, deed: Deed) {
        match deed {
            Deed::DeliverToTarget => self.deliver_to_target(),
            Deed::DeliverToSource => self.deliver_to_source(),
            Deed::Lose(way) => drop(self.queue(way).pop_front()),
            Deed::Repeat(way) => {
                let packet = self.queue(way).front().cloned();
                self.queue(way).extend(packet);
            }
            Deed::Cut(way, at) => {
                if let Some(packet) = self.queue(way).front_mut() {
                    packet.truncate(usize::from(at));
                }
            }
            Deed::Later(way) => {
                let packet = self.queue(way).pop_front();
                self.queue(way).extend(packet);
            }
            // A source whose rings run is not suspended twice.
            Deed::Suspend => self.tell_source(source::Event::Suspended),
            Deed::SourceRing => self.tell_source(source::Event::RingStarting),
            Deed::TargetRing => {
                self.target_ring = true;
                self.tell_target(target::Event::RingStarting);
            }
            Deed::TargetRingStops => self.target_ring = false,
            Deed::FrontendLeaves { moved } => self.tell_source(source::Event::FrontendLeft { moved }),
            Deed::Cancel => self.tell_source(source::Event::Cancel),
            Deed::Disconnect => self.linked = false,
            Deed::KillSource => {
                self.source = None;
                self.source_uses = false;
                self.close_source();
            }
            Deed::KillTarget => {
                if let Some(Target::Adopted { .. }) = self.target {
                    self.gone += 1;
                }
                self.target = None;
                self.target_uses = false;
                self.close_target();
            }
            Deed::Unwilling => self.willing = false,
        }
        self.check();
    }

    fn check(&self) {
        assert!(!(self.source_uses && self.target_uses), "two owners");
        if !self.garbage && !self.scribbled {
            assert!(!self.target_uses || self.word.owner == Owner::Target);
            assert!(!self.source_uses || matches!(self.word.owner, Owner::Source | Owner::Aborted));
        }
        let kept = u32::from(matches!(self.target, Some(Target::Adopted { .. })));
        // While an event is under way, its state is nowhere.
        if self.target.is_some() {
            assert_eq!(self.made, self.gone + kept, "a device was lost");
        }
    }

    /// Whoever is left gets a ring: then somebody owns the device.
    fn check_not_lost(&mut self) {
        self.deliver_all();
        let taken = self.word.owner == Owner::Target;
        if self.source.is_some() {
            self.tell_source(source::Event::RingStarting);
            assert!(self.source_uses || taken, "the source lives, and nobody has the device: {self:?}");
        } else if matches!(self.target, Some(Target::Adopted { .. })) && self.word.owner == Owner::Offered {
            self.tell_target(target::Event::RingStarting);
            assert!(self.target_uses, "the target held what was offered, and did not get it: {self:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_owners_and_never_none(deeds in proptest::collection::vec(deeds(), 0..80)) {
        let mut world = World::new();
        for deed in deeds {
            world.act(deed);
        }
        world.check_not_lost();
    }

    /// Neither end refuses, fails or ends: however late each message is read, the source stays armed, and its next stop
    /// hands the device over.
    #[test]
    fn after_late_deliveries_alone_an_armed_hand_over_goes_through(deeds in proptest::collection::vec(late(), 0..80)) {
        let mut world = World::new();
        for deed in deeds {
            world.act(deed);
        }
        world.deliver_all();
        if !world.target_uses {
            world.act(Deed::TargetRingStops);
            world.act(Deed::SourceRing);
            world.deliver_all();
            assert!(matches!(world.source, Some(Source::Armed { .. })), "{world:?}");
            world.act(Deed::Suspend);
            world.deliver_all();
            world.act(Deed::TargetRing);
            world.deliver_all();
        }
        assert!(world.target_uses, "{world:?}");
        assert_eq!(world.source, Some(Source::HandedOver));
    }
}

/// What honest ends do, and messages that take their time.
fn late() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => Just(Deed::DeliverToTarget),
        4 => Just(Deed::DeliverToSource),
        4 => Just(Deed::Suspend),
        4 => Just(Deed::SourceRing),
        1 => Just(Deed::TargetRing),
        1 => Just(Deed::TargetRingStops),
    ]
}

fn offered() -> World {
    let mut world = World::new();
    world.act(Deed::Suspend);
    world.act(Deed::DeliverToTarget);
    world.act(Deed::DeliverToSource);
    assert!(matches!(world.source, Some(Source::Offered { adopted: true, .. })));
    assert!(!world.source_uses && !world.target_uses);
    world
}

#[test]
fn the_targets_first_ring_takes_the_device() {
    let mut world = offered();
    world.act(Deed::TargetRing);
    assert!(world.target_uses);
    world.act(Deed::DeliverToSource);
    assert_eq!(world.source, Some(Source::HandedOver));
    assert!(world.source.unwrap().is_done());
}

#[test]
fn the_sources_own_ring_takes_it_back_and_it_can_be_offered_again() {
    let mut world = offered();
    world.act(Deed::SourceRing);
    assert!(world.source_uses);
    // A ring of the target's that starts before it hears of that gets nothing.
    world.act(Deed::TargetRing);
    assert_eq!(world.target, Some(Target::Ready));
    world.act(Deed::TargetRingStops);
    world.act(Deed::DeliverToTarget);
    world.act(Deed::Suspend);
    world.act(Deed::DeliverToTarget);
    world.act(Deed::TargetRing);
    assert!(world.target_uses);
    assert_eq!(world.word, Word { epoch: 2, owner: Owner::Target });
}

#[test]
fn a_ring_that_started_before_the_offer_takes_it_when_it_comes() {
    let mut world = World::new();
    world.act(Deed::TargetRing);
    world.act(Deed::Suspend);
    world.act(Deed::DeliverToTarget);
    assert!(world.target_uses);
}

#[test]
fn a_source_that_ends_while_it_offers_leaves_the_device_to_the_target() {
    let mut world = offered();
    world.act(Deed::FrontendLeaves { moved: true });
    assert!(world.source.as_ref().unwrap().is_done());
    world.act(Deed::KillSource);
    world.act(Deed::DeliverToTarget);
    assert!(matches!(world.target, Some(Target::Adopted { linked: false, .. })));
    world.act(Deed::TargetRing);
    assert!(world.target_uses);
}

#[test]
fn a_front_end_that_left_too_early_leaves_the_device_to_the_source() {
    let mut world = offered();
    world.act(Deed::FrontendLeaves { moved: false });
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Unasked)));
    world.act(Deed::TargetRing);
    assert!(!world.target_uses);
}

#[test]
fn a_target_that_dies_leaves_the_device_to_the_source() {
    let mut world = offered();
    world.act(Deed::KillTarget);
    world.act(Deed::DeliverToSource);
    assert!(world.source_uses);
    assert_eq!(world.source, Some(Source::Ended(EndReason::Closed)));
}

#[test]
fn a_cancelled_offer_cannot_be_taken() {
    let mut world = offered();
    world.act(Deed::Cancel);
    assert!(world.source_uses);
    world.act(Deed::TargetRing);
    assert!(!world.target_uses);
    assert_eq!(world.word.owner, Owner::Aborted);
}

#[test]
fn a_refused_offer_goes_back() {
    let mut world = World::new();
    world.act(Deed::Unwilling);
    world.act(Deed::Suspend);
    world.act(Deed::DeliverToTarget);
    world.act(Deed::DeliverToSource);
    assert!(world.source_uses);
}

#[test]
fn an_offer_that_is_read_after_it_was_taken_back_ends_nothing() {
    let mut world = World::new();
    world.act(Deed::Suspend);
    world.act(Deed::SourceRing);
    world.deliver_all();
    assert!(matches!(world.source, Some(Source::Armed { .. })), "{world:?}");
    assert_eq!(world.target, Some(Target::Ready));
    assert!(world.linked);
}

#[test]
fn the_last_of_several_offers_counts_when_all_are_read_late() {
    let mut world = World::new();
    for _ in 0..3 {
        world.act(Deed::Suspend);
        world.act(Deed::SourceRing);
    }
    world.act(Deed::Suspend);
    world.deliver_all();
    assert!(matches!(world.source, Some(Source::Offered { adopted: true, .. })), "{world:?}");
    world.act(Deed::TargetRing);
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
        world.act(Deed::Suspend);
        world.word = word;
        world.scribbled = true;
        world.deliver_to_target();
        assert_eq!(world.target, Some(Target::Ended), "{word:?}");
    }
}

#[test]
fn a_word_without_a_meaning_leaves_the_device_to_the_source() {
    let ends = [Deed::SourceRing, Deed::Cancel, Deed::Disconnect, Deed::KillTarget, Deed::DeliverToTarget];
    for adopted in [false, true] {
        for end in ends {
            let mut world = if adopted { offered() } else { World::new() };
            world.act(Deed::Suspend);
            world.garbage = true;
            world.act(end);
            world.act(Deed::TargetRing);
            world.deliver_all();
            world.act(Deed::SourceRing);
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
        world.act(Deed::SourceRing);
        let state =
            if owner.is_target() { Source::HandedOver } else { Source::Ended(EndReason::Meaningless) };
        assert_eq!(world.source, Some(state));
    }
}
