//! The end that waits for a session, once the [prologue](crate::handover::prologue) has agreed.
//!
//! ```text
//!   Ready ─STAGE─▶ Gathering ─all descriptors─▶ Staging ─all there─▶ Staged
//!     │ 2 s           │ 2 s                        │ refused          │ │
//!     └───────┬───────┴────────────────────────────┘   COMMIT: swap,  │ │
//!             ▼                                         or survive    │ │
//!           Ended ◀── swap lost, the word aborted, 30 s: drops all ───┘ │
//!                              Active ◀── settled ── Starting ◀─ swap won
//! ```
//! From `Staged` on it holds everything there is to take and has touched nothing. If the source is proven dead, it takes
//! the session as its survivor, with what the used rings say. A connection that ends proves nothing: the target keeps
//! what it has until the word or the clock says to drop it. It hears the front-end when the word is settled, not before.
//!
//! Generic over descriptors `F` and over what was made of them, `D`, which is given back in every way out:
//! [`Action::Release`], [`Action::Activate`] or [`Action::Recover`]. Descriptors that are of no use are dropped.

use std::time::Duration;

use super::report::{Report, nanoseconds};
use super::source::LOOK;
use super::validate::{CheckedCommit, Shape};
use crate::fd_manifest::{FdManifest, ManifestError, NamedFds};
use crate::handover::prologue::PATIENCE;
use crate::handover::wire::message::{Active, Commit, Message, Refuse, Stage, StagedAll};
use crate::handover::wire::refusal::Refusal;
use crate::handover::wire::session::{FreezeTimes, TakeTimes};
use crate::ownership::{Owner, SwapOutcome, Word};
use crate::reasons::Reasons;

/// How long everything is held for a source that does not go on.
pub const HOLDING: Duration = Duration::from_secs(30);
/// The most packets that bring descriptors after STAGE: for 128 pairs and 509 regions 6 are needed.
const MAX_MORE: u16 = 8;
/// How often a survivor tries to change the word of the dead.
const TRIES: u8 = 3;

