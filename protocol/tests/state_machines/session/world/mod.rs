//! A simulated world of two back-ends, a front-end and the link between them, advanced one step at a time.

mod checks;
mod ends;
mod next;
mod party;

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::handover::prologue::{Introduction, Purpose, SourcePrologue, TargetPrologue};
use baton_protocol::handover::session::source::{self, Source};
use baton_protocol::handover::session::target::{self, Target};
use baton_protocol::handover::wire::message::{Message, Stage};
use baton_protocol::ownership::{Owner, SwapOutcome, Word};
pub use party::{End, Operation, Party};

/// The duration of each step.
const STEP: Duration = Duration::from_micros(10);

/// A descriptor. Its reference count is the number of open descriptors.
pub type Fd = Rc<()>;

/// A staged session.
#[derive(Debug)]
pub struct Held {
    knows: u64,
    _fds: Vec<Fd>,
}

pub type SessionTarget = Target<Fd, Held>;
type Event = target::Event<Fd, Held>;
type Action = target::Action<Fd, Held>;

pub type SourceParty = Party<SourcePrologue, Source, source::Action, source::Event>;
pub type TargetParty = Party<TargetPrologue, SessionTarget, Action, Event>;

impl SourceParty {
    pub fn deadline(&self) -> Option<Duration> {
        let prologue = self.prologue.as_ref().and_then(SourcePrologue::deadline);
        prologue.or(self.state.as_ref().and_then(Source::deadline))
    }
}

impl TargetParty {
    pub fn deadline(&self) -> Option<Duration> {
        let prologue = self.prologue.as_ref().and_then(TargetPrologue::deadline);
        prologue.or(self.state.as_ref().and_then(Target::deadline))
    }
}

/// Both back-ends, the front-end and everything that they share.
#[derive(Debug)]
pub struct World {
    /// The HELLO that the source has yet to send.
    hello: Option<Message>,
    pub word: Word,
    /// A test overwrote the word.
    pub scribbled: bool,
    pub now: Duration,
    pub source: SourceParty,
    pub target: TargetParty,
    /// Every packet sent so far.
    pub sent: Vec<Vec<u8>>,
    target_device: Option<Held>,
    linked: bool,
    /// The number of messages that the front-end has sent, and how many of them were read.
    said: u64,
    heard: u64,
    fd: Fd,
    willing: bool,
    bad_commit: bool,
    /// The end that runs the next version.
    pub next: Option<End>,
    /// The source died after the target had staged the session, so the target must take it.
    must_survive: bool,
}

impl World {
    pub fn new(dry_run: bool) -> Self {
        let (source, hello) = SourcePrologue::begin(Purpose::Session, "source", dry_run, Duration::ZERO);
        let own = Introduction { program: "target".to_owned(), wants_vhost: false };
        Self {
            hello: Some(hello),
            word: Word::INITIAL,
            scribbled: false,
            now: Duration::ZERO,
            source: Party::new(source, true),
            target: Party::new(TargetPrologue::begin(own, Duration::ZERO), false),
            sent: Vec::new(),
            target_device: None,
            linked: true,
            said: 0,
            heard: 0,
            fd: Rc::new(()),
            willing: true,
            bad_commit: false,
            next: None,
            must_survive: false,
        }
    }

    fn post(&mut self, to: End, message: &Message, fds: Vec<Fd>) {
        let is_next = self.next == Some(to.other());
        let packet = if is_next { next::write(message) } else { message.encode().unwrap() };
        if self.linked && !self.source.closed && !self.target.closed {
            self.sent.push(packet.clone());
            self.inbox(to).push_back((packet, fds));
        }
    }

    fn inbox(&mut self, end: End) -> &mut VecDeque<(Vec<u8>, Vec<Fd>)> {
        match end {
            End::Source => &mut self.source.inbox,
            End::Target => &mut self.target.inbox,
        }
    }

    fn swap(&mut self, from: Word, to: Word) -> SwapOutcome {
        if self.word == from {
            self.word = to;
            return SwapOutcome::Won;
        }
        SwapOutcome::Lost(self.word)
    }

    /// Changes the STAGE in transit.
    pub fn change_stage(&mut self, change: fn(&mut Stage)) {
        let (packet, _) = self.target.inbox.front_mut().unwrap();
        let Ok(Message::Stage(mut stage)) = Message::decode(packet) else { panic!("no STAGE") };
        change(&mut stage);
        *packet = Message::Stage(stage).encode().unwrap();
    }

    fn deliver(&mut self, end: End) -> bool {
        let waits = match end {
            End::Source => self.source.waits(),
            End::Target => self.target.waits(),
        };
        if !waits {
            return false;
        }
        let Some((packet, fds)) = self.inbox(end).pop_front() else { return false };
        let is_next = self.next == Some(end);
        let message = if is_next { next::read(&packet) } else { Message::decode(&packet).ok() };
        match (end, message) {
            (End::Source, Some(message)) => self.tell_source(source::Event::Message(message)),
            (End::Target, Some(message)) => self.tell_target(target::Event::Message(message, fds)),
            (End::Source, None) => {
                self.source.close();
                self.tell_source(source::Event::Closed);
            }
            (End::Target, None) => {
                self.target.close();
                self.tell_target(target::Event::Closed);
            }
        }
        true
    }

