//! The target of a VM's migration.
//!
//! ```text
//! Waiting ─HELLO─▶ Greeted ─PREPARE─▶ Prepared ─STATE─▶ Ready ─COMMIT, the connection's end, time: swap won─▶ Active
//!     └───────────────┴───────┬──────────┴───────────────┘
//!                             ▼ end, time, failure, refusal, swap lost
//!                           Ended
//! ```
//! The source may die or hang between its offer and its COMMIT. So a ready target also tries to take the VM when the
//! connection ends or the source is silent: if the VM is not offered, or the offer was withdrawn, the swap fails. A
//! source that continues later finds out by its own swap: it either lost the VM or keeps it.

use std::time::Duration;

use super::message::{Active, Hello, Message, PROGRAM, Prepare, Prepared, Ready, Refuse, State, Welcome};
use super::source::{PREPARING_PATIENCE, STOPPED_PATIENCE};
use crate::codec::Message as _;
use crate::ownership::{SwapOutcome, Word};
use crate::reasons::Reasons;

/// How long the target waits for HELLO, so that a silent source does not keep others out.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// An event for a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// Time has passed.
    Time,
    /// The last action succeeded.
    Done,
    /// The last action failed for these reasons.
    Failed(Reasons),
    /// The outcome of [`Action::Take`].
    Swapped(SwapOutcome),
}

/// An action of a target. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(Message),
    /// Check whether the VM fits, then report [`Event::Done`] or [`Event::Failed`].
    Judge(Hello),
    /// Set up guest memory and the ownership word, then report [`Event::Done`] or [`Event::Failed`].
    Prepare(Prepare),
    /// Restore the VM, then report [`Event::Done`] or [`Event::Failed`].
    Restore(Box<State>),
    /// Change the word by compare-and-swap, then report [`Event::Swapped`].
    Take {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Start the VM, unless it is to be paused, then send ACTIVE.
    Activate,
}

/// The action that a busy target waits for.
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

/// The state of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A source has connected.
    Waiting {
        /// When to give up.
        deadline: Duration,
    },
    /// HELLO was answered.
    Greeted {
        /// The source's program and version.
        program: String,
        /// When to give up.
        deadline: Duration,
    },
    /// Guest memory is set up.
    Prepared {
        /// When to give up.
        deadline: Duration,
    },
    /// The VM is restored, and the target waits for the offer.
    Ready {
        /// When to try to take the VM without a COMMIT.
        deadline: Duration,
    },
    /// An action is under way.
    Busy {
        /// The action.
        with: Busy,
        /// While judging: the source's program, and whether this is a dry run.
        hello: Option<(String, bool)>,
    },
    /// The target owns the VM.
    Active,
    /// The migration has ended without the VM.
    Ended {
        /// Why it ended.
        why: String,
    },
}

impl Target {
    /// Starts on a new connection.
    pub fn begin(now: Duration) -> Self {
        Self::Waiting { deadline: now + GREETING_PATIENCE }
    }

    /// Returns when [`Event::Time`] is due; `None` while the target waits for no message.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Waiting { deadline }
            | Self::Greeted { deadline, .. }
            | Self::Prepared { deadline }
            | Self::Ready { deadline } => Some(*deadline),
            Self::Busy { .. } | Self::Active | Self::Ended { .. } => None,
        }
    }

    /// Returns whether the migration is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Active | Self::Ended { .. })
    }

    /// Returns the next state and the actions to carry out. `now` is the time of the event.
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
            (_, Event::Time) => Self::end("the source does not answer".to_owned()),
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
            // Unreachable: the first offer of a word can always be taken.
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
                    Self::Ended { why: format!("dry run by {program}") }
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
                Self::end("the source did not offer the VM, or withdrew the offer".to_owned())
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

/// Returns the ACTIVE to send after [`Action::Activate`].
pub fn active(running: bool) -> Message {
    Message::Active(Active { running })
}
