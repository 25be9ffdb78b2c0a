//! A simulated world of a device's hand-over: the source, the target, the messages between them and the ownership word.

use std::collections::VecDeque;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::device::source::{self, Source};
use baton_protocol::handover::device::target::{self, Target};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{Message, Offer};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::ownership::{Offered, Owner, SwapOutcome, Word};

/// An operation on the two ends or the link between them. `true` is the direction to the target.
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

/// A device that the target has adopted. One that is neither released, activated nor kept is a leak.
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
    /// The connection between the two ends is open.
    pub linked: bool,
    /// The source has neither closed its end nor seen the peer's closed. Likewise `target_open`.
    pub source_open: bool,
    pub target_open: bool,
    /// The word is invalid.
    pub garbage: bool,
    /// A test overwrote the word.
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
                    assert!(self.source_uses, "the source offers a device that it does not have");
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

    /// Closes the source's end. The target still receives the messages in transit, and then sees the end.
    pub fn close_source(&mut self) {
        (self.linked, self.source_open) = (false, false);
        self.to_source.clear();
    }

    /// Closes the target's end, likewise.
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

    /// Delivers all messages in transit, including those sent in response.
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
        // The state is absent while an event is processed.
        if self.target.is_some() {
            assert_eq!(self.made, self.gone + kept, "a device leaked");
        }
    }

    /// Starts a ring at the end that is left, and checks that the device has an owner.
    pub fn check_not_lost(&mut self) {
        self.deliver_all();
        let taken = self.word.owner == Owner::Target;
        if self.source.is_some() {
            self.tell_source(source::Event::RingStarting);
            assert!(self.source_uses || taken, "the source lives, but the device has no owner: {self:?}");
        } else if matches!(self.target, Some(Target::Adopted { .. })) && self.word.owner == Owner::Offered {
            self.tell_target(target::Event::RingStarting);
            assert!(self.target_uses, "the target did not take the device that it adopted: {self:?}");
        }
    }
}
