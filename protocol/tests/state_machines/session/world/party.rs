//! The operations of a test, and one of the two processes.

use std::collections::VecDeque;
use std::fmt::Debug;

use super::Fd;

/// What a test does to one of the two processes, the front-end or the link.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// It does the next of what it is to do.
    Act(End),
    /// It receives the next packet.
    Deliver(End),
    /// Its next packet is lost.
    Lose(End),
    /// Its next packet comes again, after all others.
    Repeat(End),
    /// Its next packet is cut.
    Cut(End, u8),
    /// Its next packet comes after all others.
    Later(End),
    /// The front-end says something.
    FrontendSays,
    /// It hears what the front-end said, if it listens.
    Hear(End),
    /// So many milliseconds pass.
    Pass(u64),
    /// It looks at the clock.
    Clock(End),
    /// The connection ends.
    Disconnect,
    /// It sees that the connection has ended.
    SeeEnd(End),
    /// It is killed.
    Kill(End),
    /// It sees that the other one is dead.
    SeeDeath(End),
    /// It does nothing any more,
    Stop(End),
    /// until it goes on.
    Continue(End),
    /// The operator cancels.
    Cancel,
    /// The source cannot go on.
    Fail,
    /// The target refuses from now on.
    Unwilling,
    /// The source's COMMIT will be of another session.
    BadCommit,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The one that serves.
    Source,
    /// The one that waits.
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
    /// Until it has agreed with the other one, or has not.
    pub(super) prologue: Option<P>,
    /// From then on.
    pub(super) state: Option<S>,
    /// What it is to do.
    pub(super) todo: VecDeque<A>,
    /// What comes of what it has done.
    pub(super) pending: Option<E>,
    pub(super) inbox: VecDeque<(Vec<u8>, Vec<Fd>)>,
    pub(super) stopped: bool,
    /// It has closed the connection, or seen its end.
    pub(super) closed: bool,
    pub(super) saw_death: bool,
    /// Its rings run.
    pub runs: bool,
    /// It hears the front-end.
    pub listens: bool,
    /// How much it knows of what the front-end said.
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

    /// How far it is with the other one, before they have agreed.
    pub fn prologue(&self) -> Option<&P> {
        self.prologue.as_ref()
    }

    /// How far it is since they have agreed.
    pub fn state(&self) -> Option<&S> {
        self.state.as_ref()
    }

    /// Whether its event loop waits for something.
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
        // Even between any two things that it does.
        if !self.alive || self.stopped || !self.listens || *heard == said {
            return false;
        }
        assert_eq!(self.knows, *heard, "hears the front-end with old knowledge");
        *heard += 1;
        self.knows = *heard;
        true
    }
}
