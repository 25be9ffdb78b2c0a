//! A device whose session goes to another process, from the side that has it: it stands still, with everything in its
//! place, and then goes on as if nothing had been, or after another process has worked on its rings, or lets go.

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

/// What changes while a session runs, as it is now that it stands still.
#[derive(Debug)]
pub struct Frozen {
    /// Every vring.
    pub vrings: Vec<VringNow>,
    /// Every queue pair, but for the frame in hand.
    pub pairs: Vec<PairNow>,
}

impl Device {
    /// Stops everything: nobody reads the TAP or touches a ring until [`Self::thaw`], and nothing is put away for that.
    /// Frames in hand go to `keep`, which gives their length.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], and [`DeviceError::Dataplane`] if a frame cannot be kept: all stand still then, too.
    pub fn freeze(
        &mut self,
        mut keep: impl FnMut(usize, &FrameInHand) -> io::Result<u32>,
    ) -> Result<Frozen, DeviceError> {
        let mut frozen = Frozen {
            vrings: Vec::with_capacity(self.session.vrings.len()),
            pairs: Vec::with_capacity(self.workers.len()),
        };
        let mut failed = None;
        // Nor does what waits for its turn make anybody run.
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
                // The others have been told to stop, too, and go on only from there.
                failed.get_or_insert(DeviceError::Dataplane { pair, source });
                None
            });
            let counters = &self.counters[pair];
            let (rx, tx) = (Counters::from(counters.rx.save()), Counters::from(counters.tx.save()));
            frozen.pairs.push(PairNow { frame, rx, tx });
        }
        failed.map_or(Ok(frozen), Err)
    }

    /// Goes on where [`Self::freeze`] stopped.
    ///
    /// # Errors
    /// [`DeviceError::Dataplane`].
    pub fn thaw(&mut self) -> Result<(), DeviceError> {
        self.restore_tap();
        self.resume_all()
    }

    /// Goes on after [`Self::freeze`] and after another process, which is dead, has worked on the rings since. What it
    /// had in hand is lost; the frame in hand here is its, too.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
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

    /// Lets go of a session and a TAP that are another process' now: no watch is left on what both hold.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn let_go(&mut self) -> Result<(), DeviceError> {
        let result = self.park_each(|parked| {
            for (side, _) in sides(0) {
                parked.take_ring(side);
            }
            parked.rx.in_hand = None;
            let released = parked.kernel.as_mut().map_or(Ok(()), |kernel| kernel.vhost.release());
            parked.detach().and(released)
        });
        // Whatever became of that, they are not ours.
        self.tap = None;
        self.session = self.new_session();
        result
    }

    /// Notes how the TAP is, before another process gets its descriptors.
    pub fn remember_tap(&mut self) {
        if let Some(tap) = &mut self.tap {
            tap.remember();
        }
    }

    /// Undoes what a process that was given the TAP's descriptors may have done to the TAP.
    pub(super) fn restore_tap(&mut self) {
        let Some(tap) = &mut self.tap else { return };
        // The device goes on as well as it can. If the interface was deleted, that is seen by itself.
        if let Err(error) = tap.restore(self.config.sndbuf) {
            limited!(warn, error = error_chain(&error), "the TAP's settings cannot be restored");
        }
    }

    pub(super) fn resume_all(&mut self) -> Result<(), DeviceError> {
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            worker.resume().map_err(|source| DeviceError::Dataplane { pair, source })?;
        }
        Ok(())
    }
}

/// How a ring stands that is not worked on.
fn ring_now(ring: &Ring) -> VringNow {
    VringNow {
        base: ring.vring.base(),
        base_is_given: false,
        started: !ring.held,
        broken: ring.broken,
        call_due: ring.call_due,
    }
}

/// Puts a ring where its used index says that whoever worked on it had come.
pub(super) fn place_by_used(
    index: usize,
    setup: &mut VringSetup,
    ring: &mut Ring,
    inflight: Option<&Arc<InflightRegion>>,
) {
    ring.vring.reread();
    // Completion is in order. What the front-end has said of a ring that nobody has worked on yet stands.
    if !setup.base_is_given {
        setup.base = ring.vring.published();
    }
    setup.place(index, ring, inflight);
    ring.call_due |= !ring.held;
}
