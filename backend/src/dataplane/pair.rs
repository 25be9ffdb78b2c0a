//! A queue pair: all that its worker works on, in one struct that is handed over whole when the worker parks.
//!
//! The worker waits in the pair's own epoll instance. Everything there is edge-triggered, so kicks need not be read
//! (a read would take them from whoever shares the eventfd) and nothing has to be switched off while a ring is full
//! or stopped; to make up for edges that came while nobody looked, every run begins with a look at everything.
//!
//! A pair has a queue of the TAP while this process owns it. Without one it moves nothing, and only tells when the
//! driver starts a ring.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Turn;
use super::kernel::KernelPath;
use super::ring::{Kick, Ring};
use super::rx::Rx;
use super::tx::Tx;
use super::worker::Gate;
use crate::events::{Epoll, Events, Ready};
use crate::metrics::{self, PairCounters};
use crate::tap::TapQueue;
use crate::vhost_net::VhostNet;

/// How long to wait for events at most, in milliseconds, while a ring has no kick and must be polled.
pub(super) const POLLED_WAIT: i32 = 1;

/// What a TAP is watched for.
const TAP_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLOUT).union(Events::EPOLLET);

/// What a kick is watched for.
pub(super) const KICK_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLET);

const TAP: u64 = 0;
pub(super) const RX_KICK: u64 = 1;
pub(super) const TX_KICK: u64 = 2;
/// The worker's own wake-up, registered by it.
pub const WAKE: u64 = 3;

/// Which vring of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// TAP to guest, virtqueue 2n.
    Rx,
    /// Guest to TAP, virtqueue 2n + 1.
    Tx,
}

/// One queue pair.
#[derive(Debug)]
pub struct QueuePair {
    pub(super) index: u16,
    tap: Option<Arc<TapQueue>>,
    /// TAP to guest.
    pub rx: Rx,
    /// Guest to TAP.
    pub tx: Tx,
    /// What the kernel moves the frames with, if it does.
    pub kernel: Option<KernelPath>,
    pub(super) counters: Arc<PairCounters>,
    pub(super) epoll: Epoll,
    /// How long to look for work before waiting for it.
    pub(super) poll: Duration,
}

impl QueuePair {
    /// A pair without vrings and TAP, whose frames `vhost` is to move or else the worker.
    ///
    /// # Errors
    /// What making an epoll instance or an eventfd fails with.
    pub fn new(
        index: u16,
        vhost: Option<VhostNet>,
        counters: Arc<PairCounters>,
        poll: Duration,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let kernel = vhost.map(KernelPath::new).transpose()?;
        Ok(Self { index, tap: None, rx: Rx::default(), tx: Tx::default(), kernel, counters, epoll, poll })
    }

    /// Gives it the TAP's queue, of which it has none.
    ///
    /// # Errors
    /// What watching the queue fails with.
    pub fn attach(&mut self, tap: &Arc<TapQueue>) -> io::Result<()> {
        if self.kernel.is_none() {
            self.epoll.add(&**tap, TAP_EVENTS, TAP)?;
        }
        tracing::debug!(pair = self.index, "queue attached: frames are read");
        self.tap = Some(Arc::clone(tap));
        Ok(())
    }

    /// Takes the TAP's queue away: nothing reads it any more, nor waits for it.
    ///
    /// # Errors
    /// What ending the watch fails with.
    pub fn detach(&mut self) -> io::Result<()> {
        let Some(tap) = self.tap.take() else { return Ok(()) };
        tracing::debug!(pair = self.index, "queue let go: no frame is read");
        // Another process may hold the open file, and with it the watch.
        if self.kernel.is_none() { self.epoll.remove(&*tap) } else { Ok(()) }
    }

    /// How long to look for work before waiting for it.
    pub fn set_poll(&mut self, poll: Duration) {
        self.poll = poll;
    }

    /// Has the worker's wake-up end a wait.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` fails with.
    pub fn watch_wake(&self, wake: &impl AsFd) -> io::Result<()> {
        self.epoll.add(wake, Events::EPOLLIN, WAKE)
    }

    /// Whether a worker has anything to do here.
    pub fn has_rings(&self) -> bool {
        self.rx.ring.is_some() || self.tx.ring.is_some()
    }

    /// Puts a vring in. There must be none on that side.
    ///
    /// # Errors
    /// What watching its kick fails with; the ring is dropped then.
    pub fn put_ring(&mut self, side: Side, ring: Ring) -> io::Result<()> {
        let (token, counters) = match side {
            Side::Rx => (RX_KICK, &self.counters.rx),
            Side::Tx => (TX_KICK, &self.counters.tx),
        };
        if let Kick::Eventfd(kick) = &ring.kick {
            self.epoll.add(kick, KICK_EVENTS, token)?;
        }
        counters.started.store(ring.started, Ordering::Relaxed);
        match side {
            Side::Rx => self.rx.ring = Some(ring),
            Side::Tx => self.tx.ring = Some(ring),
        }
        Ok(())
    }

