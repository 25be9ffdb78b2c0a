//! A queue pair: all that its worker works on, in one struct that is handed over whole when the worker parks.
//!
//! The worker waits for the pair's own epoll instance, between turns. Everything there is edge-triggered, so kicks need
//! not be read (a read would take them from whoever shares the eventfd) and nothing has to be switched off while a ring
//! is full or stopped; to make up for edges that came while nobody looked, every run begins with a look at everything.
//!
//! A pair has a queue of the TAP while this process owns it. Without one it moves nothing.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_control::limited;

use super::Turn;
use super::chain;
use super::failures::Failures;
use super::ring::{Kick, Ring, Side};
use super::rx::Rx;
use super::tx::Tx;
use super::vhost::{KernelPath, TAP_WATCH};
use crate::events::{Epoll, Events};
use crate::metrics::PairCounters;
use crate::notify::Notifier;
use crate::tap::TapQueue;
use crate::vhost_net::VhostNet;

/// How long to wait for events at most, in milliseconds, while a ring has no kick and must be polled.
pub(super) const POLLED_WAIT: i32 = 1;

/// How long a transmit ring that is disabled may wait for room in the TAP's send buffer.
const DRAINING: Duration = Duration::from_millis(100);

/// How many turns it takes at most to deliver what a queue has: more frames than the queue is long.
const RESCUE: usize = 16;

/// What a TAP is watched for.
const TAP_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLOUT).union(Events::EPOLLET);

/// What a kick is watched for.
pub(super) const KICK_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLET);

const TAP: u64 = 0;
pub(super) const RX_KICK: u64 = 1;
pub(super) const TX_KICK: u64 = 2;
/// The worker's own wake-up, registered by it.
pub(super) const WAKE: u64 = 3;

/// One queue pair.
#[derive(Debug)]
pub struct QueuePair {
    pub(super) index: u16,
    pub(super) tap: Option<Arc<TapQueue>>,
    /// TAP to guest.
    pub rx: Rx,
    /// Guest to TAP.
    pub tx: Tx,
    /// What the kernel moves the frames with, if it does.
    pub kernel: Option<KernelPath>,
    pub(super) counters: Arc<PairCounters>,
    pub(super) epoll: Arc<Epoll>,
    /// How long to look for work before waiting for it.
    pub(super) poll: Duration,
    /// There may be something to receive.
    look_rx: bool,
    /// There may be something to transmit.
    pub(super) look_tx: bool,
    /// When there was something to do last, while that matters.
    final_script: Instant,
    /// When to see next whether the macvtap is still there: unlike a TAP it does not tell.
    next_watch: Instant,
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
        Ok(Self {
            index,
            tap: None,
            rx: Rx::default(),
            tx: Tx::default(),
            kernel: vhost.map(KernelPath::new).transpose()?,
            counters,
            epoll: Arc::new(Epoll::new()?),
            poll,
            look_rx: false,
            look_tx: false,
            final_script: Instant::now(),
            next_watch: Instant::now(),
        })
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

    /// What its events come from: all it watches, and the worker's own wake-up.
    pub(super) fn events(&self) -> Arc<Epoll> {
        Arc::clone(&self.epoll)
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
        let token = match side {
            Side::Rx => RX_KICK,
            Side::Tx => TX_KICK,
        };
        if let Kick::Eventfd(kick) = &ring.kick {
            self.epoll.add(kick, KICK_EVENTS, token)?;
        }
        match side {
            Side::Rx => self.rx.ring = Some(ring),
            Side::Tx => self.tx.ring = Some(ring),
        }
        Ok(())
    }

    /// The vring of a side, which stays in.
    pub fn ring_mut(&mut self, side: Side) -> Option<&mut Ring> {
        match side {
            Side::Rx => self.rx.ring.as_mut(),
            Side::Tx => self.tx.ring.as_mut(),
        }
    }

