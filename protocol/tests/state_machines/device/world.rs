//! A source and a target of a device's hand-over, with the messages, the ownership word and the front-end between them.

use std::collections::VecDeque;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::device::source::{self, Source};
use baton_protocol::handover::device::target::{self, Target};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{Message, Offer};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::ownership::{Offered, Owner, SwapOutcome, Word};

/// What a test does to the two ends and to the link between them.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
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

/// A device in the target's hands. One that is neither released, activated nor kept is a leak.
pub type Token = u32;

#[derive(Debug)]
pub struct World {
    pub word: Word,
    pub source: Option<Source>,
    pub source_uses: bool,
    pub target: Option<Target<Token>>,
    pub target_uses: bool,
    pub target_ring: bool,
    pub willing: bool,
    pub to_target: VecDeque<Vec<u8>>,
    pub to_source: VecDeque<Vec<u8>>,
    /// The connection is open between the two ends.
    pub linked: bool,
    /// The source, and the target, have not closed their end or seen the other closed.
    pub source_open: bool,
    pub target_open: bool,
    /// The word has a value without a meaning.
    pub garbage: bool,
    /// A test changed the word.
    pub scribbled: bool,
    pub made: u32,
    pub gone: u32,
}

impl World {
    pub fn new() -> Self {
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

    pub fn post_to_target(&mut self, message: &Message) {
        if self.linked {
            self.to_target.push_back(message.encode().unwrap());
        }
    }

    pub fn post_to_source(&mut self, message: &Message) {
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

    pub fn tell_source(&mut self, event: source::Event) {
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

    pub fn tell_target(&mut self, event: target::Event<Token>) {
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
    pub fn close_source(&mut self) {
        (self.linked, self.source_open) = (false, false);
        self.to_source.clear();
    }

    /// The same the other way round.
    pub fn close_target(&mut self) {
        (self.linked, self.target_open) = (false, false);
        self.to_target.clear();
    }

    pub fn deliver_to_target(&mut self) {
        match self.to_target.pop_front().map(|packet| Message::decode(&packet)) {
            Some(Ok(message)) => self.tell_target(target::Event::Message(message)),
            None if self.linked || !self.target_open => {}
            Some(Err(_)) | None => {
                self.close_target();
                self.tell_target(target::Event::Closed);
            }
        }
    }

    pub fn deliver_to_source(&mut self) {
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
    pub fn deliver_all(&mut self) {
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

    pub fn act(&mut self, operation: Operation) {
        match operation {
            Operation::DeliverToTarget => self.deliver_to_target(),
            Operation::DeliverToSource => self.deliver_to_source(),
            Operation::Lose(way) => drop(self.queue(way).pop_front()),
            Operation::Repeat(way) => {
                let packet = self.queue(way).front().cloned();
                self.queue(way).extend(packet);
            }
            Operation::Cut(way, at) => {
                if let Some(packet) = self.queue(way).front_mut() {
                    packet.truncate(usize::from(at));
                }
            }
            Operation::Later(way) => {
                let packet = self.queue(way).pop_front();
                self.queue(way).extend(packet);
            }
            // A source whose rings run is not suspended twice.
            Operation::Suspend => self.tell_source(source::Event::Suspended),
            Operation::SourceRing => self.tell_source(source::Event::RingStarting),
            Operation::TargetRing => {
                self.target_ring = true;
                self.tell_target(target::Event::RingStarting);
            }
            Operation::TargetRingStops => self.target_ring = false,
            Operation::FrontendLeaves { moved } => self.tell_source(source::Event::FrontendLeft { moved }),
            Operation::Cancel => self.tell_source(source::Event::Cancel),
            Operation::Disconnect => self.linked = false,
            Operation::KillSource => {
                self.source = None;
                self.source_uses = false;
                self.close_source();
            }
            Operation::KillTarget => {
                if let Some(Target::Adopted { .. }) = self.target {
                    self.gone += 1;
                }
                self.target = None;
                self.target_uses = false;
                self.close_target();
            }
            Operation::Unwilling => self.willing = false,
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
    pub fn check_not_lost(&mut self) {
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
