//! The end that has the VM.
//!
//! ```text
//! Greeting ─HELLO─▶ Preparing ─PREPARED─▶ Stopping ─stopped─▶ Restoring ─READY─▶ Offered ─swap lost─▶ Completed
//!     └────────┬────────┘                     └───────┬───────────┘                │
//!              │ REFUSE, end, time                    │ the VM runs on             │ swap won: the VM runs on
//!              ▼                                      ▼                            ▼
//!            Ended ◀──────────────────────────────────┴────────────────────────────┘
//! ```
//! The commit point is the swap that offers the word ([`Action::Offer`]). Every way out of `Offered` is a swap of the
//! word, too: whether it worked, and nothing else, says whose the VM is.

use std::time::Duration;

use thiserror::Error;

use super::message::{Commit, Hello, Message};
use crate::ownership::{Swapped, Word};
use crate::reasons::Reasons;

/// How long the target may take for its HELLO.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How long the target may take to prepare. The VM runs.
pub const PREPARING_PATIENCE: Duration = Duration::from_secs(60);
/// How long the target may take for each answer while the VM stands still.
pub const STOPPED_PATIENCE: Duration = Duration::from_secs(10);

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The target said something.
    Message(Message),
    /// The connection ended, or brought what is no message.
    Closed,
    /// Nothing came until the deadline.
    Timeout,
    /// How [`Action::Stop`] ended: the VM stands still, and its state has been sent.
    Stopped,
    /// Something failed on this side.
    Failed(String),
    /// How [`Action::Withdraw`] ended.
    Swapped(Swapped),
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this.
    Send(Message),
    /// Send PREPARE with its descriptors.
    Prepare,
    /// Stop the VM, and send its state.
    Stop,
    /// The commit point: swap the word from [`Word::INITIAL`] to this one.
    Offer(Word),
    /// Swap the word, and say with [`Event::Swapped`] whether that worked.
    Withdraw {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Let the VM, which was stopped, go on as it did before.
    Resume,
}

/// Where a migration was when it came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The target was asked.
    Greeting,
    /// The target got guest memory.
    Preparing,
    /// The VM was being stopped.
    Stopping,
    /// The target got the VM's state.
    Restoring,
    /// The VM was the first one's that takes it.
    Committing,
}

impl Phase {
    /// Its name, which stays.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greeting => "hello",
            Self::Preparing => "prepare",
            Self::Stopping => "stop",
            Self::Restoring => "restore",
            Self::Committing => "commit",
        }
    }
}

/// Why the VM has not moved.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Reason {
    /// The target refuses.
    #[error("the target refuses: {0}")]
    Refused(Reasons),
    /// The target went away.
    #[error("the target closed the connection")]
    Closed,
    /// The target does not answer.
    #[error("the target does not answer")]
    Silent,
    /// The target sends what does not belong there.
    #[error("the target sent {0} at the wrong time")]
    OutOfTurn(&'static str),
    /// The target said that it took the VM, and did not.
    #[error("the target said that it had taken the VM, but had not")]
    Untrue,
    /// The word has a value that it cannot have.
    #[error("the ownership word was not what it must be")]
    Meaningless,
    /// This side failed.
    #[error("{0}")]
    Failed(String),
}

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// HELLO was sent.
    Greeting {
        /// Nothing is to move.
        dry_run: bool,
    },
    /// PREPARE was sent.
    Preparing,
    /// The VM is being stopped.
    Stopping,
    /// STATE was sent.
    Restoring,
    /// COMMIT was sent.
    Offered {
        /// The ownership word, offered.
        word: Word,
        /// Why it is being withdrawn, while it is.
        withdrawing: Option<Reason>,
    },
    /// The target would take the VM; nothing else was asked.
    Possible,
    /// The VM is the target's.
    Completed,
    /// The VM is the source's.
    Ended {
        /// Where it failed.
        phase: Phase,
        /// Why.
        reason: Reason,
    },
}

impl Source {
    /// Begins on a fresh connection.
    pub fn begin(hello: Hello) -> (Self, Vec<Action>) {
        (Self::Greeting { dry_run: hello.dry_run }, vec![Action::Send(Message::Hello(hello))])
    }

