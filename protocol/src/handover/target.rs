//! The end that waits for a device.
//!
//! ```text
//!   Fresh ─HELLO─▶ Greeted ─PREPARE─▶ Ready ─OFFER─▶ Adopted ─own ring: swap won─▶ Taken
//!     └──────┬────────┘ refused, end    ▲ │            │ │
//!            ▼                          │ │            │ └─swap lost, RETRACT─▶ Ready
//!          Ended ◀──────────────────────┴─┴─end, bad───┘ (with the offer standing: Adopted, without a link)
//! ```
//! Generic over the adopted device `D`, which is given back in every way out: in [`Action::Release`], in
//! [`Action::Activate`] or in the [`Failure`].

use std::time::Duration;

use super::message::{DEVICE, Hello, Message, OfOffer, Offer, ReadyToTake, Refuse};
use super::refusal::Refusal;
use super::source::PATIENCE;
use super::state::DeviceState;
use crate::ownership::Word;
use crate::reasons::Reasons;

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<D> {
    /// The source said something.
    Message(Message),
    /// The connection ended, or brought what is no message.
    Closed {
        /// The ownership word now, where it is known and makes sense.
        word: Option<Word>,
    },
    /// Time has passed.
    Time(Duration),
    /// The answer to [`Action::Judge`].
    Judged(Result<(), Reasons>),
    /// The answer to [`Action::Adopt`].
    Adoption(Result<(Word, D), Reasons>),
    /// The answer to [`Action::Adopt`] where the source took the offer back before it was read: nothing is kept.
    Withdrawn,
    /// The front-end that brought the offer has gone, and with it what it was for.
    FrontendLeft,
    /// One of the target's rings has started, and the device is not there.
    RingStarting,
    /// How [`Action::Swap`] ended.
    Swapped {
        /// Whether the word was changed.
        won: bool,
    },
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<D> {
    /// Say with [`Event::Judged`] whether this device could be taken.
    Judge(DeviceState),
    /// Check and keep what is offered, without touching it; then [`Event::Adoption`] or [`Event::Withdrawn`].
    Adopt(Offer),
    /// Change the word by compare-and-swap, and say with [`Event::Swapped`] whether that worked.
    Swap {
        /// What it must be.
        from: Word,
        /// What it is to be.
        to: Word,
    },
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
    /// Somebody has connected.
    Fresh {
        /// When to give up.
        deadline: Duration,
    },
    /// HELLO was answered.
    Greeted {
        /// When to give up.
        deadline: Duration,
    },
    /// The source may offer the device.
    Ready,
    /// An offer is being looked at.
    Adopting,
    /// The device is here, untouched.
    Adopted {
        /// The ownership word, offered.
        word: Word,
        /// The device.
        device: D,
        /// Whether the source is still there to talk to.
        linked: bool,
    },
    /// The device is ours.
    Taken,
    /// Nothing will come of this connection.
    Ended,
}

/// An event that cannot be, with the state as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the source sent {message} at the wrong time")]
pub struct Failure<D> {
    /// The state, unchanged.
    pub state: Target<D>,
    /// What came.
    pub message: &'static str,
}

/// The next state and what is to be done.
pub type Step<D> = Result<(Target<D>, Vec<Action<D>>), Failure<D>>;

impl<D> Target<D> {
    /// On a fresh connection.
    pub fn begin(now: Duration) -> Self {
        Self::Fresh { deadline: now + PATIENCE }
    }

    /// When [`Event::Time`] will matter.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Fresh { deadline } | Self::Greeted { deadline } => Some(*deadline),
            _ => None,
        }
    }

    /// What follows from `event`.
    ///
    /// # Errors
    /// [`Failure`]: a message that does not belong here. The connection is to be closed.
    pub fn step(self, event: Event<D>, program: &str, now: Duration) -> Step<D> {
        match (self, event) {
            (Self::Fresh { .. }, Event::Message(Message::Hello(hello))) => {
                Ok(Self::greet(&hello, program, now))
            }
            (Self::Greeted { .. }, Event::Message(Message::Prepare(prepare))) => {
                let state = Self::Greeted { deadline: now + PATIENCE };
                Ok((state, vec![Action::Judge(prepare.device)]))
            }
            (Self::Greeted { .. }, Event::Judged(Ok(()))) => {
                Ok((Self::Ready, vec![Action::Send(Message::Ready(ReadyToTake {}))]))
            }
            (Self::Greeted { .. }, Event::Judged(Err(reasons)))
            | (Self::Adopting, Event::Adoption(Err(reasons))) => Ok(Self::refuse(reasons)),
            (Self::Fresh { deadline } | Self::Greeted { deadline }, Event::Time(now)) if now >= deadline => {
                Ok((Self::Ended, vec![Action::Close]))
            }
            (Self::Ready, Event::Message(Message::Offer(offer))) => {
                Ok((Self::Adopting, vec![Action::Adopt(offer)]))
            }
            // The source took back what never arrived here, or was let go already.
            (Self::Ready, Event::Message(Message::Retract(_))) => Ok((Self::Ready, Vec::new())),
            (Self::Adopting, Event::Adoption(Ok((word, device)))) => {
                let adopted = Message::Adopted(OfOffer { epoch: word.epoch });
                Ok((Self::Adopted { word, device, linked: true }, vec![Action::Send(adopted)]))
            }
            // The offer is older than the word. That is no refusal: the source stays armed and offers again.
            (Self::Adopting, Event::Withdrawn) => Ok((Self::Ready, Vec::new())),
            (Self::Adopted { word, device, linked }, event) => Self::adopted(word, device, linked, event),
            (Self::Taken, _) => Ok((Self::Taken, Vec::new())),
            (Self::Ended, _) | (_, Event::Closed { .. }) => Ok((Self::Ended, vec![Action::Close])),
            (state, Event::Message(message)) => Err(Failure { state, message: message.name() }),
            (state, _) => Ok((state, Vec::new())),
        }
    }

    fn greet(hello: &Hello, program: &str, now: Duration) -> (Self, Vec<Action<D>>) {
        if hello.purpose != DEVICE {
            let purpose = hello.purpose.chars().filter(|c| !c.is_control()).take(64).collect();
            return Self::refuse(Refusal::Purpose(purpose).into());
        }
        let answer = Hello {
            purpose: DEVICE.to_owned(),
            program: program.to_owned(),
            dry_run: hello.dry_run,
            wants_vhost: false,
        };
        (Self::Greeted { deadline: now + PATIENCE }, vec![Action::Send(Message::Hello(answer))])
    }

    fn refuse(reasons: Reasons) -> (Self, Vec<Action<D>>) {
        (Self::Ended, vec![Action::Send(Message::Refuse(Refuse { reasons })), Action::Close])
    }

    fn adopted(word: Word, device: D, linked: bool, event: Event<D>) -> Step<D> {
        let without_source = |linked| if linked { Self::Ready } else { Self::Ended };
        match event {
            Event::RingStarting => {
                let swap = word.taken().map(|to| Action::Swap { from: word, to });
                Ok((Self::Adopted { word, device, linked }, swap.into_iter().collect()))
            }
            Event::Swapped { won: true } => {
                let taken = Message::Taken(OfOffer { epoch: word.epoch });
                let tell = linked.then_some(Action::Send(taken));
                let actions = std::iter::once(Action::Activate(device)).chain(tell).collect();
                Ok((Self::Taken, actions))
            }
            Event::Swapped { won: false } => Ok((without_source(linked), vec![Action::Release(device)])),
            Event::Message(Message::Retract(of)) if of.epoch == word.epoch => {
                Ok((Self::Ready, vec![Action::Release(device)]))
            }
            // Of an earlier offer.
            Event::Message(Message::Retract(_)) => Ok((Self::Adopted { word, device, linked }, Vec::new())),
            // The source took the last one back, whether or not it could say so.
            Event::Message(Message::Offer(offer)) if offer.epoch > word.epoch => {
                Ok((Self::Adopting, vec![Action::Release(device), Action::Adopt(offer)]))
            }
            Event::Message(message) => {
                let state = Self::Adopted { word, device, linked };
                Err(Failure { state, message: message.name() })
            }
            // The source is gone, and what it offered stands.
            Event::Closed { word: now } if now == Some(word) => {
                Ok((Self::Adopted { word, device, linked: false }, vec![Action::Close]))
            }
            Event::Closed { .. } | Event::FrontendLeft => {
                Ok((Self::Ended, vec![Action::Release(device), Action::Close]))
            }
            _ => Ok((Self::Adopted { word, device, linked }, Vec::new())),
        }
    }
}
