//! A vring in a queue pair: the mapped rings, the state of the vring, and its kick.
//!
//! A vring in a pair is started (`SET_VRING_KICK`). Started and enabled are independent (vhost-user: "Ring states").

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

/// How the driver notifies the device of new buffers (`SET_VRING_KICK`).
#[derive(Clone, Debug)]
pub enum Kick {
    /// By an eventfd.
    Eventfd(Notifier),
    /// Not at all: the worker polls the ring.
    Polled,
}

/// A vring that is set up.
#[derive(Debug)]
pub struct Ring {
    /// The mapped rings.
    pub vring: Vring,
    /// The vring's kick.
    pub kick: Kick,
    /// Signalled when the ring fails (`SET_VRING_ERR`).
    pub error: Option<Notifier>,
    /// Whether a call is due: the worker must call the driver once, even if nothing was completed.
    pub call_due: bool,
    /// The front-end has not enabled the ring on this connection yet. The worker leaves it alone: it does not even
    /// discard the chains that are available in a transmit ring.
    pub held: bool,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// The driver wrote invalid values to the ring. The worker does not touch it any more.
    pub broken: bool,
}

impl Ring {
    /// Returns whether the worker may touch the ring.
    #[inline]
    pub fn runs(&self) -> bool {
        !self.held && !self.broken
    }

    /// Publishes all completed chains, which ends a batch. Returns whether the driver was called.
    #[inline]
    pub fn publish(&mut self, batch: Batch) -> bool {
        if self.vring.is_ahead() {
            baton_faults::batch(batch);
        }
        self.vring.publish()
    }

    /// Marks the ring as broken and signals the front-end.
    pub fn fail(&mut self, name: &'static str, pair: u16, error: &dyn Error) {
        self.broken = true;
        limited!(warn, pair, vring = name, %error, "vring failed: idle until the front-end sets it up again");
        if let Some(notifier) = &self.error {
            notifier.notify();
        }
    }
}
