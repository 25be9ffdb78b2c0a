//! Two back-ends, a front-end and what is between them, one step at a time.

mod next;
mod party;

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::handover::message::{Commit, Descriptors, Hello, Message, Prepare, SESSION, Stage};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::handover::state::{DeviceState, QueuePairState};
use baton_protocol::handover::validate;
use baton_protocol::ownership::{Owner, Word};
use baton_protocol::reasons::Reasons;
use baton_protocol::session::source::{self, Phase, Source};
use baton_protocol::session::state::{LogState, PairNow, SessionState, VringNow, VringState};
use baton_protocol::session::target::{self, Target};
use baton_protocol::session::validate::{Capabilities, CheckedSession, fd_names};
pub use party::{Deed, End, Party};

/// A descriptor: as many are open as there are clones.
pub type Fd = Rc<()>;

/// A staged session.
#[derive(Debug)]
pub struct Held {
    knows: u64,
    _fds: Vec<Fd>,
}

pub type Target_ = Target<Fd, Held>;
pub type TargetEvent = target::Event<Fd, Held>;
pub type TargetAction = target::Action<Fd, Held>;

pub type SourceParty = Party<Source, source::Action, source::Event>;
pub type TargetParty = Party<Target_, TargetAction, TargetEvent>;

impl SourceParty {
    pub fn deadline(&self) -> Option<Duration> {
        self.state.as_ref().and_then(Source::deadline)
    }
}

impl TargetParty {
    pub fn deadline(&self) -> Option<Duration> {
        self.state.as_ref().and_then(Target::deadline)
    }
}

/// Everything.
#[derive(Debug)]
pub struct World {
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
        let (source, actions) = Source::begin("source", dry_run, Duration::ZERO);
        Self {
            word: Word::INITIAL,
            scribbled: false,
            now: Duration::ZERO,
            source: Party::new(source, actions, true),
            target: Party::new(Target::begin(Duration::ZERO), Vec::new(), false),
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

    pub fn tell_source(&mut self, event: source::Event) {
        let Some(state) = self.source.state.take() else { return };
        let (state, actions) = state.step(event, self.now);
        self.source.state = Some(state);
        self.source.todo.extend(actions);
    }

    pub fn tell_target(&mut self, event: TargetEvent) {
        let Some(state) = self.target.state.take() else { return };
        let hello = Hello {
            purpose: SESSION.to_owned(),
            program: "target".to_owned(),
            dry_run: false,
            wants_vhost: false,
        };
        let (state, actions) = state.step(event, &hello, self.now);
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

    fn swap(&mut self, from: Word, to: Word) -> Result<(), Option<Word>> {
        if self.word == from {
            self.word = to;
            return Ok(());
        }
        Err(Some(self.word))
    }

    fn do_source(&mut self, action: source::Action) {
        match action {
            source::Action::Prepare => {
                let session = Some(Box::new(session(self.source.knows)));
                self.post(End::Target, &Message::Prepare(Prepare { device: device(), session }), Vec::new());
            }
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

    fn do_target(&mut self, action: TargetAction) {
        match action {
            target::Action::Judge(device, session) => {
                let verdict = judge(device, *session, self.willing).map(drop);
                self.target.pending = Some(target::Event::Judged(verdict));
            }
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
    ) -> Result<(Held, baton_protocol::session::validate::Shape), Reasons> {
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
                if let Some(action) = self.source.todo.pop_front() {
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
                source.state.is_none() || left
            }
            End::Target => self.target.state.is_none(),
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
            End::Source if self.source.state.is_some() => {
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
            End::Target if self.target.state.is_some() => {
                self.target.die();
                self.target_device = None;
            }
            _ => {}
        }
    }

    /// Does it, if it can be done.
    pub fn act(&mut self, deed: Deed) {
        self.now += Duration::from_micros(10);
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
            Deed::Stop(End::Source) => self.source.stopped = self.source.state.is_some(),
            Deed::Stop(End::Target) => self.target.stopped = self.target.state.is_some(),
            Deed::Continue(End::Source) => self.source.stopped = false,
            Deed::Continue(End::Target) => self.target.stopped = false,
            Deed::Cancel if self.source.waits() => self.tell_source(source::Event::Cancel),
            Deed::Fail if self.source.waits() => {
                self.tell_source(source::Event::Failed(Refusal::Busy.into()));
            }
            Deed::Cancel | Deed::Fail => {}
            Deed::Unwilling => self.willing = false,
            Deed::BadCommit => self.bad_commit = true,
        }
        self.check();
    }

    /// The next thing that happens if nothing is in the way. Gives whether there is any.
    pub fn undisturbed(&mut self) -> bool {
        self.now += Duration::from_micros(10);
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
        match (&self.source.state, &self.target.state) {
            (Some(Source::HandedOver(_)), None) => assert_eq!(owners, 0),
            (Some(source), Some(Target::Active(_))) => {
                assert!(matches!(source, Source::HandedOver(_)), "the source waits for nothing: {self:?}");
                assert!(self.target.runs);
            }
            (Some(_), _) => assert_eq!(owners, 1, "the source lives, and nobody has it: {self:?}"),
            (None, Some(Target::Active(_) | Target::Ended)) => {
                assert!(self.target.runs || !self.must_survive, "the target could take it: {self:?}");
            }
            (None, Some(_)) => {
                let waits = matches!(self.target.state, Some(Target::Fresh { .. }));
                panic!("the target goes on waiting ({waits}): {self:?}");
            }
            (None, None) => assert_eq!(owners, 0),
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
            let over = !matches!(
                source.state,
                Some(
                    Source::Greeting { .. }
                        | Source::Checking { .. }
                        | Source::Staging { .. }
                        | Source::Ended { phase: Phase::Greet | Phase::Check, .. }
                )
            );
            // Else a survivor could take what is old by then.
            assert!(!source.listens || !over || owner == Owner::Aborted, "{self:?}");
        }
    }
}
