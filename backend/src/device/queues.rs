//! Which of the TAP's queues are attached: the kernel spreads flows over all that are, and a detached one drops what it
//! has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Device, DeviceError};
use crate::features::PROTOCOL_FEATURES;

/// How long a pair that is enabled may take until it is set up, once the first one is. QEMU enables all pairs at first,
/// and then sets up one after the other; frames that wait there meanwhile are neither lost nor overtaken.
const GRACE: Duration = Duration::from_secs(1);

impl Device {
    /// Attaches the queues of the pairs whose receive ring is set up and enabled, and detaches those of the others.
    ///
    /// Only once the first receive ring is set up and enabled: before that, and while a front-end that pauses has
    /// stopped or disabled all rings, every queue keeps the frames that it has; and when it goes on, until it has started
    /// and enabled again what it had paused. The queue of a pair that is enabled and not set up waits for
    /// [`Self::settle_queues`].
    ///
    /// # Errors
    /// [`DeviceError::Tap`].
    pub fn follow_pairs(&mut self) -> Result<(), DeviceError> {
        let Some(tap) = &mut self.tap else { return Ok(()) };
        let first = &self.session.vrings[0];
        if !first.enabled || !first.is_set_up() {
            return Ok(());
        }
        // Otherwise SET_FEATURES has enabled all, and there is but one pair: more are negotiated by protocol features.
        let told = self.session.features.has(PROTOCOL_FEATURES);
        let mut late = false;
        for pair in 1..self.workers.len() {
            let receive = &mut self.session.vrings[2 * pair];
            let wanted = receive.enabled && receive.is_set_up();
            receive.paused &= !wanted;
            let waits = receive.paused || receive.enabled && told;
            if wanted || !waits {
                tap.set_attached(pair, wanted)?;
            }
            late |= !wanted && !receive.paused && tap.is_attached(pair);
        }
        self.queues_settle = late.then(|| self.queues_settle.unwrap_or_else(|| Instant::now() + GRACE));
        Ok(())
    }

    /// When [`Self::settle_queues`] is due.
    pub fn queues_settle(&self) -> Option<Instant> {
        self.queues_settle
    }

    /// Detaches, when that is due, the queues of pairs that were enabled and not set up. The first pair receives what they
    /// have.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn settle_queues(&mut self) -> Result<(), DeviceError> {
        if self.queues_settle.is_none_or(|due| Instant::now() < due) {
            return Ok(());
        }
        self.follow_pairs()?;
        self.queues_settle = None;
        let first = &self.session.vrings[0];
        if self.tap.is_none() || !first.enabled || !first.is_set_up() {
            return Ok(());
        }
        self.park_all()?;
        for pair in 1..self.workers.len() {
            let receive = &self.session.vrings[2 * pair];
            let Some(tap) = &mut self.tap else { return Ok(()) };
            if receive.paused || receive.enabled && receive.is_set_up() || !tap.is_attached(pair) {
                continue;
            }
            let queue = Arc::clone(tap.queue(pair));
            let first = self.workers[0].park().ok_or(DeviceError::Dead(0))?;
            first.receive_last(&queue, || tap.set_attached(pair, false))?;
        }
        if self.held { Ok(()) } else { self.resume_all() }
    }
}
