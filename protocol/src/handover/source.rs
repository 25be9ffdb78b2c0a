//! The end that has the device and offers it.
//!
//! ```text
//!   Greeting ─HELLO─▶ Checking ─READY─▶ Armed ─all rings stopped─▶ Offered ─swap lost─▶ HandedOver
//!      └───────┬──────────┘ REFUSE, end,   ▲ ▲                       │ │
//!              ▼            2 s, cancel    │ └─own ring: swap won────┘ │
//!            Ended ◀───────────────────────┴──REFUSE, end, cancel: swap won
//! ```
//! Every way out of `Offered` is a swap of the ownership word; what was said before it decides nothing. Where the swap
//! fails, the device is the target's only if the word says so: a word without a meaning leaves it to the source.

use std::time::Duration;

use super::message::{DEVICE, Hello, Message, OfOffer};
use crate::ownership::{Owner, Swapped, Word};
use crate::reasons::Reasons;

/// How long the target may take for an answer before the device is offered.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The target said something.
    Message(Message),
    /// The connection ended, or brought what is no message.
    Closed,
    /// Time has passed; the value is the time now, since whenever.
    Time(Duration),
    /// All rings are stopped.
    Suspended,
    /// One of the source's rings is about to start.
    RingStarting,
    /// How [`Action::Swap`] ended.
    Swapped(Swapped),
    /// The source's front-end has gone.
    FrontendLeft {
        /// Its VM may have moved: to whoever moves the device's state itself it was said that it is saved.
        moved: bool,
    },
    /// Another one is there.
    FrontendCame,
    /// The operator does not want it any more.
    Cancel,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the device as it is now in a PREPARE.
    Prepare,
    /// Put the TAP aside, make the word this, and send both in an OFFER.
    Offer(Word),
    /// Change the word by compare-and-swap, and say with [`Event::Swapped`] whether that worked.
    Swap {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Use the TAP again.
    Resume,
    /// Close the TAP: it is the target's.
    Release,
    /// Send this.
    Send(Message),
    /// Close the connection.
    Close,
}

/// Why it is over, with the device the source's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The target would take it; nothing else was asked.
    #[error("the target would take the device")]
    Possible,
    /// The target refuses.
    #[error("the target refuses: {0}")]
    Refused(Reasons),
    /// The target went away.
    #[error("the target closed the connection")]
    Closed,
    /// The target does not answer.
    #[error("the target does not answer")]
    Silent,
    /// The target said that it took the device, and did not.
    #[error("the target said that it had taken the device, but had not")]
    Untrue,
    /// The word has a value that it cannot have.
    #[error("the ownership word was not what it must be")]
    Meaningless,
    /// The front-end left before it was told that the device's state is saved.
    #[error("the front-end left before it asked whether the device's state was saved")]
    Unasked,
    /// The operator's wish.
    #[error("cancelled")]
    Cancelled,
}

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// HELLO was sent.
    Greeting {
        /// Nothing is to be offered.
        dry_run: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// PREPARE was sent.
    Checking {
        /// Nothing is to be offered.
        dry_run: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// The device will be offered.
    Armed {
        /// The ownership word, the source's.
        word: Word,
    },
    /// It is offered.
    Offered {
        /// The ownership word, offered.
        word: Word,
        /// The target has confirmed that it holds the device.
        adopted: bool,
        /// The front-end has gone since.
        left: bool,
        /// Why the word is being swapped, while it is.
        swapping: Option<Swapping>,
    },
    /// It is the target's.
    HandedOver,
    /// It is the source's for good.
    Ended(Ended),
}

/// Why a source swaps the word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapping {
    /// To go on serving, and offer it again.
    TakeBack,
    /// To go on serving.
    Abort(Ended),
}

/// An event that cannot be, with the state as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the target sent {message} at the wrong time")]
pub struct Failure {
    /// The state, unchanged.
    pub state: Source,
    /// What came.
    pub message: &'static str,
}

/// The next state and what is to be done.
pub type Step = Result<(Source, Vec<Action>), Failure>;

impl Source {
    /// Begins on a fresh connection.
    pub fn begin(program: &str, dry_run: bool, now: Duration) -> (Self, Vec<Action>) {
        let hello =
            Hello { purpose: DEVICE.to_owned(), program: program.to_owned(), dry_run, wants_vhost: false };
        let state = Self::Greeting { dry_run, deadline: now + PATIENCE };
        (state, vec![Action::Send(Message::Hello(hello))])
    }

    /// Offers at once, to whoever the front-end's socket leads to. All rings are stopped.
    pub fn offering() -> (Self, Vec<Action>) {
        Self::offer(Word::INITIAL)
    }

    /// Whether the process may end once no front-end is connected: another one has, or holds, the device.
    pub fn is_done(&self) -> bool {
        match self {
            Self::HandedOver => true,
            Self::Offered { adopted, left, .. } => *adopted && *left,
            _ => false,
        }
    }

