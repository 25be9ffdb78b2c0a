//! The target's side of a session's hand-over: everything is set up while the source still serves, and no ring or TAP
//! queue is touched until the session is taken.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::handover::wire::device::DirectionCounters;
use baton_protocol::handover::wire::session::{PairNow, VringNow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::freeze::place_by_used;
use super::{Device, DeviceConfig, DeviceError, SessionState, header_size, sides};
use crate::dataplane::ring::Ring;
use crate::dataplane::rx::FrameInHand;
use crate::dataplane::worker::Worker;
use crate::features::Features;
use crate::metrics::PairCounters;
use crate::tap::Tap;
use crate::vring_setup::{Surroundings, VringSetup};
use crate::yielding::yield_if_due;

/// How long to wait for new threads to listen.
const SETTLING: Duration = Duration::from_millis(50);

/// How long to wait for the threads of a taken session to start.
const MOMENT: Duration = Duration::from_millis(1);

/// What a device with a staged session has in addition.
#[derive(Debug)]
pub(super) struct Staged {
    tap: Tap,
    before: Before,
    /// Workers and counters of pairs that the staged device does not have.
    surplus: Surplus,
}

/// The description of the device before a session was staged.
#[derive(Debug)]
struct Before {
    config: DeviceConfig,
    offer: Features,
    pairs: usize,
}

/// The counters of a pair that another process sent: receiving, transmitting.
pub type SavedCounters = (DirectionCounters, DirectionCounters);

/// Workers that are not needed, and their counters.
pub(super) type Surplus = (Vec<Worker>, Vec<Arc<PairCounters>>);

impl Device {
    /// Stages `session`, which another process serves with `tap`: maps its rings and puts them into their pairs,
    /// watches its descriptors, and creates the threads, which wait.
    ///
    /// # Errors
    /// Returns a [`DeviceError`] if anything cannot be set up, and leaves the device unchanged.
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
        tap.settled(header_size(session.features), session.features.into());
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
            // Only the owner uses the inflight region. It is read when the session is taken.
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
        // A thread that listens can be resumed without waking it (`Worker::resume_idle`).
        let deadline = Instant::now() + SETTLING;
        self.workers.iter().for_each(|worker| worker.wait_listens(deadline));
        Ok(())
    }

    /// Takes the staged session, whose current state is in `vrings`, `pairs` and `frames` (the frames in hand by pair).
    /// This process owns the session from now on.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dead`] if a worker is lost, or [`DeviceError::Dataplane`] if a pair cannot be resumed.
    pub fn take_over(
        &mut self,
        vrings: &[VringNow],
        pairs: &[PairNow],
        frames: Vec<(usize, FrameInHand)>,
    ) -> Result<(), DeviceError> {
        self.restore_counters(pairs.iter().map(|now| ((&now.rx).into(), (&now.tx).into())));
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

    /// Takes the staged session from a source that died without sending its current state. Continues from `counters`,
    /// which the source sent with the session, for each pair.
    ///
    /// # Errors
    /// As for [`Self::take_over`].
    pub fn inherit(&mut self, counters: &[SavedCounters]) -> Result<(), DeviceError> {
        self.restore_counters(counters.iter().copied());
        let inflight = self.session.inflight.clone();
        let inflight = inflight.as_ref();
        self.take_rings(|index, setup, ring| {
            if let Some(ring) = ring {
                place_by_used(index, setup, ring, inflight);
            }
        })
    }

    /// Continues from another process' counters, one item for each pair. The workers are parked.
    fn restore_counters(&self, saved: impl Iterator<Item = SavedCounters>) {
        for (counters, (rx, tx)) in self.counters.iter().zip(saved) {
            counters.rx.restore(&rx);
            counters.tx.restore(&tx);
        }
    }

    /// Calls `place` for each ring, and starts all workers.
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
        // On a single processor, let the threads run first. The thread that was woken last starts last.
        let deadline = Instant::now() + MOMENT;
        self.workers.iter().rev().for_each(|worker| worker.wait_begun(deadline));
        Ok(())
    }

    /// Returns for each pair whether its thread listens and its TAP queue has nothing to read.
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

    /// Does the work that taking a session defers: due calls of idle pairs, detaching the queues of pairs that are not
    /// set up, and ending surplus workers.
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

    /// Returns whether a session is staged.
    pub fn is_staged(&self) -> bool {
        self.staged.is_some()
    }

    /// Drops the staged session: restores the previous description and closes everything that belongs to the session.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dead`] if a worker is lost, or [`DeviceError::Dataplane`] if an epoll registration or
    /// vhost-net cannot be released.
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
