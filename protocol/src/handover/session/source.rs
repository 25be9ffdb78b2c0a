//! The end that serves, and hands its session over, once the [prologue](crate::handover::prologue) has agreed.
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
//! Every way out is a swap of the ownership word, made before anything else is done; no message before it decides
//! anything. So a source that was stopped at any place, and runs on later, does what the word says. In `Lost` it stays
//! still and keeps everything: if the target dies before it has settled, the source goes on with what the used rings
//! say.

use std::time::Duration;

use super::report::{Report, nanoseconds};
use crate::end_reason::EndReason;
use crate::handover::Phase;
use crate::handover::prologue::unexpected;
use crate::handover::wire::message::Message;
use crate::handover::wire::session::{FreezeTimes, TakeTimes};
use crate::ownership::{Owner, SwapOutcome, Word};

/// How long the target may take to map and set up everything.
pub const STAGING_PATIENCE: Duration = Duration::from_secs(10);
/// How long nobody may serve before the source goes on, if the target has not taken the session.
pub const FREEZE_PATIENCE: Duration = Duration::from_millis(500);
/// How often the word is looked at where nothing else tells of it.
pub const LOOK: Duration = Duration::from_millis(100);
/// How soon the word is looked at once the target has said that it runs: it settles next.
const SOON: Duration = Duration::from_millis(1);

/// What happens to a source. Only what the answer to an [`Action`] is depends on the order: [`Event::Swapped`] and
/// [`Event::Seen`] come at once, before any other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, brought something that is not a message, or could not take one.
    Closed,
    /// The target is proven dead: its pidfd is readable. Comes after what it said before.
    Dead,
    /// Time has passed.
    Time,
    /// All rings are stopped, and in nobody's hands.
    Frozen,
    /// COMMIT went out.
    Sent,
    /// How [`Action::Swap`] ended.
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`].
    Seen(Option<Word>),
    /// This end cannot do what it is to do.
    Failed(String),
    /// The operator cancelled.
    Cancel,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave the front-end's messages in its socket from now on, and hand out nothing else that changes the session.
    Hold,
    /// Send device, session and descriptors in a STAGE and as many DESCRIPTORS as are needed.
    Stage {
        /// With an instance of vhost-net for each queue pair.
        vhost: bool,
    },
    /// Stop all rings; then [`Event::Frozen`].
    Freeze,
    /// Send what has changed since STAGE in a COMMIT; then [`Event::Sent`].
    Commit {
        /// The ownership word, offered.
        word: Word,
        /// When the source did what so far.
        times: FreezeTimes,
    },
    /// Change the word by compare-and-swap; then [`Event::Swapped`].
    Swap {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Look at the word; then [`Event::Seen`].
    Look,
    /// Go on as if nothing had been: rings run that were stopped, the front-end is heard.
    Resume,
    /// Likewise, but another process may have worked on the rings: go on where the used rings say, without the frames
    /// in hand.
    Recover,
    /// It is the target's: close everything, remove nothing, run nothing.
    Release,
    /// Send this.
    Send(Message),
    /// Close the connection.
    Close,
}

/// When what happened, by `CLOCK_MONOTONIC`.
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
    /// It is over.
    End(EndReason),
    /// The target says that it has taken the session.
    Active(TakeTimes),
}

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// STAGE was sent; the rings run.
    Staging {
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
    /// The rings are being stopped.
    Freezing {
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
    /// They are, and the word is being swapped so that it offers the session.
    Offering {
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
        /// What the word is to be.
        word: Word,
    },
    /// COMMIT was sent.
    Committed {
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
        /// The word, offered.
        word: Word,
    },
    /// The word is being swapped so that the session is the source's for good.
    Leaving {
        /// When what happened.
        marks: Marks,
        /// How far it was.
        phase: Phase,
        /// Why.
        cause: Cause,
    },
    /// The word says that the session is the target's.
    Lost {
        /// When what happened.
        marks: Marks,
        /// The word, the target's.
        word: Word,
        /// The target says that it runs.
        active: Option<TakeTimes>,
        /// When to look at the word.
        look: Duration,
    },
    /// The target is dead, and the word is being swapped so that the session is the source's again.
    Surviving {
        /// When what happened.
        marks: Marks,
    },
    /// It is the target's, for good.
    HandedOver(Option<Report>),
    /// It is the source's, for good.
    Ended {
        /// How far it was.
        phase: Phase,
        /// Why.
        reason: EndReason,
    },
}

/// The next state and what is to be done.
pub type Step = (Source, Vec<Action>);

impl Source {
    /// The prologue, which began at `began`, agreed: stages the session, with vhost-net instances if the target wants
    /// them.
    pub fn staging(vhost: bool, began: Duration, now: Duration) -> Step {
        let marks = Marks { began, ready: now, ..Marks::default() };
        let state = Self::Staging { marks, deadline: now + STAGING_PATIENCE };
        (state, vec![Action::Hold, Action::Stage { vhost }])
    }

    /// When [`Event::Time`] will matter.
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

    /// What follows from `event`; `now` is `CLOCK_MONOTONIC`, read for this event. There is nothing that cannot follow:
    /// what the target must not say ends the hand-over like its silence.
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
                // It settled before it died: nobody knows any more what the front-end said to it.
                Event::Swapped(SwapOutcome::Lost(Word { owner: Owner::Settled, .. })) => {
                    Self::hand_over(marks, None)
                }
                // There is nobody else.
                Event::Swapped(_) => {
                    let state = Self::Ended { phase: Phase::Commit, reason: EndReason::Survived };
                    (state, vec![Action::Recover, Action::Close])
                }
                _ => (Self::Surviving { marks }, Vec::new()),
            },
            // A late word changes nothing.
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

    /// The session is to be the source's for good, if the target has not taken it.
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
            // The target cannot have taken it.
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
        // A target that took what was not offered is obeyed all the same: there must not be two.
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

/// Why an event that the state does not wait for ends the hand-over, if it does.
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
