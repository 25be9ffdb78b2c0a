//! The target of a device's hand-over, after the [prologue](crate::handover::prologue).
//!
//! ```text
//!   Ready ─OFFER─▶ Adopting ─claimed─▶ Adopted ─own ring: swap won─▶ Taken
//!     ▲ │             │                 │ │ │
//!     │ └──────┬──────┴──refused────────┼─┼─┘ end, bad message: Adopted without a link while the offer is open,
//!     │        ▼                        │ │   else Ended
//!     │      Ended ◀────────────────────┘ │
//!     └────swap lost, RETRACT─────────────┘
//! ```
//! Generic over the adopted device `D`. Every exit returns it, in [`Action::Release`] or [`Action::Activate`].

use crate::handover::wire::message::{Message, OfOffer, Offer, Refuse};
use crate::ownership::{SwapOutcome, Word};
use crate::reasons::Reasons;

/// An event for a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<D> {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// The answer to [`Action::Adopt`].
    Adoption(Result<(Word, D), Reasons>),
    /// The answer to [`Action::Adopt`] if the source withdrew the offer before the target read it: nothing is kept.
    Withdrawn,
    /// The front-end that brought the offer disconnected.
    FrontendLeft,
    /// One of the target's rings starts and needs the device.
    RingStarting,
    /// The outcome of [`Action::Swap`].
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`]; `None` if the word is invalid.
    Seen(Option<Word>),
}

/// An action of a target. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<D> {
    /// Check the offered device and keep it without touching it, then report [`Event::Adoption`] or
    /// [`Event::Withdrawn`].
    Adopt(Offer),
    /// Change the word by compare-and-swap, then report [`Event::Swapped`].
    Swap {
        /// The expected value.
        from: Word,
        /// The new value.
        to: Word,
    },
    /// Read the word, then report [`Event::Seen`].
    Look,
    /// Use the device: the target owns it.
    Activate(D),
    /// Close the device's descriptors: the source owns it.
    Release(D),
    /// Send this message.
    Send(Message),
    /// Close the connection.
    Close,
}

/// The state of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target<D> {
    /// The target waits for an offer.
    Ready,
    /// The target checks an offer.
    Adopting,
    /// The target holds the device and has not touched it.
    Adopted {
        /// The ownership word, offered.
        word: Word,
        /// The device.
        device: D,
        /// Whether the connection to the source is open.
        linked: bool,
    },
    /// The target owns the device.
    Taken,
    /// The hand-over has ended without the device.
    Ended,
}

/// The next state and the actions to carry out.
pub type Step<D> = (Target<D>, Vec<Action<D>>);

impl<D> Target<D> {
    /// Returns the next state and the actions to carry out.
    #[must_use]
    pub fn step(self, event: Event<D>) -> Step<D> {
        match (self, event) {
            (Self::Ready, Event::Message(Message::Offer(offer))) => {
                (Self::Adopting, vec![Action::Adopt(offer)])
            }
            // The source withdrew an offer that never arrived here, or that the target has already dropped.
            (Self::Ready, Event::Message(Message::Retract(_))) => (Self::Ready, Vec::new()),
            (Self::Adopting, Event::Adoption(Ok((word, device)))) => {
                let adopted = Message::Adopted(OfOffer { epoch: word.epoch });
                (Self::Adopted { word, device, linked: true }, vec![Action::Send(adopted)])
            }
            (Self::Adopting, Event::Adoption(Err(reasons))) => {
                (Self::Ended, vec![Action::Send(Message::Refuse(Refuse { reasons })), Action::Close])
            }
            // The offer is older than the word. This is not a refusal: the source stays armed and offers again.
            (Self::Adopting, Event::Withdrawn) => (Self::Ready, Vec::new()),
            (Self::Adopted { word, device, linked }, event) => Self::adopted(word, device, linked, event),
            (Self::Ready | Self::Adopting, Event::Message(_) | Event::Closed) => {
                (Self::Ended, vec![Action::Close])
            }
            (state, _) => (state, Vec::new()),
        }
    }

    fn adopted(word: Word, device: D, linked: bool, event: Event<D>) -> Step<D> {
        let adopted = |device, linked| Self::Adopted { word, device, linked };
        match event {
            Event::RingStarting => {
                let swap = word.taken().map(|to| Action::Swap { from: word, to });
                (adopted(device, linked), swap.into_iter().collect())
            }
            Event::Swapped(SwapOutcome::Won) => {
                let taken = Message::Taken(OfOffer { epoch: word.epoch });
                let tell = linked.then_some(Action::Send(taken));
                (Self::Taken, [Action::Activate(device)].into_iter().chain(tell).collect())
            }
            Event::Swapped(SwapOutcome::Lost(_) | SwapOutcome::Meaningless) => {
                (if linked { Self::Ready } else { Self::Ended }, vec![Action::Release(device)])
            }
            Event::Message(Message::Retract(of)) if of.epoch == word.epoch => {
                (Self::Ready, vec![Action::Release(device)])
            }
            // This is about an earlier offer.
            Event::Message(Message::Retract(_)) => (adopted(device, linked), Vec::new()),
            // The source withdrew the last offer, whether or not its RETRACT arrived.
            Event::Message(Message::Offer(offer)) if offer.epoch > word.epoch => {
                (Self::Adopting, vec![Action::Release(device), Action::Adopt(offer)])
            }
            // The source is gone, but its offer may still be open.
            Event::Message(_) | Event::Closed => (adopted(device, false), vec![Action::Close, Action::Look]),
            Event::Seen(Some(now)) if now == word => (adopted(device, linked), Vec::new()),
            Event::Seen(_) | Event::FrontendLeft => {
                (Self::Ended, vec![Action::Release(device), Action::Close])
            }
            Event::Adoption(_) | Event::Withdrawn => (adopted(device, linked), Vec::new()),
        }
    }
}
