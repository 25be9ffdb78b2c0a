//! The end that serves, and hands its session over.
//!
//! ```text
//!   Greeting ─HELLO─▶ Checking ─READY─▶ Staging ─STAGED─▶ Freezing ─all stopped─▶ Offering ─swap won─▶ Committed
//!      │ 2 s             │ 2 s            │ 10 s             │ 500 ms                                     │
//!      └───────┬─────────┘                └────────┬─────────┴─────────┬── ACTIVE, refused, end, death ────┘
//!              ▼                                   ▼                   ▼   or 500 ms from the freeze on
//!            Ended ◀────────── swap won ─────── Leaving ──── swap lost, the word is settled ──▶ HandedOver
//!              ▲                                   │ swap lost, the word is the target's            ▲
//!              └── the target is proven dead ──── Lost ────── the word is settled ──────────────────┘
//! ```
//! Every way out from `Staging` on is a swap of the ownership word, made before anything else is done; what was said
//! before it decides nothing. So one that was stopped at any place, and goes on later, does what the word says. In
//! `Lost` it stays still and keeps everything: if the target dies before it has settled, the source goes on with what
//! the used rings say.

use std::time::Duration;

use super::report::{Report, nanoseconds};
use super::state::{FreezeTimes, TakeTimes};
use crate::handover::message::{Hello, Message, SESSION};
use crate::handover::source::PATIENCE;
use crate::ownership::{Owner, Swapped, Word};
use crate::reasons::Reasons;

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
    /// The target said something.
    Message(Message),
    /// The connection ended, brought what is no message, or could not take one.
    Closed,
    /// The target is proven dead: its pidfd is readable. Comes after what it said before.
    Dead,
    /// Time has passed.
    Time,
    /// All rings are stopped, and in nobody's hands.
    Frozen,
    /// COMMIT went out.
    Sent,
    /// How [`Action::Swap`] ended: where it failed, with what the word is, if that makes sense.
    Swapped(Swapped),
    /// The answer to [`Action::Look`].
    Seen(Option<Word>),
    /// This end cannot do what it is to do.
    Failed(Reasons),
    /// The operator does not want it any more.
    Cancel,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send device and session as they are now in a PREPARE.
    Prepare,
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

/// How far it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The target had not answered yet.
    Greet,
    /// The target judged.
    Check,
    /// The target made everything ready.
    Stage,
    /// The rings were being stopped.
    Freeze,
    /// They were stopped, and the session offered.
    Commit,
}

impl Phase {
    /// As it is said to the operator.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greet => "greet",
            Self::Check => "check",
            Self::Stage => "stage",
            Self::Freeze => "freeze",
            Self::Commit => "commit",
        }
    }
}

/// Why it is over, with the session the source's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The target would take it; nothing else was asked.
    #[error("the target would take the session")]
    Possible,
    /// The target refuses.
    #[error("the target refuses: {0}")]
    Refused(Reasons),
    /// The target went away.
    #[error("the target closed the connection")]
    Closed,
    /// The target died.
    #[error("the target died")]
    Dead,
    /// The target died with the session, which is here again.
    #[error("the target died after it had taken the session; the source has taken it back")]
    Survived,
    /// The target does not answer.
    #[error("the target does not answer")]
    Silent,
    /// The target said something that it cannot say now.
    #[error("the target sent {0} at the wrong time")]
    Wrong(&'static str),
    /// The target said that it took the session, and did not.
    #[error("the target said that it had taken the session, but had not")]
    Untrue,
    /// The word has a value that it cannot have.
    #[error("the ownership word was not what it must be")]
    Meaningless,
    /// This end could not go on.
    #[error("{0}")]
    Failed(Reasons),
    /// The operator's wish.
    #[error("cancelled")]
    Cancelled,
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
    End(Ended),
    /// The target says that it has taken the session.
    Active(TakeTimes),
}

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// HELLO was sent.
    Greeting {
        /// Nothing is to be handed over.
        dry_run: bool,
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
    /// PREPARE was sent.
    Checking {
        /// The target wants instances of vhost-net.
        vhost: bool,
        /// Nothing is to be handed over.
        dry_run: bool,
        /// When what happened.
        marks: Marks,
        /// When to give up.
        deadline: Duration,
    },
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
        ended: Ended,
    },
}

/// The next state and what is to be done.
pub type Step = (Source, Vec<Action>);

impl Source {
    /// Begins on a fresh connection.
    pub fn begin(program: &str, dry_run: bool, now: Duration) -> Step {
        let purpose = SESSION.to_owned();
        let hello = Hello { purpose, program: program.to_owned(), dry_run, wants_vhost: false };
        let marks = Marks { began: now, ..Marks::default() };
        let state = Self::Greeting { dry_run, marks, deadline: now + PATIENCE };
        (state, vec![Action::Send(Message::Hello(hello))])
    }

