//! The target of a session's hand-over, after the [prologue](crate::handover::prologue).
//!
//! ```text
//!   Ready ─STAGE─▶ Gathering ─all descriptors─▶ Staging ─all there─▶ Staged
//!     │ 5 s           │ 5 s                        │ refused          │ │
//!     └───────┬───────┴────────────────────────────┘   COMMIT: swap,  │ │
//!             ▼                                         or survive    │ │
//!           Ended ◀── swap lost, the word aborted, 30 s: drops all ───┘ │
//!                              Active ◀── settled ── Starting ◀─ swap won
//! ```
//! In `Staged` the target holds everything and has touched nothing. If the source is proven dead, the target takes the
//! session and continues from the used indices. A closed connection proves nothing: the target keeps the staged session
//! until the word is aborted or 30 s have passed. It reads from the front-end only after the word is settled.
//!
//! Generic over the descriptors `F` and the staged device `D`. Every exit returns the device, in [`Action::Release`],
//! [`Action::Activate`] or [`Action::Recover`]. Unused descriptors are dropped.

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

/// How long the target holds a staged session for a source that does not continue.
pub const HOLDING: Duration = Duration::from_secs(30);
/// The most DESCRIPTORS packets after STAGE: 128 pairs and 509 regions need 6.
const MAX_MORE: u16 = 8;
/// How many times a survivor retries a lost swap.
const TRIES: u8 = 3;

/// An event for a target. [`Event::Swapped`] and [`Event::Seen`] answer their [`Action`] immediately, before any other
/// event. [`Event::Dead`] follows the source's last message and precedes [`Event::Time`].
#[derive(Debug)]
pub enum Event<F, D> {
    /// A message arrived, with these descriptors.
    Message(Message, Vec<F>),
    /// The connection ended, the peer sent an invalid message, or a message could not be sent.
    Closed,
    /// The source is proven dead: its pidfd is readable.
    Dead,
    /// Time has passed.
    Time,
    /// The answer to [`Action::Stage`].
    Staged(Result<(D, Shape), Reasons>),
    /// The outcome of [`Action::Swap`].
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`]; `None` if the word is invalid.
    Seen(Option<Word>),
    /// The answer to [`Action::Activate`] and [`Action::Recover`]: all rings run.
    Activated,
}

/// An action of a target. Actions are carried out in order.
#[derive(Debug)]
pub enum Action<F, D> {
    /// Check the session, claim all descriptors and set up everything without touching it; then report
    /// [`Event::Staged`].
    Stage(Box<Stage>, NamedFds<F>),
    /// Change the word by compare-and-swap; then report [`Event::Swapped`].
    Swap {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Read the word; then report [`Event::Seen`].
    Look,
    /// The target owns the session: start its rings at COMMIT's indices, process each once and signal each call once;
    /// then report [`Event::Activated`]. Do not read from the front-end yet.
    Activate(D, Box<CheckedCommit>),
    /// Like [`Self::Activate`] without a COMMIT: start the rings at the used indices.
    Recover(D),
    /// Read from the front-end.
    Listen,
    /// The source owns the session: close and unmap everything.
    Release(D),
    /// The word unexpectedly says that the source owns the session: stop the rings immediately and end.
    Abandon,
    /// Send this message.
    Send(Message),
    /// Close the connection.
    Close,
}

/// How a target took the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The source committed it.
    Committed(Report),
    /// The source died.
    Survived,
}

/// The state of a target.
#[derive(Debug)]
pub enum Target<F, D> {
    /// The target waits for STAGE.
    Ready {
        /// When to give up.
        deadline: Duration,
    },
    /// The target waits for more DESCRIPTORS.
    Gathering {
        /// The STAGE that they belong to.
        stage: Box<Stage>,
        /// The descriptors received so far.
        fds: NamedFds<F>,
        /// When to give up.
        deadline: Duration,
    },
    /// The session is being staged.
    Staging {
        /// The connection to the source is open.
        linked: bool,
        /// The source is proven dead.
        dead: bool,
    },
    /// The session is staged and untouched.
    Staged(Staged<D>),
    /// The swap that takes the session is under way.
    Taking {
        /// The staged device.
        device: D,
        /// COMMIT and when it arrived; `None` for a survivor.
        commit: Option<(Box<CheckedCommit>, Duration)>,
        /// The new value of the word.
        word: Word,
        /// How many more times a lost swap is retried.
        tries: u8,
    },
    /// The target owns the session: its rings start, then the word is settled.
    Starting {
        /// The word, owned by the target.
        word: Word,
        /// Both ends' time stamps, if the source committed.
        times: Option<(FreezeTimes, TakeTimes)>,
    },
    /// The target owns the session and serves it.
    Active(Taken),
    /// The hand-over has ended without the session.
    Ended,
}

/// A staged session, which the target has not touched.
#[derive(Debug)]
pub struct Staged<D> {
    device: D,
    shape: Shape,
    /// The connection to the source is open.
    linked: bool,
    /// The source is proven dead.
    dead: bool,
    /// When to drop the session.
    deadline: Duration,
    /// When to read the word next while the connection is closed.
    look: Duration,
}

/// The next state and the actions to carry out.
pub type Step<F, D> = (Target<F, D>, Vec<Action<F, D>>);

impl<F, D> Target<F, D> {
    /// Waits for STAGE after the prologue.
    pub fn ready(now: Duration) -> Self {
        Self::Ready { deadline: now + PATIENCE }
    }

    /// Returns when [`Event::Time`] is due, if ever.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Ready { deadline } | Self::Gathering { deadline, .. } => Some(*deadline),
            Self::Staged(staged) if staged.linked => Some(staged.deadline),
            Self::Staged(staged) => Some(staged.deadline.min(staged.look)),
            _ => None,
        }
    }

    /// Returns the next state and the actions to carry out. `now` is `CLOCK_MONOTONIC`, read for this event. Accepts
    /// every event in every state: an unexpected message ends the connection.
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

    /// Handles unexpected events before anything is staged.
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
            // The connection is useless without the source.
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

    /// Takes the session from a dead source, unless the word is final.
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
    /// Returns the staged device.
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
            // The word is final or invalid, and this target has not taken the session.
            Event::Seen(_) => (Target::Ended, vec![Action::Release(self.device), Action::Close]),
            Event::Time if now >= self.deadline => {
                (Target::Ended, vec![Action::Release(self.device), Action::Close])
            }
            Event::Time if !self.linked && now >= self.look => (Target::Staged(self), vec![Action::Look]),
            _ => (Target::Staged(self), Vec::new()),
        }
    }

    /// Handles COMMIT. The swap that follows is the commit point: if it wins, the target owns the session.
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
