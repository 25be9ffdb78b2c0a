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
use crate::codec::Message as _;
use crate::ownership::{SwapOutcome, Word};
use crate::reasons::Reasons;

/// How long a source may take for its HELLO, so that a silent one does not keep others out.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// Time passed.
    Time,
    /// The last action succeeded.
    Done,
    /// The last action failed, for these reasons.
    Failed(Reasons),
    /// How [`Action::Take`] ended.
    Swapped(SwapOutcome),
}

/// What to do, in this order.
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
    /// Change the word by compare-and-swap, and report with [`Event::Swapped`].
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
    /// A source has connected.
    Waiting {
        /// When to give up.
        deadline: Duration,
    },
    /// HELLO was answered.
    Greeted {
        /// Which program the source is.
        program: String,
        /// When to give up.
        deadline: Duration,
    },
    /// Guest memory is there.
    Prepared {
        /// When to give up.
        deadline: Duration,
    },
    /// All is there; only the word says no yet.
    Ready {
        /// When to try to take the VM without a COMMIT.
        deadline: Duration,
    },
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
    /// Begins on a fresh connection.
    pub fn begin(now: Duration) -> Self {
        Self::Waiting { deadline: now + GREETING_PATIENCE }
    }

    /// When [`Event::Time`] matters; `None` where the source has nothing to send.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Waiting { deadline }
            | Self::Greeted { deadline, .. }
            | Self::Prepared { deadline }
            | Self::Ready { deadline } => Some(*deadline),
            Self::Busy { .. } | Self::Active | Self::Ended { .. } => None,
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Active | Self::Ended { .. })
    }

    /// The next state, and what to do. `now` is the time of the event.
    #[must_use]
    pub fn step(self, event: Event, now: Duration) -> (Self, Vec<Action>) {
        if event == Event::Time && self.deadline().is_none_or(|deadline| now < deadline) {
            return (self, Vec::new());
        }
        match (self, event) {
            (Self::Waiting { .. }, Event::Message(Message::Hello(hello))) => {
                let program = Some((hello.program.clone(), hello.dry_run));
                (Self::Busy { with: Busy::Judging, hello: program }, vec![Action::Judge(hello)])
            }
            (Self::Greeted { .. }, Event::Message(Message::Prepare(prepare))) => {
                Self::busy(Busy::Preparing, Action::Prepare(prepare))
            }
            (Self::Prepared { .. }, Event::Message(Message::State(state))) => {
                Self::busy(Busy::Restoring, Action::Restore(Box::new(state)))
            }
            (Self::Ready { .. }, Event::Message(Message::Commit(_)) | Event::Closed | Event::Time) => {
                Self::take()
            }
            (Self::Busy { with, hello }, event) => Self::finished(with, hello, event, now),
            (state @ (Self::Active | Self::Ended { .. }), _) => (state, Vec::new()),
            (_, Event::Message(message)) => {
                Self::end(format!("the source sent {} at the wrong time", message.name()))
            }
            (_, Event::Time) => Self::end("the source says nothing".to_owned()),
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

    fn finished(
        with: Busy,
        hello: Option<(String, bool)>,
        event: Event,
        now: Duration,
    ) -> (Self, Vec<Action>) {
        match (with, event) {
            (Busy::Judging, Event::Done) => {
                let welcome = Welcome { program: PROGRAM.to_owned() };
                let (program, dry_run) = hello.unwrap_or_default();
                let next = if dry_run {
                    Self::Ended { why: format!("{program} has only asked") }
                } else {
                    Self::Greeted { program, deadline: now + PREPARING_PATIENCE }
                };
                (next, vec![Action::Send(Message::Welcome(welcome))])
            }
            (Busy::Preparing, Event::Done) => {
                let state = Self::Prepared { deadline: now + PREPARING_PATIENCE };
                (state, vec![Action::Send(Message::Prepared(Prepared {}))])
            }
            (Busy::Restoring, Event::Done) => {
                let state = Self::Ready { deadline: now + STOPPED_PATIENCE };
                (state, vec![Action::Send(Message::Ready(Ready {}))])
            }
            (Busy::Taking, Event::Swapped(SwapOutcome::Won)) => (Self::Active, vec![Action::Activate]),
            (Busy::Taking, Event::Swapped(SwapOutcome::Lost(_) | SwapOutcome::Meaningless)) => {
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