    /// When [`Event::Time`] will matter.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. }
            | Self::Checking { deadline, .. }
            | Self::Staging { deadline, .. }
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
            Self::Greeting { .. } | Self::Checking { .. } => self.talking(event, now),
            Self::Staging { marks, deadline } => Self::staging(marks, deadline, event, now),
            Self::Freezing { marks, deadline } => Self::freezing(marks, deadline, event, now),
            Self::Offering { marks, deadline, word } => Self::offering(marks, deadline, word, &event, now),
            Self::Committed { marks, deadline, word } => Self::committed(marks, deadline, word, event, now),
            Self::Leaving { marks, phase, cause } => match event {
                Event::Swapped(result) => Self::left(marks, phase, cause, result, now),
                _ => (Self::Leaving { marks, phase, cause }, Vec::new()),
            },
            Self::Lost { marks, word, active, look } => Self::lost(marks, word, active, look, &event, now),
            Self::Surviving { marks } => match event {
                // It settled before it died: nobody knows any more what the front-end said to it.
                Event::Swapped(Err(Some(Word { owner: Owner::Settled, .. }))) => Self::hand_over(marks, None),
                // There is nobody else.
                Event::Swapped(_) => {
                    let state = Self::Ended { phase: Phase::Commit, ended: Ended::Survived };
                    (state, vec![Action::Recover, Action::Close])
                }
                _ => (Self::Surviving { marks }, Vec::new()),
            },
            // A late word changes nothing.
            Self::HandedOver(_) | Self::Ended { .. } => (self, Vec::new()),
        }
    }

    fn talking(self, event: Event, now: Duration) -> Step {
        match (self, event) {
            (Self::Greeting { dry_run, marks, .. }, Event::Message(Message::Hello(hello))) => {
                let vhost = hello.wants_vhost;
                let state = Self::Checking { vhost, dry_run, marks, deadline: now + PATIENCE };
                (state, vec![Action::Prepare])
            }
            (Self::Checking { vhost, dry_run: false, marks, .. }, Event::Message(Message::Ready(_))) => {
                let marks = Marks { ready: now, ..marks };
                let state = Self::Staging { marks, deadline: now + STAGING_PATIENCE };
                (state, vec![Action::Hold, Action::Stage { vhost }])
            }
            (Self::Checking { dry_run: true, .. }, Event::Message(Message::Ready(_))) => {
                (Self::Ended { phase: Phase::Check, ended: Ended::Possible }, vec![Action::Close])
            }
            (state, event) => match state.deadline().and_then(|deadline| end(event, deadline, now)) {
                Some(ended) => {
                    let greeting = matches!(state, Self::Greeting { .. });
                    let phase = if greeting { Phase::Greet } else { Phase::Check };
                    (Self::Ended { phase, ended }, vec![Action::Close])
                }
                None => (state, Vec::new()),
            },
        }
    }

    fn staging(marks: Marks, deadline: Duration, event: Event, now: Duration) -> Step {
        match event {
            Event::Message(Message::Staged(_)) => {
                let freeze = FreezeTimes { freeze: nanoseconds(now), ..FreezeTimes::default() };
                let marks = Marks { staged: now, freeze, ..marks };
                (Self::Freezing { marks, deadline: now + FREEZE_PATIENCE }, vec![Action::Freeze])
            }
            event => match end(event, deadline, now) {
                Some(ended) => Self::leave(marks, Phase::Stage, Word::INITIAL, Cause::End(ended)),
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
                Some(ended) => Self::leave(marks, Phase::Freeze, Word::INITIAL, Cause::End(ended)),
                None => (Self::Freezing { marks, deadline }, Vec::new()),
            },
        }
    }

    fn offering(marks: Marks, deadline: Duration, word: Word, event: &Event, now: Duration) -> Step {
        match event {
            Event::Swapped(Ok(())) => {
                let commit = Action::Commit { word, times: marks.freeze };
                (Self::Committed { marks, deadline, word }, vec![commit])
            }
            Event::Swapped(result) => {
                Self::left(marks, Phase::Freeze, Cause::End(Ended::Meaningless), *result, now)
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
                Some(ended) => Cause::End(ended),
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

    fn left(marks: Marks, phase: Phase, cause: Cause, result: Swapped, now: Duration) -> Step {
        match (result, cause) {
            (Err(Some(Word { owner: Owner::Settled, .. })), Cause::Active(times)) => {
                Self::hand_over(marks, Some(&times))
            }
            (Err(Some(Word { owner: Owner::Settled, .. })), _) => Self::hand_over(marks, None),
            (Err(Some(word @ Word { owner: Owner::Target, .. })), cause) => {
                Self::lose(marks, phase, &cause, word, now)
            }
            // Nobody else can have taken it.
            (result, cause) => {
                let ended = match cause {
                    _ if result.is_err() => Ended::Meaningless,
                    Cause::Active(_) => Ended::Untrue,
                    Cause::End(ended) => ended,
                };
                (Self::Ended { phase, ended }, vec![Action::Resume, Action::Close])
            }
        }
    }

    fn lose(marks: Marks, phase: Phase, cause: &Cause, word: Word, now: Duration) -> Step {
        // A target that took what was not offered is obeyed all the same: there must not be two.
        let freeze = (phase == Phase::Stage).then_some(Action::Freeze);
        if *cause == Cause::End(Ended::Dead) {
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

/// Whether an event that nothing else is to be made of ends the hand-over.
fn end(event: Event, deadline: Duration, now: Duration) -> Option<Ended> {
    match event {
        Event::Message(Message::Refuse(refuse)) => Some(Ended::Refused(refuse.reasons.bounded())),
        Event::Message(message) => Some(Ended::Wrong(message.name())),
        Event::Closed => Some(Ended::Closed),
        Event::Dead => Some(Ended::Dead),
        Event::Time => (now >= deadline).then_some(Ended::Silent),
        Event::Failed(reasons) => Some(Ended::Failed(reasons)),
        Event::Cancel => Some(Ended::Cancelled),
        Event::Frozen | Event::Sent | Event::Swapped(_) | Event::Seen(_) => None,
    }
}
