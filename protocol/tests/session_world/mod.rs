//! Two back-ends, a front-end and what is between them, one step at a time.

mod next;
mod party;

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::handover::device::validate;
use baton_protocol::handover::prologue::{
    Introduction, Purpose, SourceAction, SourceEvent, SourcePrologue, TargetAction, TargetEvent,
    TargetPrologue,
};
use baton_protocol::handover::session::source::{self, Source};
use baton_protocol::handover::session::target::{self, Target};
use baton_protocol::handover::session::validate::{Capabilities, CheckedSession, fd_names};
use baton_protocol::handover::wire::device::{DeviceState, QueuePairState};
use baton_protocol::handover::wire::message::{Commit, Descriptors, Message, Prepare, Stage};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::{LogState, PairNow, SessionState, VringNow, VringState};
use baton_protocol::ownership::{Owner, SwapOutcome, Word};
use baton_protocol::reasons::Reasons;
pub use party::{Deed, End, Party};

/// What each step takes.
const STEP: Duration = Duration::from_micros(10);

/// A descriptor: as many are open as there are clones.
pub type Fd = Rc<()>;

/// A staged session.
#[derive(Debug)]
pub struct Held {
    knows: u64,
    _fds: Vec<Fd>,
}

pub type Target_ = Target<Fd, Held>;
type Event = target::Event<Fd, Held>;
type Action = target::Action<Fd, Held>;

pub type SourceParty = Party<SourcePrologue, Source, source::Action, source::Event>;
pub type TargetParty = Party<TargetPrologue, Target_, Action, Event>;

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

/// Everything.
#[derive(Debug)]
pub struct World {
    /// Until the source has sent it.
    hello: Option<Message>,
    pub word: Word,
    /// The word is not what the two made of it.
    pub scribbled: bool,
    pub now: Duration,
    pub source: SourceParty,
    pub target: TargetParty,
    /// Every packet that was sent.
    pub sent: Vec<Vec<u8>>,
    target_device: Option<Held>,
    linked: bool,
    /// How much the front-end has said, and how much of it was heard.
    said: u64,
    heard: u64,
    fd: Fd,
    willing: bool,
    bad_commit: bool,
    /// Which of the two is a build of the next version.
    pub next: Option<End>,
    /// The source died when the target had everything.
    must_survive: bool,
}

fn device() -> DeviceState {
    let pair = QueuePairState { using_vnet_hdr: true, host_vnet_hdr_len: 12, ..QueuePairState::default() };
    DeviceState { tap: "tap0".to_owned(), queue_pairs: vec![pair], ..DeviceState::default() }
}

fn session(knows: u64) -> SessionState {
    SessionState {
        log: Some(LogState { offset: knows, size: 1 }),
        vrings: vec![VringState::default(); 2],
        ..SessionState::default()
    }
}