    /// How long to wait for the target; `None` where nothing is to come from it.
    pub fn patience(&self) -> Option<Duration> {
        match self {
            Self::Greeting { .. } => Some(GREETING_PATIENCE),
            Self::Preparing => Some(PREPARING_PATIENCE),
            Self::Restoring | Self::Offered { .. } => Some(STOPPED_PATIENCE),
            Self::Stopping | Self::Possible | Self::Completed | Self::Ended { .. } => None,
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Possible | Self::Completed | Self::Ended { .. })
    }

    /// What follows from `event`.
    #[must_use]
    pub fn step(self, event: Event) -> (Self, Vec<Action>) {
        match (self, event) {
            (Self::Greeting { dry_run: true }, Event::Message(Message::Welcome(_))) => {
                (Self::Possible, Vec::new())
            }
            (Self::Greeting { dry_run: false }, Event::Message(Message::Welcome(_))) => {
                (Self::Preparing, vec![Action::Prepare])
            }
            (Self::Preparing, Event::Message(Message::Prepared(_))) => (Self::Stopping, vec![Action::Stop]),
            (Self::Stopping, Event::Stopped) => (Self::Restoring, Vec::new()),
            (Self::Restoring, Event::Message(Message::Ready(_))) => Self::offer(),
            (Self::Offered { word, withdrawing: None }, event) => Self::withdraw(word, event),
            (Self::Offered { withdrawing: Some(_), .. }, Event::Swapped(Err(Some(now))))
                if now.owner.is_target() =>
            {
                (Self::Completed, Vec::new())
            }
            // Where the swap failed and the word is not the target's, the target cannot have taken the VM.
            (Self::Offered { withdrawing: Some(reason), .. }, Event::Swapped(result)) => {
                let reason = if result.is_ok() { reason } else { Reason::Meaningless };
                (Self::Ended { phase: Phase::Committing, reason }, vec![Action::Resume])
            }
            // A late word changes nothing.
            (state @ (Self::Offered { .. } | Self::Possible | Self::Completed | Self::Ended { .. }), _) => {
                (state, Vec::new())
            }
            (Self::Greeting { .. }, event) => Self::end(Phase::Greeting, event, &[]),
            (Self::Preparing, event) => Self::end(Phase::Preparing, event, &[]),
            (Self::Stopping, event) => Self::end(Phase::Stopping, event, &[Action::Resume]),
            (Self::Restoring, event) => Self::end(Phase::Restoring, event, &[Action::Resume]),
        }
    }

    fn offer() -> (Self, Vec<Action>) {
        match Word::INITIAL.offered() {
            Some(word) => {
                let commit = Action::Send(Message::Commit(Commit { epoch: word.epoch }));
                (Self::Offered { word, withdrawing: None }, vec![Action::Offer(word), commit])
            }
            // The first offer of a word is always possible.
            None => Self::end(Phase::Restoring, Event::Closed, &[Action::Resume]),
        }
    }

    /// Whatever happens to an offer, the word says what it means.
    fn withdraw(word: Word, event: Event) -> (Self, Vec<Action>) {
        let reason = match event {
            Event::Message(Message::Active(_)) => Reason::Untrue,
            event => why(event),
        };
        let actions = word.aborted().map(|to| Action::Withdraw { from: word, to }).into_iter().collect();
        (Self::Offered { word, withdrawing: Some(reason) }, actions)
    }

    fn end(phase: Phase, event: Event, actions: &[Action]) -> (Self, Vec<Action>) {
        (Self::Ended { phase, reason: why(event) }, actions.to_vec())
    }
}

/// What it means that something else came than was to come.
fn why(event: Event) -> Reason {
    match event {
        Event::Message(Message::Refuse(refuse)) => Reason::Refused(refuse.reasons.bounded()),
        Event::Message(message) => Reason::OutOfTurn(message.name()),
        Event::Closed | Event::Stopped | Event::Swapped(_) => Reason::Closed,
        Event::Timeout => Reason::Silent,
        Event::Failed(text) => Reason::Failed(text),
    }
}