/// What happens to a target. [`Event::Swapped`] and [`Event::Seen`] come at once after their [`Action`], before any
/// other; where the source is dead, [`Event::Dead`] comes after what it said before, and before [`Event::Time`].
#[derive(Debug)]
pub enum Event<F, D> {
    /// A message arrived, with these descriptors.
    Message(Message, Vec<F>),
    /// The connection ended, brought something that is not a message, or could not take one.
    Closed,
    /// The source is proven dead: its pidfd is readable.
    Dead,
    /// Time has passed.
    Time,
    /// The answer to [`Action::Stage`].
    Staged(Result<(D, Shape), Reasons>),
    /// How [`Action::Swap`] ended.
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`].
    Seen(Option<Word>),
    /// The answer to [`Action::Activate`] and [`Action::Recover`]: all rings run.
    Activated,
}

/// What is to be done, in this order.
#[derive(Debug)]
pub enum Action<F, D> {
    /// Check this, claim all descriptors, and make everything ready without touching it; then [`Event::Staged`].
    Stage(Box<Stage>, NamedFds<F>),
    /// Change the word by compare-and-swap; then [`Event::Swapped`].
    Swap {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Look at the word; then [`Event::Seen`].
    Look,
    /// The session is the target's: have its rings run from where COMMIT says, look at each once and signal each call
    /// once; then [`Event::Activated`]. The front-end is not heard yet.
    Activate(D, Box<CheckedCommit>),
    /// Likewise, without COMMIT: from where the used rings say.
    Recover(D),
    /// Hear the front-end.
    Listen,
    /// Close and unmap everything: it is the source's.
    Release(D),
    /// The word says that the source has the session, whatever it believes: stop the rings at once, and end.
    Abandon,
    /// Send this.
    Send(Message),
    /// Close the connection.
    Close,
}

/// How a target took the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The source committed it.
    Committed(Report),
    /// The source is dead.
    Survived,
}

/// A target.
#[derive(Debug)]
pub enum Target<F, D> {
    /// The source may stage the session.
    Ready {
        /// When to give up.
        deadline: Duration,
    },
    /// More descriptors are on their way.
    Gathering {
        /// What they belong to.
        stage: Box<Stage>,
        /// Those that are here.
        fds: NamedFds<F>,
        /// When to give up.
        deadline: Duration,
    },
    /// Everything is being made ready.
    Staging {
        /// The source is still there to talk to.
        linked: bool,
        /// It is proven dead.
        dead: bool,
    },
    /// Everything is here, untouched.
    Staged(Staged<D>),
    /// The word is being swapped.
    Taking {
        /// What is to be taken.
        device: D,
        /// What the source said at last, if it did, and when that was here.
        commit: Option<(Box<CheckedCommit>, Duration)>,
        /// What the word is to be.
        word: Word,
        /// How often it may still be tried.
        tries: u8,
    },
    /// The session is ours, and its rings begin to run; then it is settled.
    Starting {
        /// The word, ours.
        word: Word,
        /// When what happened, if the source committed.
        times: Option<(FreezeTimes, TakeTimes)>,
    },
    /// The session is ours, and runs.
    Active(Taken),
    /// Nothing will come of this connection.
    Ended,
}

/// What a target holds that has touched nothing.
#[derive(Debug)]
pub struct Staged<D> {
    device: D,
    shape: Shape,
    /// The source is still there to talk to.
    linked: bool,
    /// It is proven dead.
    dead: bool,
    /// When to drop it.
    deadline: Duration,
    /// When to look at the word, where nobody tells of it.
    look: Duration,
}

/// The next state and what is to be done.
pub type Step<F, D> = (Target<F, D>, Vec<Action<F, D>>);

impl<F, D> Target<F, D> {
    /// The prologue agreed: the source may stage the session.
    pub fn ready(now: Duration) -> Self {
        Self::Ready { deadline: now + PATIENCE }
    }

    /// When [`Event::Time`] will matter.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Ready { deadline } | Self::Gathering { deadline, .. } => Some(*deadline),
            Self::Staged(staged) if staged.linked => Some(staged.deadline),
            Self::Staged(staged) => Some(staged.deadline.min(staged.look)),
            _ => None,
        }
    }

    /// What follows from `event`; `now` is `CLOCK_MONOTONIC`, read for this event. There is nothing that cannot follow: what the source must not say ends the connection.
    pub fn step(self, event: Event<F, D>, now: Duration) -> Step<F, D> {
        match (self, event) {
            (Self::Ready { .. }, Event::Message(Message::Stage(mut stage), fds)) => {
                let names = std::mem::take(&mut stage.fds);
                match names.pair(fds) {
                    Ok(fds) if stage.more <= MAX_MORE => Self::gather(stage, fds, now),
                    Ok(fds) => Self::refuse(Refusal::from(ManifestError::TooMany(fds.len())).into()),
                    Err(error) => Self::refuse(Refusal::from(error).into()),
                }
            }
            (
                Self::Gathering { mut stage, fds: known, .. },
                Event::Message(Message::Descriptors(more), fds),
            ) => {
                stage.more -= 1;
                match more.fds.pair(fds).and_then(|fds| known.join(fds)) {
                    Ok(fds) => Self::gather(stage, fds, now),
                    Err(error) => Self::refuse(Refusal::from(error).into()),
                }
            }
            (state @ (Self::Ready { .. } | Self::Gathering { .. }), event) => state.before(&event, now),
            (Self::Staging { linked, dead }, event) => Self::staging(linked, dead, event, now),
            (Self::Staged(staged), event) => staged.step(event, now),
            (Self::Taking { device, commit, word, tries }, Event::Swapped(outcome)) => {
                Self::swapped(device, commit, word, tries, outcome, now)
            }
            (Self::Starting { word, mut times }, Event::Activated) => {
                let told = times.as_mut().map(|(_, times)| {
                    times.running = nanoseconds(now);
                    Action::Send(Message::Active(Active { epoch: word.epoch, times: *times }))
                });
                let swap = word.settled().map(|to| Action::Swap { from: word, to });
                (Self::Starting { word, times }, told.into_iter().chain(swap).collect())
            }
            (Self::Starting { times, .. }, Event::Swapped(outcome)) => Self::settled(times, outcome),
            (state, _) => (state, Vec::new()),
        }
    }

    fn gather(mut stage: Box<Stage>, fds: NamedFds<F>, now: Duration) -> Step<F, D> {
        if stage.more > 0 {
            return (Self::Gathering { stage, fds, deadline: now + PATIENCE }, Vec::new());
        }
        stage.fds = FdManifest::default();
        (Self::Staging { linked: true, dead: false }, vec![Action::Stage(stage, fds)])
    }

    fn refuse(reasons: Reasons) -> Step<F, D> {
        (Self::Ended, vec![Action::Send(Message::Refuse(Refuse { reasons })), Action::Close])
    }

    /// What is the same while nothing is held that could be taken.
    fn before(self, event: &Event<F, D>, now: Duration) -> Step<F, D> {
        let over = match event {
            Event::Message(..) | Event::Closed | Event::Dead => true,
            Event::Time => self.deadline().is_some_and(|deadline| now >= deadline),
            _ => false,
        };
        if over { (Self::Ended, vec![Action::Close]) } else { (self, Vec::new()) }
    }

    fn staging(linked: bool, dead: bool, event: Event<F, D>, now: Duration) -> Step<F, D> {
        match event {
            Event::Staged(Ok((device, shape))) => {
                let staged =
                    Staged { device, shape, linked, dead, deadline: now + HOLDING, look: now + LOOK };
                let answer = if linked { Action::Send(Message::Staged(StagedAll {})) } else { Action::Look };
                (Self::Staged(staged), vec![answer])
            }
            Event::Staged(Err(reasons)) if linked => Self::refuse(reasons),
            Event::Staged(Err(_)) => (Self::Ended, vec![Action::Close]),
            Event::Message(..) | Event::Closed => {
                (Self::Staging { linked: false, dead }, vec![Action::Close])
            }
            // It cannot be talked to either.
            Event::Dead => (Self::Staging { linked: false, dead: true }, vec![Action::Close]),
            _ => (Self::Staging { linked, dead }, Vec::new()),
        }
    }

    fn swapped(
        device: D,
        commit: Option<(Box<CheckedCommit>, Duration)>,
        word: Word,
        tries: u8,
        outcome: SwapOutcome,
        now: Duration,
    ) -> Step<F, D> {
        match (outcome, commit) {
            (SwapOutcome::Won, Some((commit, received))) => {
                let (received, taken) = (nanoseconds(received), nanoseconds(now));
                let times = TakeTimes { received, taken, running: 0 };
                let state = Self::Starting { word, times: Some((commit.commit().times, times)) };
                (state, vec![Action::Activate(device, commit)])
            }
            (SwapOutcome::Won, None) => (Self::Starting { word, times: None }, vec![Action::Recover(device)]),
            (SwapOutcome::Lost(now), None) if tries > 0 => Self::survive(device, now, tries - 1),
            _ => (Self::Ended, vec![Action::Release(device), Action::Close]),
        }
    }

    /// The source is dead: takes what it has not given to itself for good.
    fn survive(device: D, from: Word, tries: u8) -> Step<F, D> {
        match from.survived_by_target() {
            Some(to) => {
                let state = Self::Taking { device, commit: None, word: to, tries };
                (state, vec![Action::Swap { from, to }])
            }
            None => (Self::Ended, vec![Action::Release(device), Action::Close]),
        }
    }

    fn settled(times: Option<(FreezeTimes, TakeTimes)>, outcome: SwapOutcome) -> Step<F, D> {
        if let SwapOutcome::Lost(Word { owner: Owner::Aborted, .. }) = outcome {
            return (Self::Ended, vec![Action::Abandon, Action::Close]);
        }
        let Some((freeze, times)) = times else {
            return (Self::Active(Taken::Survived), vec![Action::Listen, Action::Close]);
        };
        let taken = Taken::Committed(Report::of_freeze(&freeze, &times));
        (Self::Active(taken), vec![Action::Listen, Action::Close])
    }
}

impl<D> Staged<D> {
    /// What it holds.
    pub fn device(&self) -> &D {
        &self.device
    }

    fn step<F>(mut self, event: Event<F, D>, now: Duration) -> Step<F, D> {
        match event {
            Event::Message(Message::Commit(commit), _) if self.linked => self.commit(commit, now),
            Event::Message(..) | Event::Closed => {
                self.linked = false;
                (Target::Staged(self), vec![Action::Close, Action::Look])
            }
            Event::Dead => {
                self.dead = true;
                (Target::Staged(self), vec![Action::Look])
            }
            Event::Seen(Some(word)) if self.dead => Target::survive(self.device, word, TRIES),
            Event::Seen(Some(Word { owner: Owner::Source | Owner::Offered, .. })) => {
                self.look = now + LOOK;
                (Target::Staged(self), Vec::new())
            }
            // Whatever it is, it is not ours.
            Event::Seen(_) => (Target::Ended, vec![Action::Release(self.device), Action::Close]),
            Event::Time if now >= self.deadline => {
                (Target::Ended, vec![Action::Release(self.device), Action::Close])
            }
            Event::Time if !self.linked && now >= self.look => (Target::Staged(self), vec![Action::Look]),
            _ => (Target::Staged(self), Vec::new()),
        }
    }

    /// The commit: from the swap that follows on, the session is the target's.
    fn commit<F>(mut self, commit: Commit, now: Duration) -> Step<F, D> {
        let from = Word { epoch: commit.epoch, owner: Owner::Offered };
        match (CheckedCommit::try_from((commit, &self.shape)), from.taken()) {
            (Ok(commit), Some(word)) => {
                let commit = Some((Box::new(commit), now));
                let state = Target::Taking { device: self.device, commit, word, tries: 0 };
                (state, vec![Action::Swap { from, to: word }])
            }
            (checked, _) => {
                let reasons = checked.err().unwrap_or_default();
                self.linked = false;
                let refuse = Message::Refuse(Refuse { reasons });
                (Target::Staged(self), vec![Action::Send(refuse), Action::Close, Action::Look])
            }
        }
    }
}