    /// When [`Event::Time`] will matter.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. } | Self::Checking { deadline, .. } => Some(*deadline),
            _ => None,
        }
    }

    /// What follows from `event`.
    ///
    /// # Errors
    /// [`Failure`]: a message that does not belong here. The connection is to be closed.
    pub fn step(self, event: Event, now: Duration) -> Step {
        match self {
            Self::Greeting { dry_run, deadline } => Self::greeting(dry_run, deadline, event, now),
            Self::Checking { dry_run, deadline } => Self::checking(dry_run, deadline, event),
            Self::Armed { word } => Self::armed(word, event),
            Self::Offered { .. } => self.offered(event),
            // A late word changes nothing.
            Self::HandedOver | Self::Ended(_) => Ok((self, Vec::new())),
        }
    }

    fn greeting(dry_run: bool, deadline: Duration, event: Event, now: Duration) -> Step {
        match event {
            Event::Message(Message::Hello(_)) => {
                Ok((Self::Checking { dry_run, deadline: now + PATIENCE }, vec![Action::Prepare]))
            }
            event => Self::before(Self::Greeting { dry_run, deadline }, deadline, event),
        }
    }

    fn checking(dry_run: bool, deadline: Duration, event: Event) -> Step {
        match event {
            Event::Message(Message::Ready(_)) if dry_run => Self::end(Ended::Possible),
            Event::Message(Message::Ready(_)) => Ok((Self::Armed { word: Word::INITIAL }, Vec::new())),
            event => Self::before(Self::Checking { dry_run, deadline }, deadline, event),
        }
    }

    /// What is the same while the target has not agreed yet.
    fn before(state: Self, deadline: Duration, event: Event) -> Step {
        match event {
            Event::Message(Message::Refuse(refuse)) => Self::end(Ended::Refused(refuse.reasons.bounded())),
            Event::Message(message) => Err(Failure { state, message: message.name() }),
            Event::Closed => Self::end(Ended::Closed),
            Event::Time(now) if now >= deadline => Self::end(Ended::Silent),
            Event::Cancel => Self::end(Ended::Cancelled),
            _ => Ok((state, Vec::new())),
        }
    }

    fn armed(word: Word, event: Event) -> Step {
        match event {
            Event::Suspended => Ok(Self::offer(word)),
            Event::Message(Message::Refuse(refuse)) => Self::end(Ended::Refused(refuse.reasons.bounded())),
            // Of an offer that was withdrawn meanwhile.
            Event::Message(Message::Adopted(_)) => Ok((Self::Armed { word }, Vec::new())),
            Event::Message(message) => Err(Failure { state: Self::Armed { word }, message: message.name() }),
            Event::Closed => Self::end(Ended::Closed),
            Event::Cancel => Self::end(Ended::Cancelled),
            _ => Ok((Self::Armed { word }, Vec::new())),
        }
    }

    fn offer(word: Word) -> (Self, Vec<Action>) {
        match word.offered() {
            Some(word) => (
                Self::Offered { word, adopted: false, left: false, swapping: None },
                vec![Action::Offer(word)],
            ),
            // After 2^56 offers.
            None => (Self::Armed { word }, Vec::new()),
        }
    }

    fn offered(self, event: Event) -> Step {
        let Self::Offered { word, mut adopted, mut left, swapping } = self else {
            return Ok((self, Vec::new()));
        };
        let swapping = match (event, swapping) {
            (Event::Swapped(result), Some(swapping)) => return Ok(Self::swapped(result, word, swapping)),
            (_, Some(swapping)) => Some(swapping),
            (Event::RingStarting, None) => Some(Swapping::TakeBack),
            (Event::Closed, None) => Some(Swapping::Abort(Ended::Closed)),
            (Event::Cancel, None) => Some(Swapping::Abort(Ended::Cancelled)),
            (Event::Message(Message::Refuse(refuse)), None) => {
                Some(Swapping::Abort(Ended::Refused(refuse.reasons.bounded())))
            }
            (Event::Message(Message::Taken(taken)), None) if taken.epoch == word.epoch => {
                Some(Swapping::Abort(Ended::Untrue))
            }
            (Event::Message(Message::Adopted(of)), None) => {
                adopted |= of.epoch == word.epoch;
                None
            }
            (Event::Message(message), None) => {
                let state = Self::Offered { word, adopted, left, swapping: None };
                return Err(Failure { state, message: message.name() });
            }
            (Event::FrontendLeft { moved: false }, None) => Some(Swapping::Abort(Ended::Unasked)),
            (Event::FrontendLeft { moved: true }, None) => {
                left = true;
                None
            }
            (Event::FrontendCame, None) => {
                left = false;
                None
            }
            (Event::Time(_) | Event::Suspended | Event::Swapped(_), None) => None,
        };
        let to = swapping.as_ref().and_then(|swapping| match swapping {
            Swapping::TakeBack => word.taken_back(),
            Swapping::Abort(_) => word.aborted(),
        });
        let actions = to.map(|to| Action::Swap { from: word, to }).into_iter().collect();
        Ok((Self::Offered { word, adopted, left, swapping }, actions))
    }

    fn swapped(result: Swapped, word: Word, swapping: Swapping) -> (Self, Vec<Action>) {
        match (result, swapping) {
            (Err(Some(now)), _) if now.owner.is_target() => (Self::HandedOver, vec![Action::Release]),
            // The target cannot have taken it.
            (Err(_), _) => (Self::Ended(Ended::Meaningless), vec![Action::Resume, Action::Close]),
            (Ok(()), Swapping::TakeBack) => {
                let retract = Message::Retract(OfOffer { epoch: word.epoch });
                let word = Word { owner: Owner::Source, ..word };
                (Self::Armed { word }, vec![Action::Resume, Action::Send(retract)])
            }
            (Ok(()), Swapping::Abort(ended)) => (Self::Ended(ended), vec![Action::Resume, Action::Close]),
        }
    }

    fn end(ended: Ended) -> Step {
        Ok((Self::Ended(ended), vec![Action::Close]))
    }
}
