//! Decides which of the TAP's queues are attached. The kernel spreads flows over all attached queues, and a queue drops
//! its frames when it is detached.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Device, DeviceError};
use crate::features::PROTOCOL_FEATURES;

/// How long an enabled pair may take to be set up after the first pair. QEMU enables all pairs first and then sets up
/// one after the other. Frames that wait in the queues meanwhile are neither lost nor reordered.
const GRACE: Duration = Duration::from_secs(1);

impl Device {
    /// Attaches the queues of the pairs whose receive ring is set up and enabled, and detaches those of the others.
    ///
    /// Does nothing unless the first receive ring is set up and enabled. So all queues keep their frames before the
    /// front-end has set up the device, and while it pauses, with all rings stopped or disabled. After a pause a queue
    /// keeps its frames until the front-end has started and enabled its ring again, or disabled it. The queue of a pair
    /// that is enabled but not set up waits for [`Self::settle_queues`].
    ///
    /// # Errors
    /// Returns [`DeviceError::Tap`] if a queue cannot be attached or detached.
    pub fn follow_pairs(&mut self) -> Result<(), DeviceError> {
        let Some(tap) = &mut self.tap else { return Ok(()) };
        let first = &self.session.vrings[0];
        if !first.enabled || !first.is_set_up() {
            return Ok(());
        }
        // Without protocol features SET_FEATURES enables all rings, and the front-end has only one pair.
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

    /// Returns when [`Self::settle_queues`] is due.
    pub fn queues_settle(&self) -> Option<Instant> {
        self.queues_settle
    }

    /// If it is due, detaches the queues of pairs that are enabled but not set up. The first pair receives their
    /// frames.
    ///
    /// # Errors
    /// Returns [`DeviceError::Tap`] if a queue cannot be detached. Otherwise as for [`Self::change`].
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
