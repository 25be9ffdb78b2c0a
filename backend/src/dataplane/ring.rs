//! A vring within a queue pair: the mapped rings, its state, and its kick.
//!
//! Started and enabled are independent (vhost-user: "Ring states"). A ring starts when the front-end kicks it; where
//! it has been in use before, it starts at once, for its driver may have been told not to kick.

use std::error::Error;
use std::sync::atomic::Ordering;

use baton_control::limited;
use baton_faults::Batch;

use crate::metrics::Direction;
use crate::notify::Notifier;
use crate::vring::Vring;

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
    /// Kicks do not start it: it was in use before this session, which has not enabled it yet.
    pub held: bool,
    /// Whether it was kicked.
    pub started: bool,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// What the guest wrote made no sense; it is not touched any more.
    pub broken: bool,
}

impl Ring {
    /// Whether it may be worked on at all.
    #[inline]
    pub fn runs(&self) -> bool {
        self.started && !self.broken
    }

    /// Lets the guest see all that was completed, which ends a batch of this kind. Gives whether it was called.
    #[inline]
    pub fn publish(&mut self, batch: Batch) -> bool {
        if self.vring.is_ahead() {
            baton_faults::batch(batch);
        }
        self.vring.publish()
    }

    /// A kick came, or may have come.
    pub fn kicked(&mut self, counters: &Direction) {
        counters.kicks.add(1);
        if !self.started && !self.held {
            self.started = true;
            counters.started.store(true, Ordering::Relaxed);
        }
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
