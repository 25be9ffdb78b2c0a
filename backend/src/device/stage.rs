//! A device whose session comes from another process, from the side that is to have it: everything is made ready beside
//! the process that works on it, and nothing of the device's is touched until the session is taken.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::handover::wire::device::DirectionCounters;
use baton_protocol::handover::wire::session::{PairNow, VringNow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::freeze::place_by_used;
use super::{Device, DeviceConfig, DeviceError, SessionState, header_size, offloads, sides};
use crate::dataplane::ring::Ring;
use crate::dataplane::rx::FrameInHand;
use crate::dataplane::worker::Worker;
use crate::features::Features;
use crate::metrics::PairCounters;
use crate::tap::Tap;
use crate::vring_setup::{Surroundings, VringSetup};
use crate::yielding::yield_if_due;

/// How long to wait until threads that were just made listen.
const SETTLING: Duration = Duration::from_millis(50);

/// How long to wait until the threads of a session that was taken have begun.
const MOMENT: Duration = Duration::from_millis(1);

/// What a device has that is ready for a session.
#[derive(Debug)]
pub(super) struct Staged {
    tap: Tap,
    before: Before,
    /// Of the pairs that the device turns out not to have.
    surplus: Surplus,
}

/// How the device was described before.
#[derive(Debug)]
struct Before {
    config: DeviceConfig,
    offer: Features,
    pairs: usize,
}

/// Workers without work.
pub(super) type Surplus = (Vec<Worker>, Vec<Arc<PairCounters>>);

impl Device {
    /// Makes everything ready for `session`, which another process serves with `tap`: its rings are mapped and in their
    /// pairs, its descriptors watched, the threads there and waiting.
    ///
    /// # Errors
    /// [`DeviceError`], and the device is as before.
    pub fn stage(
        &mut self,
        session: SessionState,
        mut tap: Tap,
        config: DeviceConfig,
        offer: Features,
    ) -> Result<(), DeviceError> {
        self.park_all()?;
        let pairs = tap.pairs();
        let before = Before { config: self.config.clone(), offer: self.offer, pairs: self.pairs };
        let at = pairs.min(self.workers.len());
        let surplus = (self.workers.split_off(at), self.counters.split_off(at));
        tap.settled(header_size(session.features), offloads(session.features));
        self.describe(config, offer, pairs);
        self.session = session;
        self.staged = Some(Staged { tap, before, surplus });
        let result = self.stage_pairs();
        if result.is_err() {
            self.unstage()?;
        }
        result
    }

    fn stage_pairs(&mut self) -> Result<(), DeviceError> {
        for pair in 0..self.workers.len() {
            let failed = |source| DeviceError::Dataplane { pair, source };
            self.settle_pair(pair)?;
            let Some(staged) = &self.staged else { return Ok(()) };
            let log = self.session.active_log();
            let SessionState { features, memory, vrings, .. } = &self.session;
            // The region is the owner's: what is in flight is found in it when the session is taken.
            let surroundings = Surroundings { memory, features: *features, log, inflight: None };
            let worker = &mut self.workers[pair];
            let parked = worker.park().ok_or(DeviceError::Dead(pair))?;
            parked.set_poll(self.config.poll);
            parked.attach(staged.tap.queue(pair)).map_err(failed)?;
            for (side, vring) in sides(pair) {
                if let Some(ring) = vrings[vring].clone().activate(vring, surroundings)? {
                    parked.put_ring(side, ring).map_err(failed)?;
                }
            }
            parked.prepare_kernel().map_err(failed)?;
            if parked.has_rings() {
                parked.prefault();
                worker.make_thread().map_err(failed)?;
            }
        }
        // A thread that listens need not be woken for nothing.
        let deadline = Instant::now() + SETTLING;
        self.workers.iter().for_each(|worker| worker.wait_listens(deadline));
        Ok(())
    }

    /// Takes the session that was made ready: it is this process' from now on, and as `vrings` and `pairs` say.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn take_over(
        &mut self,
        vrings: &[VringNow],
        pairs: &[PairNow],
        frames: Vec<(usize, FrameInHand)>,
    ) -> Result<(), DeviceError> {
        for (counters, now) in self.counters.iter().zip(pairs) {
            counters.rx.restore(&DirectionCounters::from(&now.rx));
            counters.tx.restore(&DirectionCounters::from(&now.tx));
        }
        for (pair, frame) in frames {
            let worker = self.workers.get_mut(pair).ok_or(DeviceError::Dead(pair))?;
            worker.park().ok_or(DeviceError::Dead(pair))?.rx.in_hand = Some(frame);
        }
        let inflight = self.session.inflight.clone();
        let inflight = inflight.as_ref();
        self.take_rings(|index, setup, ring| {
            if let Some(now) = vrings.get(index) {
                setup.set_now(now);
            }
            if let Some(ring) = ring {
                ring.vring.reread();
                setup.place(index, ring, inflight);
                ring.call_due |= !ring.held;
            }
        })
    }

    /// Takes the session that was made ready from a process that is dead, and said nothing of how far it was.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn inherit(&mut self) -> Result<(), DeviceError> {
        let inflight = self.session.inflight.clone();
        let inflight = inflight.as_ref();
        self.take_rings(|index, setup, ring| {
            if let Some(ring) = ring {
                place_by_used(index, setup, ring, inflight);
            }
        })
    }

    /// Has each ring placed, and all workers begin.
    fn take_rings(
        &mut self,
        mut place: impl FnMut(usize, &mut VringSetup, Option<&mut Ring>),
    ) -> Result<(), DeviceError> {
        let Some(staged) = self.staged.take() else { return Ok(()) };
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            let parked = worker.park().ok_or(DeviceError::Dead(pair))?;
            for (side, vring) in sides(pair) {
                place(vring, &mut self.session.vrings[vring], parked.ring_mut(side));
            }
        }
        let idle = self.idle(&staged.tap);
        for ((pair, worker), idle) in self.workers.iter_mut().enumerate().zip(idle) {
            let resumed = if idle { worker.resume_idle() } else { worker.resume() };
            resumed.map_err(|source| DeviceError::Dataplane { pair, source })?;
        }
        self.tap = Some(staged.tap);
        self.surplus = staged.surplus;
        // They have the processor first, if there is but one; who was woken last begins last.
        let deadline = Instant::now() + MOMENT;
        self.workers.iter().rev().for_each(|worker| worker.wait_begun(deadline));
        Ok(())
    }

    /// Which pairs have nothing to read, as far as can be told before their threads are woken.
    fn idle(&self, tap: &Tap) -> Vec<bool> {
        let mut idle: Vec<_> = self.workers.iter().map(Worker::listens).collect();
        let queues = (0..idle.len()).map(|pair| PollFd::new(tap.queue(pair).as_fd(), PollFlags::POLLIN));
        let mut queues: Vec<_> = queues.collect();
        let looked = poll(&mut queues, PollTimeout::ZERO).is_ok();
        for (idle, queue) in idle.iter_mut().zip(&queues) {
            *idle &= looked && queue.any() == Some(false);
        }
        idle
    }

    /// Does what was left for later when the session was taken: the calls of pairs that have had nothing to do yet, the
    /// queues of pairs that are not set up, and the end of threads and descriptors that the session has no use for.
    ///
    /// # Errors
    /// As for [`Self::follow_pairs`].
    pub fn tidy(&mut self) -> Result<(), DeviceError> {
        self.workers.iter().for_each(Worker::nudge);
        let (workers, _) = std::mem::take(&mut self.surplus);
        for worker in workers {
            drop(worker);
            yield_if_due();
        }
        self.follow_pairs()
    }

    /// Whether a session is ready to be taken.
    pub fn is_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// Forgets the session that was made ready: the device is as before, and what came for it closed.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn unstage(&mut self) -> Result<(), DeviceError> {
        let Some(staged) = self.staged.take() else { return Ok(()) };
        self.park_each(|parked| {
            for (side, _) in sides(0) {
                parked.take_ring(side);
            }
            if let Some(kernel) = &mut parked.kernel {
                kernel.vhost.release()?;
            }
            parked.detach()
        })?;
        let Staged { before: Before { config, offer, pairs }, surplus: (workers, counters), .. } = staged;
        self.workers.extend(workers);
        self.counters.extend(counters);
        self.describe(config, offer, pairs);
        self.session = self.new_session();
        Ok(())
    }
}
