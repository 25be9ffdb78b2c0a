//! Passes events to the source and the target, and performs their actions in the world.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::handover::device::validate;
use baton_protocol::handover::prologue::{
    Purpose, SourceAction, SourceEvent, SourcePrologue, TargetAction, TargetEvent, TargetPrologue,
};
use baton_protocol::handover::session::source::{self, Source};
use baton_protocol::handover::session::target::{self, Target};
use baton_protocol::handover::session::validate::{Capabilities, CheckedSession, fd_names};
use baton_protocol::handover::wire::device::{DeviceState, QueuePairState};
use baton_protocol::handover::wire::message::{Commit, Descriptors, Message, Prepare, Stage};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::{LogState, PairNow, SessionState, VringNow, VringState};
use baton_protocol::reasons::Reasons;

use super::{Action, End, Event, Fd, Held, STEP, World};

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
    fn tell_source_prologue(&mut self, prologue: SourcePrologue, event: source::Event) {
        let event = match event {
            source::Event::Message(message) => SourceEvent::Message(message),
            source::Event::Closed => SourceEvent::Closed,
            source::Event::Dead => SourceEvent::Dead,
            source::Event::Time => SourceEvent::Time,
            source::Event::Cancel => SourceEvent::Cancel,
            // No action of the prologue can fail.
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
            other => panic!("{other:?} in the prologue"),
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

    pub(super) fn do_source(&mut self, action: source::Action) {
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
                assert!(self.source.todo.is_empty(), "the outcome must be known before the next action");
                let result = self.swap(from, to);
                self.tell_source(source::Event::Swapped(result));
            }
            source::Action::Look => {
                assert!(self.source.todo.is_empty(), "the outcome must be known before the next action");
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

    /// Sends STAGE, with the descriptors in three packets.
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

    pub(super) fn do_target(&mut self, action: Action) {
        match action {
            target::Action::Stage(stage, fds) => {
                let made = self.make(*stage, fds);
                self.target.pending = Some(target::Event::Staged(made));
            }
            target::Action::Swap { from, to } => {
                assert!(self.target.todo.is_empty(), "the outcome must be known before the next action");
                let result = self.swap(from, to);
                self.tell_target(target::Event::Swapped(result));
            }
            target::Action::Look => {
                assert!(self.target.todo.is_empty(), "the outcome must be known before the next action");
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
}
