//! The end that waits for a VM.
//!
//! ```text
//! Waiting ─HELLO─▶ Greeted ─PREPARE─▶ Prepared ─STATE─▶ Ready ─COMMIT, the connection's end, time: swap won─▶ Active
//!     └───────────────┴───────┬──────────┴───────────────┘
//!                             ▼ end, time, failure, refusal, swap lost
//!                           Ended
//! ```
//! The source may die or hang between its offer and its COMMIT. So a target that is ready tries to take the VM at the
//! connection's end, too, and when nothing comes: if it was not offered, or was withdrawn, the swap fails. A source that
//! goes on later finds the VM taken, or nobody there, and has it again.

use std::time::Duration;

use super::message::{Active, Hello, Message, PROGRAM, Prepare, Prepared, Ready, Refuse, State, Welcome};
use super::source::{PREPARING_PATIENCE, STOPPED_PATIENCE};
use crate::ownership::Word;
use crate::reasons::Reasons;

/// How long a source may take for its HELLO, so that a silent one does not keep others out.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The source said something.
    Message(Message),
    /// The connection ended, or brought what is no message.
    Closed,
    /// Nothing came until the deadline.
    Timeout,
    /// What was to be done is done.
    Done,
    /// What was to be done cannot be, for these reasons.
    Failed(Reasons),
    /// How [`Action::Take`] ended.
    Swapped {
        /// Whether the word was changed.
        won: bool,
    },
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this.
    Send(Message),
    /// Judge whether the VM fits, and say so.
    Judge(Hello),
    /// Take guest memory and the ownership word, and say how that went.
    Prepare(Prepare),
    /// Restore the VM, and say how that went.
    Restore(Box<State>),
    /// Swap the word, and say with [`Event::Swapped`] whether that worked.
    Take {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Let the VM run, unless it is to be paused, and then send ACTIVE.
    Activate,
}

/// What a target that has asked for something waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// [`Action::Judge`].
    Judging,
    /// [`Action::Prepare`].
    Preparing,
    /// [`Action::Restore`].
    Restoring,
    /// [`Action::Take`].
    Taking,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing was said yet.
    Waiting,
    /// HELLO was answered.
    Greeted {
        /// Which program the source is.
        program: String,
    },
    /// Guest memory is there.
    Prepared,
    /// All is there; only the word says no yet.
    Ready,
    /// Something is being done.
    Busy {
        /// What.
        with: Busy,
        /// Which program the source is, and whether it only asks.
        hello: Option<(String, bool)>,
    },
    /// The VM is this side's.
    Active,
    /// It came to nothing.
    Ended {
        /// Why.
        why: String,
    },
}

impl Target {
    /// How long to wait for the source; `None` where nothing is to come from it.
    pub fn patience(&self) -> Option<Duration> {
        match self {
            Self::Waiting => Some(GREETING_PATIENCE),
            // It shares its memory, or stops its VM and has its back-ends stop.
            Self::Greeted { .. } | Self::Prepared => Some(PREPARING_PATIENCE),
            Self::Ready => Some(STOPPED_PATIENCE),
            Self::Busy { .. } | Self::Active | Self::Ended { .. } => None,
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Active | Self::Ended { .. })
    }

    /// What follows from `event`.
    #[must_use]
    pub fn step(self, event: Event) -> (Self, Vec<Action>) {
        match (self, event) {
            (Self::Waiting, Event::Message(Message::Hello(hello))) => {
                let program = Some((hello.program.clone(), hello.dry_run));
                (Self::Busy { with: Busy::Judging, hello: program }, vec![Action::Judge(hello)])
            }
            (Self::Greeted { .. }, Event::Message(Message::Prepare(prepare))) => {
                Self::busy(Busy::Preparing, Action::Prepare(prepare))
            }
            (Self::Prepared, Event::Message(Message::State(state))) => {
                Self::busy(Busy::Restoring, Action::Restore(Box::new(state)))
            }
            (Self::Ready, Event::Message(Message::Commit(_)) | Event::Closed | Event::Timeout) => {
                Self::take()
            }
            (Self::Busy { with, hello }, event) => Self::finished(with, hello, event),
            (state @ (Self::Active | Self::Ended { .. }), _) => (state, Vec::new()),
            (_, Event::Message(message)) => {
                Self::end(format!("the source sent {} at the wrong time", message.name()))
            }
            (_, Event::Timeout) => Self::end("the source says nothing".to_owned()),
            (_, _) => Self::end("the source closed the connection".to_owned()),
        }
    }

    fn busy(with: Busy, action: Action) -> (Self, Vec<Action>) {
        (Self::Busy { with, hello: None }, vec![action])
    }

    fn take() -> (Self, Vec<Action>) {
        let offered = Word::INITIAL.offered();
        match offered.and_then(|from| Some((from, from.taken()?))) {
            Some((from, to)) => Self::busy(Busy::Taking, Action::Take { from, to }),
            // The first offer of a word can always be taken.
            None => Self::end("the ownership word cannot be taken".to_owned()),
        }
    }

    fn finished(with: Busy, hello: Option<(String, bool)>, event: Event) -> (Self, Vec<Action>) {
        match (with, event) {
            (Busy::Judging, Event::Done) => {
                let welcome = Welcome { program: PROGRAM.to_owned() };
                let (program, dry_run) = hello.unwrap_or_default();
                let next = if dry_run {
                    Self::Ended { why: format!("{program} has only asked") }
                } else {
                    Self::Greeted { program }
                };
                (next, vec![Action::Send(Message::Welcome(welcome))])
            }
            (Busy::Preparing, Event::Done) => {
                (Self::Prepared, vec![Action::Send(Message::Prepared(Prepared {}))])
            }
            (Busy::Restoring, Event::Done) => (Self::Ready, vec![Action::Send(Message::Ready(Ready {}))]),
            (Busy::Taking, Event::Swapped { won: true }) => (Self::Active, vec![Action::Activate]),
            (Busy::Taking, Event::Swapped { won: false }) => {
                Self::end("the source has not offered the VM, or has it again".to_owned())
            }
            (_, Event::Failed(reasons)) => {
                let why = reasons.to_string();
                (Self::Ended { why }, vec![Action::Send(Message::Refuse(Refuse { reasons }))])
            }
            (with, _) => (Self::Busy { with, hello }, Vec::new()),
        }
    }

    fn end(why: String) -> (Self, Vec<Action>) {
        (Self::Ended { why }, Vec::new())
    }
}

/// What is sent after [`Action::Activate`].
pub fn active(running: bool) -> Message {
    Message::Active(Active { running })
}