    /// Takes a vring out, with all its chains completed and published or still available.
    pub fn take_ring(&mut self, side: Side) -> Option<Ring> {
        let ring = match side {
            Side::Rx => {
                self.rx.unprepare();
                self.rx.ring.take()
            }
            Side::Tx => self.tx.ring.take(),
        }?;
        if let Some(kernel) = &mut self.kernel {
            kernel.vhost.unprepare(side);
        }
        if let Kick::Eventfd(kick) = &ring.kick
            && let Err(error) = self.epoll.remove(kick)
        {
            limited!(warn, pair = self.index, %error, "cannot stop watching a kick");
        }
        Some(ring)
    }

    /// Sends what the driver has made available by now in a transmit ring that is about to be disabled; what it makes
    /// available later is discarded. The driver, who does not know, may never stop: what is there now is the bound.
    pub fn drain(&mut self) {
        let (Some(tap), Some(ring)) = (self.tap.clone(), &self.tx.ring) else { return };
        if !ring.runs() || !ring.enabled {
            return;
        }
        let end = ring.vring.available_index();
        let deadline = Instant::now() + DRAINING;
        self.tx.writable();
        while let Some(ring) = &self.tx.ring {
            // A turn may go further. An index that makes no sense is found by the first one.
            let left = end.wrapping_sub(ring.vring.next_available());
            if left == 0 || left > ring.vring.size() {
                return;
            }
            match self.tx.run(self.index, &tap, &self.counters.tx, false) {
                Turn::More | Turn::Done => {}
                Turn::Full if tap.wait_writable(deadline) => {
                    self.tx.writable();
                }
                Turn::Full | Turn::Idle => return,
            }
        }
    }

    /// Delivers what another queue of the TAP has, as far as the guest has room for it; that is `detached` before the
    /// guest sees any of it, for what answers come would be put there.
    pub fn receive_last<T>(&mut self, queue: &TapQueue, detached: impl FnOnce() -> T) -> T {
        for _ in 0..RESCUE {
            if self.rx.run_hidden(self.index, queue, &self.counters.rx) != Turn::More {
                break;
            }
        }
        let result = detached();
        self.rx.show(&self.counters.rx);
        if self.kernel.is_some() {
            // The kernel goes on with the ring, and knows nothing of what is in hand.
            self.rx.unprepare();
            self.rx.in_hand = None;
        }
        result
    }

    /// Has all memory that the first frames need there before they come: the rings are another process' still.
    pub fn prefault(&mut self) {
        for ring in [&self.rx.ring, &self.tx.ring].into_iter().flatten() {
            ring.vring.prefault();
            chain::prefault(&ring.vring);
        }
        if self.kernel.is_none() {
            self.rx.prefault();
            self.tx.prefault();
        }
    }

    /// Begins to work, whatever was heard before: with a look at everything.
    pub(super) fn begin(&mut self) {
        self.look_rx = true;
        self.look_tx = true;
        self.final_script = Instant::now();
    }

    /// Makes the calls that are due on descriptors that are `wanted`.
    pub(super) fn make_calls(&mut self, wanted: impl Fn(&Notifier) -> bool) {
        for ring in [&mut self.rx.ring, &mut self.tx.ring].into_iter().flatten() {
            if ring.call_due && ring.vring.call().is_none_or(&wanted) {
                ring.call_due = false;
                ring.vring.call_guest();
            }
        }
    }

    /// Whether there is nothing to do until the TAP has something to read, or the driver kicks, which it is asked for. No
    /// when in doubt.
    pub(super) fn is_idle(&mut self) -> bool {
        if self.kernel.is_some()
            || !self.poll.is_zero()
            || self.rx.in_hand.is_some()
            || self.watches_macvtap()
        {
            return false;
        }
        let rings = [&self.rx.ring, &self.tx.ring];
        if rings.into_iter().flatten().any(|ring| !matches!(ring.kick, Kick::Eventfd(_))) {
            return false;
        }
        match &mut self.tx.ring {
            Some(ring) if ring.runs() => ring.vring.enable_kicks(0) == Ok(0),
            _ => true,
        }
    }

