//! The source of a session's hand-over, after the [prologue](crate::handover::prologue).
//!
//! ```text
//!   Staging ─STAGED─▶ Freezing ─all stopped─▶ Offering ─swap won─▶ Committed
//!      │ 10 s            │ 500 ms                                     │
//!      └────────┬────────┴─────────┬── ACTIVE, refused, end, death ───┘
//!               ▼                  ▼   or 500 ms from the freeze on
//!   Ended ◀─ swap won ───────── Leaving ──── swap lost, the word is settled ──▶ HandedOver
//!     ▲                            │ swap lost, the word is the target's            ▲
//!     └── the target is dead ───── Lost ────── the word is settled ─────────────────┘
//! ```
//! The source ends the hand-over only by a swap of the ownership word, made before anything else is done; no earlier
//! message decides anything. So a source that was stopped in any state and continues later obeys the word. In `Lost` it
//! keeps everything and serves nothing: if the target dies before it settles, the source continues from the used
//! indices.

use std::time::Duration;

use super::report::{Report, nanoseconds};
use crate::end_reason::EndReason;
use crate::handover::Phase;
use crate::handover::prologue::unexpected;
use crate::handover::wire::message::Message;
use crate::handover::wire::session::{FreezeTimes, TakeTimes};
use crate::ownership::{Owner, SwapOutcome, Word};

/// How long the target may take to stage the session.
pub const STAGING_PATIENCE: Duration = Duration::from_secs(10);
/// How long after the freeze began the source continues if the target has not taken the session.
pub const FREEZE_PATIENCE: Duration = Duration::from_millis(500);
/// How often the word is polled while no message announces a change.
pub const LOOK: Duration = Duration::from_millis(100);
/// How soon the word is polled after ACTIVE: the target settles next.
const SOON: Duration = Duration::from_millis(1);

/// An event for a source. [`Event::Swapped`] and [`Event::Seen`] answer their [`Action`] immediately, before any other
/// event. All other answers may come later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, the peer sent an invalid message, or a message could not be sent.
    Closed,
    /// The target is proven dead: its pidfd is readable. Follows its last message.
    Dead,
    /// Time has passed.
    Time,
    /// All rings are stopped, and no worker holds one.
    Frozen,
    /// COMMIT was sent.
    Sent,
    /// The outcome of [`Action::Swap`].
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`]; `None` if the word is invalid.
    Seen(Option<Word>),
    /// The source failed to carry out an action.
    Failed(String),
    /// The operator cancelled.
    Cancel,
}

/// An action of a source. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave the front-end's messages in its socket from now on, and permit no other change of the session.
    Hold,
    /// Send the device, the session and the descriptors in a STAGE and as many DESCRIPTORS as are needed.
    Stage {
        /// Include a vhost-net instance per queue pair.
        vhost: bool,
    },
    /// Stop all rings; then report [`Event::Frozen`].
    Freeze,
    /// Send the changes since STAGE in a COMMIT; then report [`Event::Sent`].
    Commit {
        /// The ownership word, offered.
        word: Word,
        /// The source's time stamps so far.
        times: FreezeTimes,
    },
    /// Change the word by compare-and-swap; then report [`Event::Swapped`].
    Swap {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Read the word; then report [`Event::Seen`].
    Look,
    /// Continue unchanged: restart the stopped rings and read from the front-end again.
    Resume,
    /// Like [`Self::Resume`], but the target may have worked on the rings: continue from the used indices and drop the
    /// frames in hand.
    Recover,
    /// The target owns the session: close all descriptors, but remove no file and run no script.
    Release,
    /// Send this message.
    Send(Message),
    /// Close the connection.
    Close,
}

/// Time stamps of the source, by `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    began: Duration,
    ready: Duration,
    staged: Duration,
    freeze: FreezeTimes,
}

/// Why the word is being swapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The hand-over ends for this reason.
    End(EndReason),
    /// The target claims to have taken the session.
    Active(TakeTimes),
}

