//! The source of a VM's migration.
//!
//! ```text
//! Greeting ─HELLO─▶ Preparing ─PREPARED─▶ Stopping ─stopped─▶ Restoring ─READY─▶ Offered ─swap lost─▶ Completed
//!     └────────┬────────┘                     └───────┬───────────┘                │
//!              │ REFUSE, end, time                    │ the VM resumes             │ swap won: the VM resumes
//!              ▼                                      ▼                            ▼
//!            Ended ◀──────────────────────────────────┴────────────────────────────┘
//! ```
//! The commit point is the swap that offers the VM ([`Action::Offer`]). The source leaves `Offered` only by another
//! swap of the word, whose outcome alone decides which VMM owns the VM.

use std::time::Duration;

use super::message::{Commit, Hello, Message};
use crate::codec::Message as _;
use crate::end_reason::EndReason;
use crate::ownership::{SwapOutcome, Word};

/// How long the source waits for the target's HELLO.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How long the target may take to prepare, while the VM runs.
pub const PREPARING_PATIENCE: Duration = Duration::from_secs(60);
/// How long the target may take for each answer while the VM is stopped.
pub const STOPPED_PATIENCE: Duration = Duration::from_secs(10);

/// An event for a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// Time has passed.
    Time,
    /// The answer to [`Action::Stop`]: the VM is stopped, and its state has been sent.
    Stopped,
    /// The source failed.
    Failed(String),
    /// The outcome of [`Action::Withdraw`].
    Swapped(SwapOutcome),
}

/// An action of a source. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(Message),
    /// Send PREPARE with its descriptors.
    Prepare,
    /// Stop the VM and send its state.
    Stop,
    /// The commit point: swap the word from [`Word::INITIAL`] to this value.
    Offer(Word),
    /// Change the word by compare-and-swap, then report [`Event::Swapped`].
    Withdraw {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Resume the stopped VM as it was before.
    Resume,
}

/// The phase in which a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The source waits for the target's HELLO.
    Greeting,
    /// The target prepares.
    Preparing,
    /// The source stops the VM.
    Stopping,
    /// The target restores the VM's state.
    Restoring,
    /// The VM is offered.
    Committing,
}

impl Phase {
    /// Returns the phase's stable name.
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

/// The state of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// HELLO was sent.
    Greeting {
        /// Only check whether the target would accept the VM.
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
    /// The VM is offered: the swap and COMMIT are under way or done.
    Offered {
        /// The ownership word, offered.
        word: Word,
        /// When to give up.
        deadline: Duration,
        /// Why the offer is being withdrawn, if it is.
        withdrawing: Option<EndReason>,
    },
    /// A dry run: the target would accept the VM.
    Possible,
    /// The target owns the VM.
    Completed,
    /// The source owns the VM.
    Ended {
        /// The phase in which the migration ended.
        phase: Phase,
        /// Why it ended.
        reason: EndReason,
    },
}

impl Source {
    /// Starts on a new connection.
    pub fn begin(hello: Hello, now: Duration) -> (Self, Vec<Action>) {
        let state = Self::Greeting { dry_run: hello.dry_run, deadline: now + GREETING_PATIENCE };
        (state, vec![Action::Send(Message::Hello(hello))])
    }

    /// Returns when [`Event::Time`] is due; `None` while the source waits for no answer.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. }
            | Self::Preparing { deadline }
            | Self::Restoring { deadline }
            | Self::Offered { deadline, .. } => Some(*deadline),
            Self::Stopping | Self::Possible | Self::Completed | Self::Ended { .. } => None,
        }
    }

    /// Returns whether the migration is over.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Possible | Self::Completed | Self::Ended { .. })
    }

    /// Returns the next state and the actions to carry out. `now` is the time of the event.
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
            // If the swap failed but the target is not the owner, the target cannot have taken the VM.
            (Self::Offered { withdrawing: Some(reason), .. }, Event::Swapped(outcome)) => {
                let reason = if outcome == SwapOutcome::Won { reason } else { EndReason::Meaningless };
                (Self::Ended { phase: Phase::Committing, reason }, vec![Action::Resume])
            }
            // A late event changes nothing.
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
            // Unreachable: the first offer of a word is always possible.
            None => Self::end(Phase::Restoring, Event::Closed, &[Action::Resume]),
        }
    }

    /// Withdraws the offer on any event; the outcome of the swap decides.
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

/// Returns why an unexpected event ends the migration.
fn why(event: Event) -> EndReason {
    match event {
        Event::Message(Message::Refuse(refuse)) => EndReason::Refused(refuse.reasons.bounded()),
        Event::Message(message) => EndReason::Wrong(message.name()),
        Event::Closed | Event::Stopped | Event::Swapped(_) => EndReason::Closed,
        Event::Time => EndReason::Silent,
        Event::Failed(text) => EndReason::Failed(text),
    }
}