fn judge(device: DeviceState, session: SessionState, willing: bool) -> Result<CheckedSession, Reasons> {
    let own = validate::Capabilities { same_user: true, ..validate::Capabilities::default() };
    let target = Capabilities { device: own, max_regions: 8, has_frontend: !willing };
    CheckedSession::try_from((device, session, &target))
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

    fn tell_source_prologue(&mut self, prologue: SourcePrologue, event: source::Event) {
        let event = match event {
            source::Event::Message(message) => SourceEvent::Message(message),
            source::Event::Closed => SourceEvent::Closed,
            source::Event::Dead => SourceEvent::Dead,
            source::Event::Time => SourceEvent::Time,
            source::Event::Cancel => SourceEvent::Cancel,
            // It has nothing to do yet that could fail.
            _ => return self.source.prologue = Some(prologue),
        };
        let (prologue, actions) = prologue.step(event, self.now);
        for action in actions {
            self.now += STEP;
            match action {
                SourceAction::Prepare => {
                    let session = Some(Box::new(session(self.source.knows)));
                    let prepare = Message::Prepare(Prepare { device: device(), session });
                    self.post(End::Target, &prepare, Vec::new());
                }
                SourceAction::Close => self.source.close(),
            }
        }
        if let SourcePrologue::Agreed { wants_vhost } = prologue {
            let (state, actions) = Source::staging(wants_vhost, Duration::ZERO, self.now);
            self.source.state = Some(state);
            self.source.todo.extend(actions);
        } else {
            self.source.prologue = Some(prologue);
        }
    }

    fn tell_target_prologue(&mut self, prologue: TargetPrologue, event: Event) {
        let event = match event {
            target::Event::Message(message, _) => TargetEvent::Message(message),
            target::Event::Closed => TargetEvent::Closed,
            target::Event::Dead => TargetEvent::Dead,
            target::Event::Time => TargetEvent::Time,
            other => panic!("{other:?} before both have agreed"),
        };
        let (mut prologue, actions) = prologue.step(event, self.now);
        let mut todo = VecDeque::from(actions);
        while let Some(action) = todo.pop_front() {
            self.now += STEP;
            match action {
                TargetAction::Judge(_, prepare) => {
                    let verdict = judge(prepare.device, *prepare.session.unwrap(), self.willing).map(drop);
                    self.now += STEP;
                    let (next, actions) = prologue.step(TargetEvent::Judged(verdict), self.now);
                    prologue = next;
                    todo.extend(actions);
                }
                TargetAction::Send(message) => self.post(End::Source, &message, Vec::new()),
                TargetAction::Close => self.target.close(),
            }
        }
        if prologue == TargetPrologue::Agreed(Purpose::Session) {
            self.target.state = Some(Target::ready(self.now));
        } else {
            self.target.prologue = Some(prologue);
        }
    }

    pub fn tell_source(&mut self, event: source::Event) {
        if let Some(prologue) = self.source.prologue.take() {
            return self.tell_source_prologue(prologue, event);
        }
        let Some(state) = self.source.state.take() else { return };
        let (state, actions) = state.step(event, self.now);
        self.source.state = Some(state);
        self.source.todo.extend(actions);
    }

    pub fn tell_target(&mut self, event: Event) {
        if let Some(prologue) = self.target.prologue.take() {
            return self.tell_target_prologue(prologue, event);
        }
        let Some(state) = self.target.state.take() else { return };
        let (state, actions) = state.step(event, self.now);
        self.target.state = Some(state);
        self.target.todo.extend(actions);
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

    fn do_source(&mut self, action: source::Action) {
        match action {
            source::Action::Hold => self.source.listens = false,
            source::Action::Stage { .. } => self.stage(),
            source::Action::Freeze => {
                self.source.runs = false;
                self.source.pending = Some(source::Event::Frozen);
            }
            source::Action::Commit { word, mut times } => {
                times.sent = u64::try_from(self.now.as_nanos()).unwrap();
                let vrings = vec![VringNow::default(); if self.bad_commit { 3 } else { 2 }];
                let pairs = vec![PairNow::default()];
                let commit = Commit { epoch: word.epoch, vrings, pairs, times };
                self.post(End::Target, &Message::Commit(commit), Vec::new());
                self.tell_source(source::Event::Sent);
            }
            source::Action::Swap { from, to } => {
                assert!(self.source.todo.is_empty(), "nothing is done before it is known who owns");
                let result = self.swap(from, to);
                self.tell_source(source::Event::Swapped(result));
            }
            source::Action::Look => {
                assert!(self.source.todo.is_empty(), "nothing is done before it is known who owns");
                let word = self.word;
                self.tell_source(source::Event::Seen(Some(word)));
            }
            source::Action::Resume | source::Action::Recover => {
                self.source.pending = None;
                (self.source.runs, self.source.listens) = (true, true);
            }
            source::Action::Release => assert!(!self.source.runs && !self.source.listens),
            source::Action::Send(message) => self.post(End::Target, &message, Vec::new()),
            source::Action::Close => self.source.close(),
        }
    }

    /// Changes the STAGE that is on its way.
    pub fn change_stage(&mut self, change: fn(&mut Stage)) {
        let (packet, _) = self.target.inbox.front_mut().unwrap();
        let Ok(Message::Stage(mut stage)) = Message::decode(packet) else { panic!("no STAGE") };
        change(&mut stage);
        *packet = Message::Stage(stage).encode().unwrap();
    }

    /// In three packets.
    fn stage(&mut self) {
        let (device, session) = (device(), session(self.source.knows));
        let names = fd_names(&device, &session, true);
        let mut packets: Vec<_> = names
            .chunks(names.len().div_ceil(3))
            .map(|names| {
                names.iter().map(|name| (name.clone(), Rc::clone(&self.fd))).collect::<NamedFds<_>>()
            })
            .map(NamedFds::unzip)
            .collect();
        let more = u16::try_from(packets.len() - 1).unwrap();
        let (manifest, own) = packets.remove(0);
        let stage = Stage { device, session, more, fds: manifest };
        self.post(End::Target, &Message::Stage(Box::new(stage)), own);
        for (fds, own) in packets {
            self.post(End::Target, &Message::Descriptors(Descriptors { fds }), own);
        }
    }

    fn do_target(&mut self, action: Action) {
        match action {
            target::Action::Stage(stage, fds) => {
                let made = self.make(*stage, fds);
                self.target.pending = Some(target::Event::Staged(made));
            }
            target::Action::Swap { from, to } => {
                assert!(self.target.todo.is_empty(), "nothing is done before it is known who owns");
                let result = self.swap(from, to);
                self.tell_target(target::Event::Swapped(result));
            }
            target::Action::Look => {
                assert!(self.target.todo.is_empty(), "nothing is done before it is known who owns");
                let word = self.word;
                self.tell_target(target::Event::Seen(Some(word)));
            }
            target::Action::Activate(held, _) | target::Action::Recover(held) => {
                self.target.knows = held.knows;
                self.target_device = Some(held);
                self.target.runs = true;
                self.target.pending = Some(target::Event::Activated);
            }
            target::Action::Listen => {
                assert!(self.target.runs);
                self.target.listens = true;
            }
            target::Action::Release(_) => {}
            target::Action::Abandon => {
                (self.target.runs, self.target.listens) = (false, false);
                self.target_device = None;
            }
            target::Action::Send(message) => self.post(End::Source, &message, Vec::new()),
            target::Action::Close => self.target.close(),
        }
    }

    fn make(
        &self,
        stage: Stage,
        mut fds: NamedFds<Fd>,
    ) -> Result<(Held, baton_protocol::handover::session::validate::Shape), Reasons> {
        let names = fd_names(&stage.device, &stage.session, true);
        let checked = judge(stage.device, stage.session, self.willing)?;
        let claimed = names.iter().map(|name| fds.claim(name)).collect::<Result<_, _>>();
        let claimed = claimed.and_then(|claimed| fds.finish().map(|()| claimed));
        let own = claimed.map_err(Refusal::from)?;
        let knows = checked.session().log.unwrap().offset;
        Ok((Held { knows, _fds: own }, checked.shape()))
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

    /// Whether the process of `end` is no more.
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

    /// Death is seen before the time.
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

    /// Does it, if it can be done.
    pub fn act(&mut self, deed: Deed) {
        self.now += STEP;
        match deed {
            Deed::Act(end) => drop(self.perform(end)),
            Deed::Deliver(end) => drop(self.deliver(end)),
            Deed::Lose(end) => drop(self.inbox(end).pop_front()),
            Deed::Repeat(end) => {
                let packet = self.inbox(end).front().cloned();
                self.inbox(end).extend(packet);
            }
            Deed::Cut(end, at) => {
                if let Some((packet, _)) = self.inbox(end).front_mut() {
                    packet.truncate(usize::from(at));
                }
            }
            Deed::Later(end) => {
                let packet = self.inbox(end).pop_front();
                self.inbox(end).extend(packet);
            }
            Deed::FrontendSays => self.said += 1,
            Deed::Hear(End::Source) => drop(self.source.hear(&mut self.heard, self.said)),
            Deed::Hear(End::Target) => drop(self.target.hear(&mut self.heard, self.said)),
            Deed::Pass(time) => self.now += Duration::from_millis(time),
            Deed::Clock(end) => self.clock(end),
            Deed::Disconnect => self.linked = false,
            Deed::SeeEnd(end) => drop(self.see_end(end)),
            Deed::Kill(end) => self.kill(end),
            Deed::SeeDeath(end) => drop(self.see_death(end)),
            Deed::Stop(End::Source) => self.source.stopped = self.source.alive,
            Deed::Stop(End::Target) => self.target.stopped = self.target.alive,
            Deed::Continue(End::Source) => self.source.stopped = false,
            Deed::Continue(End::Target) => self.target.stopped = false,
            Deed::Cancel if self.source.waits() => self.tell_source(source::Event::Cancel),
            Deed::Fail if self.source.waits() => {
                self.tell_source(source::Event::Failed("a test".to_owned()));
            }
            Deed::Cancel | Deed::Fail => {}
            Deed::Unwilling => self.willing = false,
            Deed::BadCommit => self.bad_commit = true,
        }
        self.check();
    }

    /// The next thing that happens if nothing is in the way. Gives whether there is any.
    pub fn undisturbed(&mut self) -> bool {
        self.now += STEP;
        let ends = [End::Source, End::Target];
        let went = ends.into_iter().any(|end| self.perform(end))
            || ends.into_iter().any(|end| self.deliver(end))
            || ends.into_iter().any(|end| self.see_death(end))
            || ends.into_iter().any(|end| self.see_end(end));
        self.check();
        went
    }

    /// Until the source is as far, and has done what it is to do there.
    pub fn until_source(&mut self, reached: fn(&Source) -> bool) {
        while !self.source.state.as_ref().is_some_and(reached) {
            assert!(self.undisturbed(), "{self:?}");
        }
        self.source_acts();
    }

    /// The source does all that it is to do.
    pub fn source_acts(&mut self) {
        while !self.source.todo.is_empty() {
            self.act(Deed::Act(End::Source));
        }
    }

    /// Until the target is as far, and has done what it is to do there.
    pub fn until_target(&mut self, reached: fn(&Target_) -> bool) {
        while !self.target.state.as_ref().is_some_and(reached) {
            assert!(self.undisturbed(), "{self:?}");
        }
        self.target_acts();
    }

    /// The target does all that it is to do, but waits for what comes of it.
    pub fn target_acts(&mut self) {
        while !self.target.todo.is_empty() {
            self.act(Deed::Act(End::Target));
        }
    }

    /// So many milliseconds later the target looks at the clock.
    pub fn target_after(&mut self, time: u64) {
        self.act(Deed::Pass(time));
        self.act(Deed::Clock(End::Target));
        self.target_acts();
    }

    /// So many milliseconds later the source looks at the clock.
    pub fn source_after(&mut self, time: u64) {
        self.act(Deed::Pass(time));
        self.act(Deed::Clock(End::Source));
        self.source_acts();
    }

    /// One of the two hears what was recorded of the other, and does what is to be done until it waits for more.
    pub fn replay(&mut self, end: End, packet: &[u8]) {
        let message = Message::decode(packet).unwrap();
        let fds = match &message {
            Message::Stage(stage) => stage.fds.len(),
            Message::Descriptors(more) => more.fds.len(),
            _ => 0,
        };
        let fds = vec![Rc::clone(&self.fd); fds];
        self.inbox(end).push_back((packet.to_vec(), fds));
        while self.perform(end) {}
        assert!(self.deliver(end));
        while self.perform(end) {}
    }

    /// Nobody stops or breaks anything any more, and much time passes.
    pub fn finish(&mut self) {
        for end in [End::Source, End::Target] {
            self.act(Deed::Continue(end));
        }
        for _ in 0..25 {
            while self.undisturbed() {}
            self.act(Deed::Pass(1500));
            self.act(Deed::Clock(End::Source));
            self.act(Deed::Clock(End::Target));
        }
        self.said += 1;
        self.act(Deed::Hear(End::Source));
        self.act(Deed::Hear(End::Target));
        let owners = usize::from(self.source.runs) + usize::from(self.target.runs);
        let active = matches!(self.target.state, Some(Target::Active(_)));
        let ended = matches!(self.target.prologue, Some(TargetPrologue::Ended))
            || matches!(self.target.state, Some(Target::Ended));
        let handed_over = matches!(self.source.state, Some(Source::HandedOver(_)));
        match (self.source.alive, self.target.alive) {
            (true, false) if handed_over => assert_eq!(owners, 0),
            (true, true) if active => {
                assert!(handed_over, "the source waits for nothing: {self:?}");
                assert!(self.target.runs);
            }
            (true, _) => assert_eq!(owners, 1, "the source lives, and nobody has it: {self:?}"),
            (false, true) => {
                assert!(active || ended, "the target goes on waiting: {self:?}");
                assert!(self.target.runs || !self.must_survive, "the target could take it: {self:?}");
            }
            (false, false) => assert_eq!(owners, 0),
        }
        assert_eq!(self.source.runs, self.source.listens, "{self:?}");
        assert_eq!(self.target.runs, self.target.listens, "{self:?}");
        self.source.inbox.clear();
        self.target.inbox.clear();
        let fds = Rc::strong_count(&self.fd) - 1;
        assert_eq!(fds > 0, self.target.runs, "descriptors are left, or lost: {self:?}");
    }

    fn check(&self) {
        let (source, target) = (&self.source, &self.target);
        assert!(!(source.runs && target.runs), "two owners: {self:?}");
        assert!(!(source.listens && target.listens), "two hear the front-end: {self:?}");
        if !self.scribbled {
            let owner = self.word.owner;
            assert!(!target.runs || matches!(owner, Owner::Target | Owner::Settled), "{self:?}");
            assert!(!target.listens || owner == Owner::Settled, "{self:?}");
            assert!(!source.runs || matches!(owner, Owner::Source | Owner::Aborted), "{self:?}");
            let over = source.prologue.is_none() && !matches!(source.state, Some(Source::Staging { .. }));
            // Else a survivor could take what is old by then.
            assert!(!source.listens || !over || owner == Owner::Aborted, "{self:?}");
        }
    }
}
