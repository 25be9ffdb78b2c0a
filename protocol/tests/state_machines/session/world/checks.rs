//! Runs a world to a state of the source or the target, and checks the invariants after each step and at the end.

use std::rc::Rc;

use baton_protocol::codec::Message as _;
use baton_protocol::handover::prologue::TargetPrologue;
use baton_protocol::handover::session::source::Source;
use baton_protocol::handover::session::target::Target;
use baton_protocol::handover::wire::message::Message;
use baton_protocol::ownership::Owner;

use super::{End, Operation, STEP, SessionTarget, World};

impl World {
    /// Takes the next step of an undisturbed hand-over. Returns whether there was one.
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

    /// Runs until the source reaches a state, then performs the actions of the source.
    pub fn until_source(&mut self, reached: fn(&Source) -> bool) {
        while !self.source.state.as_ref().is_some_and(reached) {
            assert!(self.undisturbed(), "{self:?}");
        }
        self.source_acts();
    }

    /// Performs all pending actions of the source.
    pub fn source_acts(&mut self) {
        while !self.source.todo.is_empty() {
            self.act(Operation::Act(End::Source));
        }
    }

    /// Runs until the target reaches a state, then performs the actions of the target.
    pub fn until_target(&mut self, reached: fn(&SessionTarget) -> bool) {
        while !self.target.state.as_ref().is_some_and(reached) {
            assert!(self.undisturbed(), "{self:?}");
        }
        self.target_acts();
    }

    /// Performs all pending actions of the target, without the events that result.
    pub fn target_acts(&mut self) {
        while !self.target.todo.is_empty() {
            self.act(Operation::Act(End::Target));
        }
    }

    /// Lets this many milliseconds pass, then lets the target check its deadline.
    pub fn target_after(&mut self, time: u64) {
        self.act(Operation::Pass(time));
        self.act(Operation::Clock(End::Target));
        self.target_acts();
    }

    /// Lets this many milliseconds pass, then lets the source check its deadline.
    pub fn source_after(&mut self, time: u64) {
        self.act(Operation::Pass(time));
        self.act(Operation::Clock(End::Source));
        self.source_acts();
    }

    /// Delivers a recorded packet of the peer, and performs the actions that follow.
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

    /// Lets both processes run undisturbed until all deadlines have passed, then checks the end state.
    pub fn finish(&mut self) {
        for end in [End::Source, End::Target] {
            self.act(Operation::Continue(end));
        }
        for _ in 0..25 {
            while self.undisturbed() {}
            self.act(Operation::Pass(1500));
            self.act(Operation::Clock(End::Source));
            self.act(Operation::Clock(End::Target));
        }
        self.said += 1;
        self.act(Operation::Hear(End::Source));
        self.act(Operation::Hear(End::Target));
        let owners = usize::from(self.source.runs) + usize::from(self.target.runs);
        let active = matches!(self.target.state, Some(Target::Active(_)));
        let ended = matches!(self.target.prologue, Some(TargetPrologue::Ended))
            || matches!(self.target.state, Some(Target::Ended));
        let handed_over = matches!(self.source.state, Some(Source::HandedOver(_)));
        match (self.source.alive, self.target.alive) {
            (true, false) if handed_over => assert_eq!(owners, 0),
            (true, true) if active => {
                assert!(handed_over, "the source did not release the session: {self:?}");
                assert!(self.target.runs);
            }
            (true, _) => assert_eq!(owners, 1, "the source lives, so there must be one owner: {self:?}"),
            (false, true) => {
                assert!(active || ended, "the target still waits: {self:?}");
                assert!(
                    self.target.runs || !self.must_survive,
                    "the target did not take the session: {self:?}"
                );
            }
            (false, false) => assert_eq!(owners, 0),
        }
        assert_eq!(self.source.runs, self.source.listens, "{self:?}");
        assert_eq!(self.target.runs, self.target.listens, "{self:?}");
        self.source.inbox.clear();
        self.target.inbox.clear();
        let fds = Rc::strong_count(&self.fd) - 1;
        assert_eq!(fds > 0, self.target.runs, "descriptors leaked or lost: {self:?}");
    }

    pub(super) fn check(&self) {
        let (source, target) = (&self.source, &self.target);
        assert!(!(source.runs && target.runs), "two owners: {self:?}");
        assert!(!(source.listens && target.listens), "both ends read from the front-end: {self:?}");
        if !self.scribbled {
            let owner = self.word.owner;
            assert!(!target.runs || matches!(owner, Owner::Target | Owner::Settled), "{self:?}");
            assert!(!target.listens || owner == Owner::Settled, "{self:?}");
            assert!(!source.runs || matches!(owner, Owner::Source | Owner::Aborted), "{self:?}");
            let over = source.prologue.is_none() && !matches!(source.state, Some(Source::Staging { .. }));
            // Otherwise a survivor could take a stale session.
            assert!(!source.listens || !over || owner == Owner::Aborted, "{self:?}");
        }
    }
}
