//! The end that waits for a device, once the [prologue](crate::handover::prologue) has agreed.
//!
//! ```text
//!   Ready ─OFFER─▶ Adopting ─claimed─▶ Adopted ─own ring: swap won─▶ Taken
//!     ▲ │             │                 │ │ │
//!     │ └──────┬──────┴──refused────────┼─┼─┘ end, bad message: Adopted without a link while the offer stands,
//!     │        ▼                        │ │   else Ended
//!     │      Ended ◀────────────────────┘ │
//!     └────swap lost, RETRACT─────────────┘
//! ```
//! Generic over the adopted device `D`, which comes back in every way out: in [`Action::Release`] or in
//! [`Action::Activate`].

use crate::handover::wire::message::{Message, OfOffer, Offer, Refuse};
use crate::ownership::{SwapOutcome, Word};
use crate::reasons::Reasons;

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<D> {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// The answer to [`Action::Adopt`].
    Adoption(Result<(Word, D), Reasons>),
    /// The answer to [`Action::Adopt`] if the source took the offer back before the target read it: nothing is kept.
    Withdrawn,
    /// The front-end that brought the offer left.
    FrontendLeft,
    /// One of the target's rings has started, and needs the device.
    RingStarting,
    /// How [`Action::Swap`] ended.
    Swapped(SwapOutcome),
    /// The answer to [`Action::Look`].
    Seen(Option<Word>),
}

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<D> {
    /// Check and keep what is offered, without touching it; then report [`Event::Adoption`] or [`Event::Withdrawn`].
    Adopt(Offer),
    /// Change the word by compare-and-swap, and report with [`Event::Swapped`].
    Swap {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
    /// Look at the word, and report with [`Event::Seen`].
    Look,
    /// Use the device: it is the target's.
    Activate(D),
    /// Close the device's descriptors: it is the source's.
    Release(D),
    /// Send this.
    Send(Message),
    /// Close the connection.
    Close,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target<D> {
    /// The source may offer the device.
    Ready,
    /// An offer is being checked.
    Adopting,
    /// The device is here, untouched.
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
    /// Nothing more comes of this connection.
    Ended,
}

/// The next state, and what to do.
pub type Step<D> = (Target<D>, Vec<Action<D>>);

impl<D> Target<D> {
    /// The next state, and what to do.
    #[must_use]
    pub fn step(self, event: Event<D>) -> Step<D> {
        match (self, event) {
            (Self::Ready, Event::Message(Message::Offer(offer))) => {
                (Self::Adopting, vec![Action::Adopt(offer)])
            }
            // The source took back an offer that never arrived here, or that the target let go already.
            (Self::Ready, Event::Message(Message::Retract(_))) => (Self::Ready, Vec::new()),
            (Self::Adopting, Event::Adoption(Ok((word, device)))) => {
                let adopted = Message::Adopted(OfOffer { epoch: word.epoch });
                (Self::Adopted { word, device, linked: true }, vec![Action::Send(adopted)])
            }
            (Self::Adopting, Event::Adoption(Err(reasons))) => {
                (Self::Ended, vec![Action::Send(Message::Refuse(Refuse { reasons })), Action::Close])
            }
            // The offer is older than the word. That is no refusal: the source stays armed and offers again.
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
            // Of an earlier offer.
            Event::Message(Message::Retract(_)) => (adopted(device, linked), Vec::new()),
            // The source took the last one back, whether or not its RETRACT arrived.
            Event::Message(Message::Offer(offer)) if offer.epoch > word.epoch => {
                (Self::Adopting, vec![Action::Release(device), Action::Adopt(offer)])
            }
            // The source is gone; its offer may stand.
            Event::Message(_) | Event::Closed => (adopted(device, false), vec![Action::Close, Action::Look]),
            Event::Seen(Some(now)) if now == word => (adopted(device, linked), Vec::new()),
            Event::Seen(_) | Event::FrontendLeft => {
                (Self::Ended, vec![Action::Release(device), Action::Close])
            }
            Event::Adoption(_) | Event::Withdrawn => (adopted(device, linked), Vec::new()),
        }
    }
}
