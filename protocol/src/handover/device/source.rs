//! The end that has the device and offers it, once the [prologue](crate::handover::prologue) has agreed.
//!
//! ```text
//!   Armed ─all rings stopped─▶ Offered ─swap lost─▶ HandedOver
//!    │ ▲                        │ │
//!    │ └──own ring: swap won────┘ │
//!    └─REFUSE, end, cancel─▶ Ended ◀─REFUSE, end, cancel: swap won
//! ```
//! Every way out of `Offered` is a swap of the ownership word; no message before it decides anything. If the swap
//! fails, the device is the target's only if the word says so: a word without a meaning leaves it to the source.

use crate::end_reason::EndReason;
use crate::handover::prologue::unexpected;
use crate::handover::wire::message::{Message, OfOffer};
use crate::ownership::{Owner, SwapOutcome, Word};

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// All rings are stopped.
    Suspended,
    /// One of the source's rings is about to start.
    RingStarting,
    /// How [`Action::Swap`] ended.
    Swapped(SwapOutcome),
    /// The source's front-end left.
    FrontendLeft {
        /// Its VM may have moved. A front-end that moves the device's state itself has been told that it is saved.
        moved: bool,
    },
    /// A front-end connected.
    FrontendCame,
    /// The operator cancelled.
    Cancel,
}

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put the TAP aside, make the word this, and send both in an OFFER.
    Offer(Word),
    /// Change the word by compare-and-swap, and report with [`Event::Swapped`].
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

/// A source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
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
    Ended(EndReason),
}

/// Why a source swaps the word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapping {
    /// To go on serving, and offer it again.
    TakeBack,
    /// To go on serving.
    Abort(EndReason),
}

impl Source {
    /// The prologue agreed: the device is offered when all rings have stopped.
    pub fn armed() -> Self {
        Self::Armed { word: Word::INITIAL }
    }

    /// Offers at once, over the socket that the front-end gave. All rings are stopped.
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

    /// The next state, and what to do.
    #[must_use]
    pub fn step(self, event: Event) -> (Self, Vec<Action>) {
        match self {
            Self::Armed { word } => Self::from_armed(word, event),
            Self::Offered { .. } => self.offered(event),
            // A late message changes nothing.
            Self::HandedOver | Self::Ended(_) => (self, Vec::new()),
        }
    }

    fn from_armed(word: Word, event: Event) -> (Self, Vec<Action>) {
        match event {
            Event::Suspended => Self::offer(word),
            // Of an offer that was withdrawn meanwhile.
            Event::Message(Message::Adopted(_)) => (Self::Armed { word }, Vec::new()),
            Event::Message(message) => Self::end(unexpected(message)),
            Event::Closed => Self::end(EndReason::Closed),
            Event::Cancel => Self::end(EndReason::Cancelled),
            _ => (Self::Armed { word }, Vec::new()),
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

    fn offered(self, event: Event) -> (Self, Vec<Action>) {
        let Self::Offered { word, mut adopted, mut left, swapping } = self else {
            return (self, Vec::new());
        };
        let swapping = match (event, swapping) {
            (Event::Swapped(outcome), Some(swapping)) => return Self::swapped(outcome, word, swapping),
            (_, Some(swapping)) => Some(swapping),
            (Event::RingStarting, None) => Some(Swapping::TakeBack),
            (Event::Closed, None) => Some(Swapping::Abort(EndReason::Closed)),
            (Event::Cancel, None) => Some(Swapping::Abort(EndReason::Cancelled)),
            (Event::Message(Message::Taken(taken)), None) if taken.epoch == word.epoch => {
                Some(Swapping::Abort(EndReason::Untrue))
            }
            (Event::Message(Message::Adopted(of)), None) => {
                adopted |= of.epoch == word.epoch;
                None
            }
            (Event::Message(message), None) => Some(Swapping::Abort(unexpected(message))),
            (Event::FrontendLeft { moved: false }, None) => Some(Swapping::Abort(EndReason::Unasked)),
            (Event::FrontendLeft { moved: true }, None) => {
                left = true;
                None
            }
            (Event::FrontendCame, None) => {
                left = false;
                None
            }
            (Event::Suspended | Event::Swapped(_), None) => None,
        };
        let to = swapping.as_ref().and_then(|swapping| match swapping {
            Swapping::TakeBack => word.taken_back(),
            Swapping::Abort(_) => word.aborted(),
        });
        let actions = to.map(|to| Action::Swap { from: word, to }).into_iter().collect();
        (Self::Offered { word, adopted, left, swapping }, actions)
    }

    fn swapped(outcome: SwapOutcome, word: Word, swapping: Swapping) -> (Self, Vec<Action>) {
        match (outcome, swapping) {
            (SwapOutcome::Won, Swapping::TakeBack) => {
                let retract = Message::Retract(OfOffer { epoch: word.epoch });
                let word = Word { owner: Owner::Source, ..word };
                (Self::Armed { word }, vec![Action::Resume, Action::Send(retract)])
            }
            (SwapOutcome::Won, Swapping::Abort(reason)) => {
                (Self::Ended(reason), vec![Action::Resume, Action::Close])
            }
            (SwapOutcome::Lost(now), _) if now.owner.is_target() => (Self::HandedOver, vec![Action::Release]),
            // The target cannot have taken it.
            (SwapOutcome::Lost(_) | SwapOutcome::Meaningless, _) => {
                (Self::Ended(EndReason::Meaningless), vec![Action::Resume, Action::Close])
            }
        }
    }

    fn end(reason: EndReason) -> (Self, Vec<Action>) {
        (Self::Ended(reason), vec![Action::Close])
    }
}