    /// Moves frames, or has them moved, for one turn. Gives for how many milliseconds to wait for events then, −1 being
    /// for ever; `None` if it cannot go on, which the event loop has been told.
    pub(super) fn turn(&mut self, failures: &Failures) -> Option<i32> {
        let result = match (self.tap.clone(), self.kernel.is_some()) {
            (None, _) => Ok(-1),
            (Some(tap), true) => self.turn_of_kernel(&tap),
            (Some(tap), false) => self.turn_here(&tap),
        };
        result.map_err(|error| failures.report(&error)).ok()
    }

    /// Takes what the kernel has of it: nobody but the caller touches a ring from here on.
    pub(super) fn leave(&mut self, failures: &Failures) {
        if self.kernel.is_some() {
            self.take_from_kernel(Side::Rx, failures);
            self.take_from_kernel(Side::Tx, failures);
        }
    }

    /// Whether the kernel works on a ring.
    pub(super) fn runs_in_kernel(&self) -> bool {
        self.kernel.as_ref().is_some_and(|kernel| kernel.vhost.runs(Side::Rx) || kernel.vhost.runs(Side::Tx))
    }

    /// An event came.
    pub(super) fn hear(&mut self, token: u64, events: Events) {
        match token {
            TAP => {
                self.look_rx |= events.intersects(Events::EPOLLIN | Events::EPOLLERR);
                self.look_tx |= events.contains(Events::EPOLLOUT) && self.tx.writable();
            }
            RX_KICK => {
                self.counters.rx.kicks.add(1);
                self.look_rx = true;
            }
            TX_KICK => {
                self.counters.tx.kicks.add(1);
                self.look_tx = true;
            }
            _ => {}
        }
    }

    fn turn_here(&mut self, tap: &TapQueue) -> io::Result<i32> {
        let polling = !self.poll.is_zero() && self.final_script.elapsed() < self.poll;
        let polled = self.polled();
        let mut worked = false;
        if self.look_tx || polling || polled {
            let turn = self.tx.run(self.index, tap, &self.counters.tx, !polling);
            worked |= turn != Turn::Idle;
            // While polling no kicks are asked for: the last look, before waiting, is the one that does.
            self.look_tx = turn == Turn::More || polling;
            // A TAP tells of new room only if it was looked at since it had none: without this there is no edge.
            if turn == Turn::Full {
                self.epoll.rearm(tap, TAP_EVENTS, TAP)?;
            }
        }
        if self.look_rx || polling || polled {
            let turn = self.rx.run(self.index, tap, &self.counters.rx);
            worked |= turn != Turn::Idle;
            self.look_rx = turn == Turn::More;
        }
        if self.watches_macvtap() && Instant::now() >= self.next_watch {
            tap.was_deleted();
            self.next_watch = Instant::now() + Duration::from_millis(TAP_WATCH.unsigned_abs().into());
        }
        if tap.is_gone() {
            return Err(io::Error::other("the TAP was deleted"));
        }
        if worked && !self.poll.is_zero() {
            self.final_script = Instant::now();
        }
        Ok(match (self.look_rx || self.look_tx, polled) {
            (true, _) => 0,
            (false, true) => POLLED_WAIT,
            (false, false) if self.watches_macvtap() => TAP_WATCH,
            (false, false) => -1,
        })
    }

    /// Whether this pair is the one that sees whether its macvtap was deleted.
    fn watches_macvtap(&self) -> bool {
        self.index == 0 && self.tap.as_ref().is_some_and(|tap| tap.is_macvtap())
    }

    pub(super) fn polled(&self) -> bool {
        let polled = |ring: &Option<Ring>| {
            ring.as_ref().is_some_and(|ring| ring.runs() && matches!(ring.kick, Kick::Polled))
        };
        polled(&self.rx.ring) || polled(&self.tx.ring)
    }
}