/// The state of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// STAGE was sent; the rings run.
    Staging {
        /// The time stamps so far.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
    /// The rings are being stopped.
    Freezing {
        /// The time stamps so far.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
    /// All rings are stopped, and the swap that offers the session is under way.
    Offering {
        /// The time stamps so far.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
        /// The new value of the word.
        word: Word,
    },
    /// The session is offered, and COMMIT is sent.
    Committed {
        /// The time stamps so far.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
        /// The word, offered.
        word: Word,
    },
    /// The swap that makes the source the final owner is under way.
    Leaving {
        /// The time stamps so far.
        marks: Marks,
        /// The phase in which the hand-over ends.
        phase: Phase,
        /// Why the source swaps the word.
        cause: Cause,
    },
    /// The word says that the target owns the session.
    Lost {
        /// The time stamps so far.
        marks: Marks,
        /// The word, owned by the target.
        word: Word,
        /// The target's time stamps, if ACTIVE has arrived.
        active: Option<TakeTimes>,
        /// When to read the word next.
        look: Duration,
    },
    /// The target is dead, and the swap that takes the session back is under way.
    Surviving {
        /// The time stamps so far.
        marks: Marks,
    },
    /// The target is the final owner. The report is missing if ACTIVE did not arrive.
    HandedOver(Option<Report>),
    /// The source is the final owner.
    Ended {
        /// The phase in which the hand-over ended.
        phase: Phase,
        /// Why it ended.
        reason: EndReason,
    },
}

/// The next state and the actions to carry out.
pub type Step = (Source, Vec<Action>);

impl Source {
    /// Stages the session after the prologue, which began at `began`. `vhost` adds vhost-net instances for the target.
    pub fn staging(vhost: bool, began: Duration, now: Duration) -> Step {
        let marks = Marks { began, ready: now, ..Marks::default() };
        let state = Self::Staging { marks, deadline: now + STAGING_PATIENCE };
        (state, vec![Action::Hold, Action::Stage { vhost }])
    }

    /// Returns when [`Event::Time`] is due, if ever.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Staging { deadline, .. }
            | Self::Freezing { deadline, .. }
            | Self::Offering { deadline, .. }
            | Self::Committed { deadline, .. }
            | Self::Lost { look: deadline, .. } => Some(*deadline),
            Self::Leaving { .. } | Self::Surviving { .. } | Self::HandedOver(_) | Self::Ended { .. } => None,
        }
    }

    /// Returns the next state and the actions to carry out. `now` is `CLOCK_MONOTONIC`, read for this event. Accepts
    /// every event in every state: an unexpected message ends the hand-over as a timeout does.
    pub fn step(self, event: Event, now: Duration) -> Step {
        match self {
            Self::Staging { marks, deadline } => Self::staged(marks, deadline, event, now),
            Self::Freezing { marks, deadline } => Self::freezing(marks, deadline, event, now),
            Self::Offering { marks, deadline, word } => Self::offering(marks, deadline, word, &event, now),
            Self::Committed { marks, deadline, word } => Self::committed(marks, deadline, word, event, now),
            Self::Leaving { marks, phase, cause } => match event {
                Event::Swapped(outcome) => Self::left(marks, phase, cause, outcome, now),
                _ => (Self::Leaving { marks, phase, cause }, Vec::new()),
            },
            Self::Lost { marks, word, active, look } => Self::lost(marks, word, active, look, &event, now),
            Self::Surviving { marks } => match event {
                // The target settled before it died: what the front-end sent to it is lost.
                Event::Swapped(SwapOutcome::Lost(Word { owner: Owner::Settled, .. })) => {
                    Self::hand_over(marks, None)
                }
                // The target is dead, so the source is the only possible owner.
                Event::Swapped(_) => {
                    let state = Self::Ended { phase: Phase::Commit, reason: EndReason::Survived };
                    (state, vec![Action::Recover, Action::Close])
                }
                _ => (Self::Surviving { marks }, Vec::new()),
            },
            // A late event changes nothing.
            Self::HandedOver(_) | Self::Ended { .. } => (self, Vec::new()),
        }
    }

    fn staged(marks: Marks, deadline: Duration, event: Event, now: Duration) -> Step {
        match event {
            Event::Message(Message::Staged(_)) => {
                let freeze = FreezeTimes { freeze: nanoseconds(now), ..FreezeTimes::default() };
                let marks = Marks { staged: now, freeze, ..marks };
                (Self::Freezing { marks, deadline: now + FREEZE_PATIENCE }, vec![Action::Freeze])
            }
            event => match end(event, deadline, now) {
                Some(reason) => Self::leave(marks, Phase::Stage, Word::INITIAL, Cause::End(reason)),
                None => (Self::Staging { marks, deadline }, Vec::new()),
            },
        }
    }

    fn freezing(marks: Marks, deadline: Duration, event: Event, now: Duration) -> Step {
        match (event, Word::INITIAL.offered()) {
            (Event::Frozen, Some(word)) => {
                let freeze = FreezeTimes { stopped: nanoseconds(now), ..marks.freeze };
                let state = Self::Offering { marks: Marks { freeze, ..marks }, deadline, word };
                (state, vec![Action::Swap { from: Word::INITIAL, to: word }])
            }
            (event, _) => match end(event, deadline, now) {
                Some(reason) => Self::leave(marks, Phase::Freeze, Word::INITIAL, Cause::End(reason)),
                None => (Self::Freezing { marks, deadline }, Vec::new()),
            },
        }
    }

    fn offering(marks: Marks, deadline: Duration, word: Word, event: &Event, now: Duration) -> Step {
        match event {
            Event::Swapped(SwapOutcome::Won) => {
                let commit = Action::Commit { word, times: marks.freeze };
                (Self::Committed { marks, deadline, word }, vec![commit])
            }
            Event::Swapped(outcome) => {
                Self::left(marks, Phase::Freeze, Cause::End(EndReason::Meaningless), *outcome, now)
            }
            _ => (Self::Offering { marks, deadline, word }, Vec::new()),
        }
    }

    fn committed(mut marks: Marks, deadline: Duration, word: Word, event: Event, now: Duration) -> Step {
        let cause = match event {
            Event::Sent => {
                marks.freeze.sent = nanoseconds(now);
                return (Self::Committed { marks, deadline, word }, Vec::new());
            }
            Event::Message(Message::Active(active)) => Cause::Active(active.times),
            event => match end(event, deadline, now) {
                Some(reason) => Cause::End(reason),
                None => return (Self::Committed { marks, deadline, word }, Vec::new()),
            },
        };
        Self::leave(marks, Phase::Commit, word, cause)
    }

    /// Tries to make the source the final owner; fails if the target has taken the session.
    fn leave(marks: Marks, phase: Phase, from: Word, cause: Cause) -> Step {
        let swap = from.aborted().map(|to| Action::Swap { from, to });
        (Self::Leaving { marks, phase, cause }, swap.into_iter().collect())
    }

    fn left(marks: Marks, phase: Phase, cause: Cause, outcome: SwapOutcome, now: Duration) -> Step {
        match (outcome, cause) {
            (SwapOutcome::Lost(Word { owner: Owner::Settled, .. }), Cause::Active(times)) => {
                Self::hand_over(marks, Some(&times))
            }
            (SwapOutcome::Lost(Word { owner: Owner::Settled, .. }), _) => Self::hand_over(marks, None),
            (SwapOutcome::Lost(word @ Word { owner: Owner::Target, .. }), cause) => {
                Self::lose(marks, phase, &cause, word, now)
            }
            // The target cannot have taken the session.
            (outcome, cause) => {
                let reason = match cause {
                    _ if outcome != SwapOutcome::Won => EndReason::Meaningless,
                    Cause::Active(_) => EndReason::Untrue,
                    Cause::End(reason) => reason,
                };
                (Self::Ended { phase, reason }, vec![Action::Resume, Action::Close])
            }
        }
    }

    fn lose(marks: Marks, phase: Phase, cause: &Cause, word: Word, now: Duration) -> Step {
        // Stops the rings if the target took a session that was not offered: there must never be two owners.
        let freeze = (phase == Phase::Stage).then_some(Action::Freeze);
        if *cause == Cause::End(EndReason::Dead) {
            let (state, swap) = Self::survive(marks, word);
            return (state, freeze.into_iter().chain(swap).collect());
        }
        let (active, look) = match cause {
            Cause::Active(times) => (Some(*times), SOON),
            Cause::End(_) => (None, LOOK),
        };
        (Self::Lost { marks, word, active, look: now + look }, freeze.into_iter().collect())
    }

    fn lost(
        marks: Marks,
        word: Word,
        active: Option<TakeTimes>,
        look: Duration,
        event: &Event,
        now: Duration,
    ) -> Step {
        let (active, look, actions) = match event {
            Event::Dead => return Self::survive(marks, word),
            Event::Seen(Some(Word { owner: Owner::Settled, .. })) => {
                return Self::hand_over(marks, active.as_ref());
            }
            Event::Message(Message::Active(told)) => (Some(told.times), look, vec![Action::Look]),
            Event::Time if now >= look => (active, now + LOOK, vec![Action::Look]),
            _ => (active, look, Vec::new()),
        };
        (Self::Lost { marks, word, active, look }, actions)
    }

    fn survive(marks: Marks, word: Word) -> Step {
        let swap = word.survived_by_source().map(|to| Action::Swap { from: word, to });
        (Self::Surviving { marks }, swap.into_iter().collect())
    }

    fn hand_over(marks: Marks, times: Option<&TakeTimes>) -> Step {
        let Marks { began, ready, staged, freeze } = marks;
        let report = times.map(|take| {
            let (check, stage) = (ready.saturating_sub(began), staged.saturating_sub(ready));
            Report::of_freeze(&freeze, take).after(check, stage)
        });
        (Self::HandedOver(report), vec![Action::Release, Action::Close])
    }
}

/// Returns why an unexpected event ends the hand-over, or `None` if it does not.
fn end(event: Event, deadline: Duration, now: Duration) -> Option<EndReason> {
    match event {
        Event::Message(message) => Some(unexpected(message)),
        Event::Closed => Some(EndReason::Closed),
        Event::Dead => Some(EndReason::Dead),
        Event::Time => (now >= deadline).then_some(EndReason::Silent),
        Event::Failed(text) => Some(EndReason::Failed(text)),
        Event::Cancel => Some(EndReason::Cancelled),
        Event::Frozen | Event::Sent | Event::Swapped(_) | Event::Seen(_) => None,
    }
}
