//! The operations of a test, and the state of one of the two processes.

use std::collections::VecDeque;
use std::fmt::Debug;

use super::Fd;

/// An operation on one of the two processes, the front-end or the link.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// The end performs its next action.
    Act(End),
    /// The end receives its next packet.
    Deliver(End),
    /// The end's next packet is lost.
    Lose(End),
    /// The end's next packet is repeated after all others.
    Repeat(End),
    /// The end's next packet is truncated.
    Cut(End, u8),
    /// The end's next packet is delayed until after all others.
    Later(End),
    /// The front-end sends a message.
    FrontendSays,
    /// The end reads a message from the front-end, if it listens.
    Hear(End),
    /// This many milliseconds pass.
    Pass(u64),
    /// The end checks its deadline.
    Clock(End),
    /// The connection ends.
    Disconnect,
    /// The end sees that the connection has ended.
    SeeEnd(End),
    /// The end is killed.
    Kill(End),
    /// The end sees that its peer is dead.
    SeeDeath(End),
    /// The end is stopped, as by SIGSTOP.
    Stop(End),
    /// The end continues.
    Continue(End),
    /// The operator cancels.
    Cancel,
    /// The source fails to carry out an action.
    Fail,
    /// The target refuses from now on.
    Unwilling,
    /// The source's COMMIT will not match its session.
    BadCommit,
}

/// One of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The source.
    Source,
    /// The target.
    Target,
}

impl End {
    pub(super) fn other(self) -> Self {
        if self == Self::Source { Self::Target } else { Self::Source }
    }
}

/// A process.
#[derive(Debug)]
pub struct Party<P, S, A, E> {
    pub(super) alive: bool,
    /// The state of the prologue, until both have agreed.
    pub(super) prologue: Option<P>,
    /// The state after the prologue.
    pub(super) state: Option<S>,
    /// Pending actions.
    pub(super) todo: VecDeque<A>,
    /// The event that results from the last action.
    pub(super) pending: Option<E>,
    pub(super) inbox: VecDeque<(Vec<u8>, Vec<Fd>)>,
    pub(super) stopped: bool,
    /// The process has closed the connection, or seen its end.
    pub(super) closed: bool,
    pub(super) saw_death: bool,
    /// The process's rings run.
    pub runs: bool,
    /// The process reads from the front-end.
    pub listens: bool,
    /// The number of front-end messages that the process's session state includes.
    pub(super) knows: u64,
}

impl<P, S: Debug, A, E> Party<P, S, A, E> {
    pub(super) fn new(prologue: P, serves: bool) -> Self {
        Self {
            alive: true,
            prologue: Some(prologue),
            state: None,
            todo: VecDeque::new(),
            pending: None,
            inbox: VecDeque::new(),
            stopped: false,
            closed: false,
            saw_death: false,
            runs: serves,
            listens: serves,
            knows: 0,
        }
    }

    /// Returns the state of the prologue, until both have agreed.
    pub fn prologue(&self) -> Option<&P> {
        self.prologue.as_ref()
    }

    /// Returns the state after the prologue.
    pub fn state(&self) -> Option<&S> {
        self.state.as_ref()
    }

    /// Returns whether the process's event loop waits for an event.
    pub(super) fn waits(&self) -> bool {
        self.alive && !self.stopped && self.todo.is_empty()
    }

    pub(super) fn die(&mut self) {
        let stopped = false;
        (self.alive, self.prologue, self.state) = (false, None, None);
        (self.runs, self.listens, self.stopped, self.closed) = (false, false, stopped, true);
        self.todo.clear();
        self.inbox.clear();
        self.pending = None;
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
        self.inbox.clear();
    }

    pub(super) fn hear(&mut self, heard: &mut u64, said: u64) -> bool {
        // This may happen between any two actions.
        if !self.alive || self.stopped || !self.listens || *heard == said {
            return false;
        }
        assert_eq!(self.knows, *heard, "reads from the front-end with stale state");
        *heard += 1;
        self.knows = *heard;
        true
    }
}