    fn perform(&mut self, end: End) -> bool {
        match end {
            End::Source if self.source.stopped => return false,
            End::Target if self.target.stopped => return false,
            End::Source => {
                if let Some(hello) = self.hello.take() {
                    self.post(End::Target, &hello, Vec::new());
                } else if let Some(action) = self.source.todo.pop_front() {
                    self.do_source(action);
                } else if let Some(event) = self.source.pending.take() {
                    self.tell_source(event);
                } else {
                    return false;
                }
            }
            End::Target => {
                if let Some(action) = self.target.todo.pop_front() {
                    self.do_target(action);
                } else if let Some(event) = self.target.pending.take() {
                    self.tell_target(event);
                } else {
                    return false;
                }
            }
        }
        true
    }

    /// Returns whether the process of `end` is gone.
    fn is_gone(&self, end: End) -> bool {
        match end {
            End::Source => {
                let source = &self.source;
                let left = matches!(source.state, Some(Source::HandedOver(_))) && source.todo.is_empty();
                !source.alive || left
            }
            End::Target => !self.target.alive,
        }
    }

    fn see_death(&mut self, end: End) -> bool {
        if !self.is_gone(end.other()) {
            return false;
        }
        match end {
            End::Source if self.source.waits() && !self.source.saw_death => {
                self.source.saw_death = true;
                self.tell_source(source::Event::Dead);
            }
            End::Target if self.target.waits() && !self.target.saw_death => {
                self.target.saw_death = true;
                self.tell_target(target::Event::Dead);
            }
            _ => return false,
        }
        true
    }

    fn see_end(&mut self, end: End) -> bool {
        let ended = !self.linked || self.source.closed || self.target.closed;
        match end {
            End::Source
                if ended && self.source.waits() && !self.source.closed && self.source.inbox.is_empty() =>
            {
                self.source.closed = true;
                self.tell_source(source::Event::Closed);
            }
            End::Target
                if ended && self.target.waits() && !self.target.closed && self.target.inbox.is_empty() =>
            {
                self.target.closed = true;
                self.tell_target(target::Event::Closed);
            }
            _ => return false,
        }
        true
    }

    /// An end sees the death of its peer before a timeout.
    fn clock(&mut self, end: End) {
        if self.see_death(end) {
            return;
        }
        let due = |deadline: Option<Duration>| deadline.is_some_and(|deadline| deadline <= self.now);
        match end {
            End::Source if self.source.waits() && due(self.source.deadline()) => {
                self.tell_source(source::Event::Time);
            }
            End::Target if self.target.waits() && due(self.target.deadline()) => {
                self.tell_target(target::Event::Time);
            }
            _ => {}
        }
    }

    fn kill(&mut self, end: End) {
        match end {
            End::Source if self.source.alive => {
                let holds = matches!(
                    self.target.state,
                    Some(
                        Target::Staged(_)
                            | Target::Taking { .. }
                            | Target::Starting { .. }
                            | Target::Active(_)
                    )
                );
                self.must_survive = holds && self.word.owner != Owner::Aborted;
                self.source.die();
            }
            End::Target if self.target.alive => {
                self.target.die();
                self.target_device = None;
            }
            _ => {}
        }
    }

    /// Carries out the operation, if possible.
    pub fn act(&mut self, operation: Operation) {
        self.now += STEP;
        match operation {
            Operation::Act(end) => drop(self.perform(end)),
            Operation::Deliver(end) => drop(self.deliver(end)),
            Operation::Lose(end) => drop(self.inbox(end).pop_front()),
            Operation::Repeat(end) => {
                let packet = self.inbox(end).front().cloned();
                self.inbox(end).extend(packet);
            }
            Operation::Cut(end, at) => {
                if let Some((packet, _)) = self.inbox(end).front_mut() {
                    packet.truncate(usize::from(at));
                }
            }
            Operation::Later(end) => {
                let packet = self.inbox(end).pop_front();
                self.inbox(end).extend(packet);
            }
            Operation::FrontendSays => self.said += 1,
            Operation::Hear(End::Source) => drop(self.source.hear(&mut self.heard, self.said)),
            Operation::Hear(End::Target) => drop(self.target.hear(&mut self.heard, self.said)),
            Operation::Pass(time) => self.now += Duration::from_millis(time),
            Operation::Clock(end) => self.clock(end),
            Operation::Disconnect => self.linked = false,
            Operation::SeeEnd(end) => drop(self.see_end(end)),
            Operation::Kill(end) => self.kill(end),
            Operation::SeeDeath(end) => drop(self.see_death(end)),
            Operation::Stop(End::Source) => self.source.stopped = self.source.alive,
            Operation::Stop(End::Target) => self.target.stopped = self.target.alive,
            Operation::Continue(End::Source) => self.source.stopped = false,
            Operation::Continue(End::Target) => self.target.stopped = false,
            Operation::Cancel if self.source.waits() => self.tell_source(source::Event::Cancel),
            Operation::Fail if self.source.waits() => {
                self.tell_source(source::Event::Failed("a test".to_owned()));
            }
            Operation::Cancel | Operation::Fail => {}
            Operation::Unwilling => self.willing = false,
            Operation::BadCommit => self.bad_commit = true,
        }
        self.check();
    }
}
