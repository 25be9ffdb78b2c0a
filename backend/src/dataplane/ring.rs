//! A vring within a queue pair: the mapped rings, its state, and its kick.
//!
//! A ring is started while it is here (`SET_VRING_KICK`); started and enabled are independent (vhost-user: "Ring states").

use std::error::Error;

use baton_control::limited;
use baton_faults::Batch;

use crate::notify::Notifier;
use crate::vring::Vring;

/// Which vring of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// TAP to guest, virtqueue 2n.
    Rx,
    /// Guest to TAP, virtqueue 2n + 1.
    Tx,
}

/// Where a vring's notifications come from (`SET_VRING_KICK`).
#[derive(Clone, Debug)]
pub enum Kick {
    /// An eventfd.
    Eventfd(Notifier),
    /// Nowhere: the ring is polled.
    Polled,
}

/// A vring that is set up.
#[derive(Debug)]
pub struct Ring {
    /// The mapped rings.
    pub vring: Vring,
    /// Its kick.
    pub kick: Kick,
    /// Signalled when the ring is out of order (`SET_VRING_ERR`).
    pub error: Option<Notifier>,
    /// The call descriptor is to be signalled in any case.
    pub call_due: bool,
    /// The front-end has not enabled it on this connection yet: what waits in a transmit ring is not discarded.
    pub held: bool,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// What the guest wrote made no sense; it is not touched any more.
    pub broken: bool,
}

impl Ring {
    /// Whether it may be worked on at all.
    #[inline]
    pub fn runs(&self) -> bool {
        !self.held && !self.broken
    }

    /// Lets the guest see all that was completed, which ends a batch of this kind. Gives whether it was called.
    #[inline]
    pub fn publish(&mut self, batch: Batch) -> bool {
        if self.vring.is_ahead() {
            baton_faults::batch(batch);
        }
        self.vring.publish()
    }

    /// Gives up the ring and tells the front-end.
    pub fn fail(&mut self, name: &'static str, pair: u16, error: &dyn Error) {
        self.broken = true;
        limited!(warn, pair, vring = name, %error, "vring out of order until it is set up anew");
        if let Some(notifier) = &self.error {
            notifier.notify();
        }
    }
}
