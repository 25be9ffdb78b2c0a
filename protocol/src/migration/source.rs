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

use super::message::{Commit, Hello, Message};
use crate::codec::Message as _;
use crate::end_reason::EndReason;
use crate::ownership::{SwapOutcome, Word};

/// How long the target may take for its HELLO.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How long the target may take to prepare. The VM runs.
pub const PREPARING_PATIENCE: Duration = Duration::from_secs(60);
/// How long the target may take for each answer while the VM stands still.
pub const STOPPED_PATIENCE: Duration = Duration::from_secs(10);

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// Time passed.
    Time,
    /// How [`Action::Stop`] ended: the VM stands still, and its state has been sent.
    Stopped,
    /// The source failed.
    Failed(String),
    /// How [`Action::Withdraw`] ended.
    Swapped(SwapOutcome),
}

/// What to do, in this order.
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
    /// Change the word by compare-and-swap, and report with [`Event::Swapped`].
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

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// HELLO was sent.
    Greeting {
        /// Only to find out whether the target would take the VM.
        dry_run: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// PREPARE was sent.
    Preparing {
        /// When to give up.
        deadline: Duration,
    },
    /// The VM is being stopped.
    Stopping,
    /// STATE was sent.
    Restoring {
        /// When to give up.
        deadline: Duration,
    },
    /// COMMIT was sent.
    Offered {
        /// The ownership word, offered.
        word: Word,
        /// When to give up.
        deadline: Duration,
        /// Why it is being withdrawn, while it is.
        withdrawing: Option<EndReason>,
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
        reason: EndReason,
    },
}

impl Source {
    /// Begins on a fresh connection.
    pub fn begin(hello: Hello, now: Duration) -> (Self, Vec<Action>) {
        let state = Self::Greeting { dry_run: hello.dry_run, deadline: now + GREETING_PATIENCE };
        (state, vec![Action::Send(Message::Hello(hello))])
    }

    /// When [`Event::Time`] matters; `None` where the target has nothing to answer.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. }
            | Self::Preparing { deadline }
            | Self::Restoring { deadline }
            | Self::Offered { deadline, .. } => Some(*deadline),
            Self::Stopping | Self::Possible | Self::Completed | Self::Ended { .. } => None,
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Possible | Self::Completed | Self::Ended { .. })
    }

    /// The next state, and what to do. `now` is the time of the event.
    #[must_use]
    pub fn step(self, event: Event, now: Duration) -> (Self, Vec<Action>) {
        if event == Event::Time && self.deadline().is_none_or(|deadline| now < deadline) {
            return (self, Vec::new());
        }
        match (self, event) {
            (Self::Greeting { dry_run: true, .. }, Event::Message(Message::Welcome(_))) => {
                (Self::Possible, Vec::new())
            }
            (Self::Greeting { dry_run: false, .. }, Event::Message(Message::Welcome(_))) => {
                (Self::Preparing { deadline: now + PREPARING_PATIENCE }, vec![Action::Prepare])
            }
            (Self::Preparing { .. }, Event::Message(Message::Prepared(_))) => {
                (Self::Stopping, vec![Action::Stop])
            }
            (Self::Stopping, Event::Stopped) => {
                (Self::Restoring { deadline: now + STOPPED_PATIENCE }, Vec::new())
            }
            (Self::Restoring { .. }, Event::Message(Message::Ready(_))) => Self::offer(now),
            (Self::Offered { word, deadline, withdrawing: None }, event) => {
                Self::withdraw(word, deadline, event)
            }
            (Self::Offered { withdrawing: Some(_), .. }, Event::Swapped(SwapOutcome::Lost(now)))
                if now.owner.is_target() =>
            {
                (Self::Completed, Vec::new())
            }
            // If the swap failed and the word is not the target's, the target cannot have taken the VM.
            (Self::Offered { withdrawing: Some(reason), .. }, Event::Swapped(outcome)) => {
                let reason = if outcome == SwapOutcome::Won { reason } else { EndReason::Meaningless };
                (Self::Ended { phase: Phase::Committing, reason }, vec![Action::Resume])
            }
            // A late message changes nothing.
            (state @ (Self::Offered { .. } | Self::Possible | Self::Completed | Self::Ended { .. }), _) => {
                (state, Vec::new())
            }
            (Self::Greeting { .. }, event) => Self::end(Phase::Greeting, event, &[]),
            (Self::Preparing { .. }, event) => Self::end(Phase::Preparing, event, &[]),
            (Self::Stopping, event) => Self::end(Phase::Stopping, event, &[Action::Resume]),
            (Self::Restoring { .. }, event) => Self::end(Phase::Restoring, event, &[Action::Resume]),
        }
    }

    fn offer(now: Duration) -> (Self, Vec<Action>) {
        match Word::INITIAL.offered() {
            Some(word) => {
                let commit = Action::Send(Message::Commit(Commit { epoch: word.epoch }));
                let state = Self::Offered { word, deadline: now + STOPPED_PATIENCE, withdrawing: None };
                (state, vec![Action::Offer(word), commit])
            }
            // The first offer of a word is always possible.
            None => Self::end(Phase::Restoring, Event::Closed, &[Action::Resume]),
        }
    }

    /// Whatever happens to an offer, the word says what it means.
    fn withdraw(word: Word, deadline: Duration, event: Event) -> (Self, Vec<Action>) {
        let reason = match event {
            Event::Message(Message::Active(_)) => EndReason::Untrue,
            event => why(event),
        };
        let actions = word.aborted().map(|to| Action::Withdraw { from: word, to }).into_iter().collect();
        (Self::Offered { word, deadline, withdrawing: Some(reason) }, actions)
    }

    fn end(phase: Phase, event: Event, actions: &[Action]) -> (Self, Vec<Action>) {
        (Self::Ended { phase, reason: why(event) }, actions.to_vec())
    }
}

/// Why an event that the state does not wait for ends the migration.
fn why(event: Event) -> EndReason {
    match event {
        Event::Message(Message::Refuse(refuse)) => EndReason::Refused(refuse.reasons.bounded()),
        Event::Message(message) => EndReason::Wrong(message.name()),
        Event::Closed | Event::Stopped | Event::Swapped(_) => EndReason::Closed,
        Event::Time => EndReason::Silent,
        Event::Failed(text) => EndReason::Failed(text),
    }
}