    /// Takes a vring out, with all its chains completed and published or still available.
    pub fn take_ring(&mut self, side: Side) -> Option<Ring> {
        let (ring, counters) = match side {
            Side::Rx => {
                self.rx.unprepare();
                (self.rx.ring.take(), &self.counters.rx)
            }
            Side::Tx => (self.tx.ring.take(), &self.counters.tx),
        };
        let ring = ring?;
        counters.started.store(false, Ordering::Relaxed);
        if let Kick::Eventfd(kick) = &ring.kick
            && let Err(error) = self.epoll.remove(kick)
        {
            tracing::warn!(pair = self.index, %error, "cannot stop watching a kick");
        }
        Some(ring)
    }

    /// Moves frames, or has them moved, until the gate closes.
    pub fn run(&mut self, gate: &Gate) {
        for ring in [&mut self.rx.ring, &mut self.tx.ring].into_iter().flatten() {
            if std::mem::take(&mut ring.call_due) {
                ring.vring.call_guest();
            }
        }
        match (self.tap.clone(), self.kernel.is_some()) {
            (None, _) => self.wait_for_tap(gate),
            (Some(tap), true) => self.run_kernel(&tap, gate),
            (Some(tap), false) => self.run_here(&tap, gate),
        }
    }

    /// Without a TAP: tells when a ring starts, and works on none.
    fn wait_for_tap(&mut self, gate: &Gate) {
        let mut ready = Ready::<4>::default();
        while !gate.closed() {
            let events = match self.epoll.wait(-1, &mut ready) {
                Ok(events) => events,
                Err(error) => {
                    gate.report(&error);
                    return;
                }
            };
            for (token, _) in events {
                let (ring, counters) = match token {
                    RX_KICK => (self.rx.ring.as_mut(), &self.counters.rx),
                    TX_KICK => (self.tx.ring.as_mut(), &self.counters.tx),
                    _ => continue,
                };
                let started = |ring: &Ring| ring.started;
                let before = ring.as_deref().is_some_and(started);
                if let Some(ring) = ring {
                    ring.kicked(counters);
                    if ring.started && !before {
                        gate.report_start();
                    }
                }
            }
        }
    }

    fn run_here(&mut self, tap: &TapQueue, gate: &Gate) {
        let mut ready = Ready::<4>::default();
        let (mut look_rx, mut look_tx) = (true, true);
        let mut last_work = Instant::now();
        while !gate.closed() {
            let polling = !self.poll.is_zero() && last_work.elapsed() < self.poll;
            let mut worked = false;
            if look_tx || polling {
                let turn = self.tx.run(self.index, tap, &self.counters.tx, !polling);
                worked |= turn != Turn::Idle;
                // While polling no kicks are asked for: the last look, before waiting, is the one that does.
                look_tx = turn == Turn::More || polling;
                // A TAP tells of new room only if it was looked at since it had none: without this there is no edge.
                if turn == Turn::Full
                    && let Err(error) = self.epoll.rearm(tap, TAP_EVENTS, TAP)
                {
                    gate.report(&error);
                    return;
                }
            }
            if look_rx || polling {
                let turn = self.rx.run(self.index, tap, &self.counters.rx);
                worked |= turn != Turn::Idle;
                look_rx = turn == Turn::More;
            }
            if tap.is_gone() {
                gate.report(&io::Error::other("the TAP was deleted"));
                return;
            }
            if worked && !self.poll.is_zero() {
                last_work = Instant::now();
            }
            let polled = self.polled();
            let timeout = match (look_rx || look_tx, polled) {
                (true, _) => 0,
                (false, true) => POLLED_WAIT,
                (false, false) => -1,
            };
            let events = match self.epoll.wait(timeout, &mut ready) {
                Ok(events) => events,
                Err(error) => {
                    // Only a bug makes this fail; the thread must not spin on it, nor end unseen.
                    gate.report(&error);
                    return;
                }
            };
            for (token, events) in events {
                match token {
                    TAP => {
                        look_rx |= events.intersects(Events::EPOLLIN | Events::EPOLLERR);
                        look_tx |= events.contains(Events::EPOLLOUT) && self.tx.writable();
                    }
                    RX_KICK => look_rx |= kicked(self.rx.ring.as_mut(), &self.counters.rx),
                    TX_KICK => look_tx |= kicked(self.tx.ring.as_mut(), &self.counters.tx),
                    _ => {}
                }
            }
            look_rx |= polled;
            look_tx |= polled;
        }
    }

    pub(super) fn polled(&self) -> bool {
        let polled = |ring: &Option<Ring>| {
            ring.as_ref().is_some_and(|ring| ring.runs() && matches!(ring.kick, Kick::Polled))
        };
        polled(&self.rx.ring) || polled(&self.tx.ring)
    }
}

pub(super) fn kicked(ring: Option<&mut Ring>, counters: &metrics::Direction) -> bool {
    ring.is_some_and(|ring| {
        ring.kicked(counters);
        true
    })
}
