//! The source of a device's hand-over, after the [prologue](crate::handover::prologue).
//!
//! ```text
//!   Armed ─all rings stopped─▶ Offered ─swap lost─▶ HandedOver
//!    │ ▲                        │ │
//!    │ └──own ring: swap won────┘ │
//!    └─REFUSE, end, cancel─▶ Ended ◀─REFUSE, end, cancel: swap won
//! ```
//! The source leaves `Offered` only by a swap of the ownership word; no earlier message decides anything. If the swap
//! fails, the target owns the device only if the word says so: an invalid word leaves the device to the source.

use crate::end_reason::EndReason;
use crate::handover::prologue::unexpected;
use crate::handover::wire::message::{Message, OfOffer};
use crate::ownership::{Owner, SwapOutcome, Word};

/// An event for a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// All rings are stopped.
    Suspended,
    /// One of the source's rings is about to start.
    RingStarting,
    /// The outcome of [`Action::Swap`].
    Swapped(SwapOutcome),
    /// The source's front-end disconnected.
    FrontendLeft {
        /// The VM may have moved. A front-end that moves the device state itself has been told that it is saved.
        moved: bool,
    },
    /// A front-end connected.
    FrontendCame,
    /// The operator cancelled.
    Cancel,
}

/// An action of a source. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put the TAP aside, set the word to this value, and send both in an OFFER.
    Offer(Word),
    /// Change the word by compare-and-swap, then report [`Event::Swapped`].
    Swap {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Use the TAP again.
    Resume,
    /// Close the TAP: the target owns it.
    Release,
    /// Send this message.
    Send(Message),
    /// Close the connection.
    Close,
}

/// The state of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The source will offer the device when all rings are stopped.
    Armed {
        /// The ownership word, owned by the source.
        word: Word,
    },
    /// The device is offered.
    Offered {
        /// The ownership word, offered.
        word: Word,
        /// The target has confirmed that it holds the device.
        adopted: bool,
        /// The front-end has disconnected since.
        left: bool,
        /// Why a swap is under way, if one is.
        swapping: Option<Swapping>,
    },
    /// The target owns the device.
    HandedOver,
    /// The source is the final owner.
    Ended(EndReason),
}

/// Why a source swaps the word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapping {
    /// To serve again, and to offer the device again later.
    TakeBack,
    /// To serve again, and to end the hand-over.
    Abort(EndReason),
}

impl Source {
    /// Starts after the prologue: the source will offer the device when all rings are stopped.
    pub fn armed() -> Self {
        Self::Armed { word: Word::INITIAL }
    }

    /// Offers the device immediately, over the front-end's device-state socket. All rings are stopped.
    pub fn offering() -> (Self, Vec<Action>) {
        Self::offer(Word::INITIAL)
    }

    /// Returns whether the process may end once no front-end is connected, because the target owns or holds the device.
    pub fn is_done(&self) -> bool {
        match self {
            Self::HandedOver => true,
            Self::Offered { adopted, left, .. } => *adopted && *left,
            _ => false,
        }
    }

    /// Returns the next state and the actions to carry out.
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
            // This is about an offer that was withdrawn meanwhile.
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
            // The target cannot have taken the device.
            (SwapOutcome::Lost(_) | SwapOutcome::Meaningless, _) => {
                (Self::Ended(EndReason::Meaningless), vec![Action::Resume, Action::Close])
            }
        }
    }

    fn end(reason: EndReason) -> (Self, Vec<Action>) {
        (Self::Ended(reason), vec![Action::Close])
    }
}
