//! The source's side of a session's hand-over: the device freezes with all its rings mapped. Then it thaws (roll back),
//! survives a target that has worked on the rings, or lets the session go.

use std::io;
use std::sync::Arc;

use baton_control::{error_chain, limited};
use baton_protocol::handover::wire::session::{Counters, PairNow, VringNow};

use super::{Device, DeviceError, sides};
use crate::dataplane::ring::Ring;
use crate::dataplane::rx::FrameInHand;
use crate::dataplane::worker::Worker;
use crate::inflight::InflightRegion;
use crate::vring_setup::VringSetup;

/// The part of a session's state that changes while the session runs, taken while it is frozen.
#[derive(Debug)]
pub struct Frozen {
    /// All vrings.
    pub vrings: Vec<VringNow>,
    /// All queue pairs. Of a frame in hand it has only the length.
    pub pairs: Vec<PairNow>,
}

impl Device {
    /// Parks all workers, with their rings in place. This process does not read the TAP or touch a ring until
    /// [`Self::thaw`] or [`Self::survive`]. Passes each frame in hand to `keep`, which returns its length.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dead`] if a worker does not park, or the error of `keep` as [`DeviceError::Dataplane`].
    /// In the latter case all workers are parked.
    pub fn freeze(
        &mut self,
        mut keep: impl FnMut(usize, &FrameInHand) -> io::Result<u32>,
    ) -> Result<Frozen, DeviceError> {
        let mut frozen = Frozen {
            vrings: Vec::with_capacity(self.session.vrings.len()),
            pairs: Vec::with_capacity(self.workers.len()),
        };
        let mut failed = None;
        // Cancel the deferred resume; nothing may restart a worker now.
        self.held = false;
        self.workers.iter().for_each(Worker::close);
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            let parked = worker.park().ok_or(DeviceError::Dead(pair))?;
            for (side, vring) in sides(pair) {
                let setup = &self.session.vrings[vring];
                frozen.vrings.push(parked.ring_mut(side).map_or_else(|| setup.now(), |ring| ring_now(ring)));
            }
            let frame = parked.rx.in_hand.as_ref().map(|frame| keep(pair, frame)).transpose();
            let frame = frame.unwrap_or_else(|source| {
                // Park the other workers, too: their gates are closed already.
                failed.get_or_insert(DeviceError::Dataplane { pair, source });
                None
            });
            let counters = &self.counters[pair];
            let (rx, tx) = (Counters::from(counters.rx.save()), Counters::from(counters.tx.save()));
            frozen.pairs.push(PairNow { frame, rx, tx });
        }
        failed.map_or(Ok(frozen), Err)
    }

    /// Resumes after [`Self::freeze`] (roll back).
    ///
    /// # Errors
    /// Returns [`DeviceError::Dataplane`] if a pair cannot be resumed.
    pub fn thaw(&mut self) -> Result<(), DeviceError> {
        self.restore_tap();
        self.resume_all()
    }

    /// Resumes after [`Self::freeze`] when a target that has since died may have worked on the rings. The frames that
    /// the target had in hand are lost. Our copies of the frames in hand are dropped: the target may have delivered
    /// them.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dead`] if a worker is lost, or [`DeviceError::Dataplane`] if a pair cannot be resumed.
    pub fn survive(&mut self) -> Result<(), DeviceError> {
        self.restore_tap();
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            let parked = worker.park().ok_or(DeviceError::Dead(pair))?;
            parked.rx.in_hand = None;
            parked.rx.unprepare();
            for (side, vring) in sides(pair) {
                if let Some(ring) = parked.ring_mut(side) {
                    let setup = &mut self.session.vrings[vring];
                    setup.deactivate(ring);
                    place_by_used(vring, setup, ring, self.session.inflight.as_ref());
                }
            }
        }
        self.resume_all()
    }

    /// Drops a session and a TAP that another process owns now. Removes all epoll registrations of open files that both
    /// processes share.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dead`] if a worker is lost, or [`DeviceError::Dataplane`] if a registration or vhost-net
    /// cannot be released.
    pub fn let_go(&mut self) -> Result<(), DeviceError> {
        let result = self.park_each(|parked| {
            for (side, _) in sides(0) {
                parked.take_ring(side);
            }
            parked.rx.in_hand = None;
            let released = parked.kernel.as_mut().map_or(Ok(()), |kernel| kernel.vhost.release());
            parked.detach().and(released)
        });
        // Drop them even after an error: another process owns them.
        self.tap = None;
        self.session = self.new_session();
        result
    }

    /// Records the TAP's settings before another process gets its descriptors.
    pub fn remember_tap(&mut self) {
        if let Some(tap) = &mut self.tap {
            tap.remember();
        }
    }

    /// Restores the settings of the TAP, which a process that shares its descriptors may have changed.
    pub(super) fn restore_tap(&mut self) {
        let Some(tap) = &mut self.tap else { return };
        // Not fatal. A worker reports an interface that was deleted.
        if let Err(error) = tap.restore(self.config.sndbuf) {
            limited!(warn, error = error_chain(&error), "cannot restore the TAP's settings");
        }
    }

    pub(super) fn resume_all(&mut self) -> Result<(), DeviceError> {
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            worker.resume().map_err(|source| DeviceError::Dataplane { pair, source })?;
        }
        Ok(())
    }
}

/// Returns the state of a parked ring.
fn ring_now(ring: &Ring) -> VringNow {
    VringNow {
        base: ring.vring.base(),
        base_is_given: false,
        started: !ring.held,
        broken: ring.broken,
        call_due: ring.call_due,
    }
}

/// Continues a ring at its used index, which says how far the last process that worked on it came.
pub(super) fn place_by_used(
    index: usize,
    setup: &mut VringSetup,
    ring: &mut Ring,
    inflight: Option<&Arc<InflightRegion>>,
) {
    ring.vring.reread();
    // Completion is in order. A base that the front-end gave for a ring that has not run since stays.
    if !setup.base_is_given {
        setup.base = ring.vring.published();
    }
    setup.place(index, ring, inflight);
    ring.call_due |= !ring.held;
}
