//! A queue pair: everything that its worker works on, in one struct that the worker gives back whole when it parks.
//!
//! Between turns the worker waits on the pair's epoll instance, whose events are edge-triggered. So the worker never
//! reads a kick, which would take it from another process that shares the eventfd, and no watch is removed while a ring
//! is full or stopped. When the worker begins with a pair it looks at everything, to make up for edges that it has not
//! seen.
//!
//! A pair has a queue of the TAP while this process owns the TAP or has staged it. Without a queue it moves nothing.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_control::limited;

use super::Turn;
use super::chain;
use super::failures::Failures;
use super::polling::{PollTime, Polling, Work};
use super::ring::{Kick, Ring, Side};
use super::rx::Rx;
use super::tx::Tx;
use super::vhost::{KernelPath, TAP_WATCH};
use crate::events::{Epoll, Events};
use crate::metrics::PairCounters;
use crate::notify::Notifier;
use crate::tap::TapQueue;
use crate::tap::batch::BatchWriter;
use crate::vhost_net::VhostNet;

/// The longest wait for events, in milliseconds, while a ring without a kick must be polled.
pub(super) const POLLED_WAIT: i32 = 1;

/// How long a transmit ring that is about to be disabled may wait for room in the TAP's send buffer.
const DRAINING: Duration = Duration::from_millis(100);

/// The most turns that [`QueuePair::receive_last`] takes. They suffice for more frames than a queue can hold.
const RESCUE: usize = 16;

/// The events to watch a TAP for.
const TAP_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLOUT).union(Events::EPOLLET);

/// The events to watch a kick for.
pub(super) const KICK_EVENTS: Events = Events::EPOLLIN.union(Events::EPOLLET);

const TAP: u64 = 0;
pub(super) const RX_KICK: u64 = 1;
pub(super) const TX_KICK: u64 = 2;
/// The worker's wake-up, which the worker registers.
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
    /// The kernel path, if the kernel moves the frames.
    pub kernel: Option<KernelPath>,
    pub(super) counters: Arc<PairCounters>,
    pub(super) epoll: Arc<Epoll>,
    pub(super) polling: Polling,
    /// There may be something to receive.
    look_rx: bool,
    /// There may be something to transmit.
    pub(super) look_tx: bool,
    /// When to check next that the macvtap still exists. Unlike a TAP, it does not report its deletion.
    next_watch: Instant,
}

impl QueuePair {
    /// Creates a pair without vrings and TAP. `vhost` moves its frames, or the worker if that is `None`.
    ///
    /// # Errors
    /// Returns an error if the epoll instance or the eventfd cannot be created.
    pub fn new(
        index: u16,
        vhost: Option<VhostNet>,
        counters: Arc<PairCounters>,
        poll: PollTime,
    ) -> io::Result<Self> {
        Ok(Self {
            index,
            tap: None,
            rx: Rx::default(),
            tx: Tx::default(),
            kernel: vhost.map(KernelPath::new).transpose()?,
            counters,
            epoll: Arc::new(Epoll::new()?),
            polling: Polling::new(poll),
            look_rx: false,
            look_tx: false,
            next_watch: Instant::now(),
        })
    }

    /// Gives the pair its queue of the TAP. It must have none.
    ///
    /// # Errors
    /// Returns an error if the queue cannot be watched.
    pub fn attach(&mut self, tap: &Arc<TapQueue>) -> io::Result<()> {
        if self.kernel.is_none() {
            self.epoll.add(&**tap, TAP_EVENTS, TAP)?;
            self.tx.unlimited = tap.is_unlimited();
        }
        tracing::debug!(pair = self.index, "the pair has its queue of the TAP");
        self.tap = Some(Arc::clone(tap));
        Ok(())
    }

    /// Takes the queue of the TAP away, if the pair has one, and stops watching it.
    ///
    /// # Errors
    /// Returns an error if the watch cannot be removed.
    pub fn detach(&mut self) -> io::Result<()> {
        let Some(tap) = self.tap.take() else { return Ok(()) };
        tracing::debug!(pair = self.index, "the pair has no queue of the TAP");
        // The watch would outlive our descriptor, because another process may hold the open file.
        if self.kernel.is_none() { self.epoll.remove(&*tap) } else { Ok(()) }
    }

    /// Sets how long to poll for work before waiting for events.
    pub fn set_poll(&mut self, poll: PollTime) {
        self.polling = Polling::new(poll);
    }

    /// Returns the epoll instance that watches the pair's kicks and TAP, and the worker's wake-up.
    pub(super) fn events(&self) -> Arc<Epoll> {
        Arc::clone(&self.epoll)
    }

    /// Returns whether the pair has a ring.
    pub fn has_rings(&self) -> bool {
        self.rx.ring.is_some() || self.tx.ring.is_some()
    }

    /// Puts a vring in. There must be none on that side.
    ///
    /// # Errors
    /// Returns an error if the kick cannot be watched. The ring is dropped.
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

    /// Returns the vring of a side, which stays in the pair.
    pub fn ring_mut(&mut self, side: Side) -> Option<&mut Ring> {
        match side {
            Side::Rx => self.rx.ring.as_mut(),
            Side::Tx => self.tx.ring.as_mut(),
        }
    }

    /// Takes a vring out. Each of its chains is either completed and published, or still available.
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

    /// Sends the chains that are available now in a transmit ring that is about to be disabled. Chains that come later
    /// are discarded: the driver does not know of the change, and may never stop.
    pub fn drain(&mut self) {
        let (Some(tap), Some(ring)) = (self.tap.clone(), &self.tx.ring) else { return };
        if !ring.runs() || !ring.enabled {
            return;
        }
        let end = ring.vring.available_index();
        let deadline = Instant::now() + DRAINING;
        self.tx.writable();
        while let Some(ring) = &self.tx.ring {
            // A turn may go beyond `end`. The first turn detects an invalid index.
            let left = end.wrapping_sub(ring.vring.next_available());
            if left == 0 || left > ring.vring.size() {
                return;
            }
            match self.tx.run(self.index, &tap, &self.counters.tx, None) {
                Turn::More | Turn::Done => {}
                Turn::Full if tap.wait_writable(deadline) => {
                    self.tx.writable();
                }
                Turn::Full | Turn::Idle => return,
            }
        }
    }

    /// Delivers the frames of another queue of the TAP, as far as the guest has buffers, and calls `detach` to detach
    /// that queue. Publishes the frames only then: if the guest replied earlier, the network's next frames would go to
    /// that queue and be lost.
    pub fn receive_last<T>(&mut self, queue: &TapQueue, detach: impl FnOnce() -> T) -> T {
        for _ in 0..RESCUE {
            if self.rx.run_hidden(self.index, queue, &self.counters.rx) != Turn::More {
                break;
            }
        }
        let result = detach();
        self.rx.show(&self.counters.rx);
        if self.kernel.is_some() {
            // The kernel continues with the ring, and does not know the frame in hand.
            self.rx.unprepare();
            self.rx.in_hand = None;
        }
        result
    }

    /// Touches all memory that the first frames need, while another process still serves the rings.
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

    /// Begins to work. The next turn looks at everything, whatever events have come.
    pub(super) fn begin(&mut self) {
        self.look_rx = true;
        self.look_tx = true;
        self.polling.begin();
    }

    /// Makes the due calls whose eventfd is `wanted`.
    pub(super) fn make_calls(&mut self, wanted: impl Fn(&Notifier) -> bool) {
        for ring in [&mut self.rx.ring, &mut self.tx.ring].into_iter().flatten() {
            if ring.call_due && ring.vring.call().is_none_or(&wanted) {
                ring.call_due = false;
                ring.vring.call_guest();
            }
        }
    }

    /// Returns whether there is nothing to do until the TAP has a frame or the driver kicks. Enables kicks.
    /// Conservatively returns `false`.
    pub(super) fn is_idle(&mut self) -> bool {
        if self.kernel.is_some()
            || self.polling.is_fixed()
            || self.rx.in_hand.is_some()
            || self.watches_macvtap()
        {
            return false;
        }
        let rings = [&self.rx.ring, &self.tx.ring];
        if rings.into_iter().flatten().any(|ring| !matches!(ring.kick, Kick::Eventfd(_))) {
            return false;
        }
        self.tx.enable_kicks()
    }

    /// Moves frames for one turn, or lets the kernel move them. Returns the timeout of the next wait for events in
    /// milliseconds, −1 for none. If the pair cannot continue, reports that to the event loop and returns `None`.
    pub(super) fn turn(&mut self, failures: &Failures, writer: &mut BatchWriter) -> Option<i32> {
        let result = match (self.tap.clone(), self.kernel.is_some()) {
            (None, _) => Ok(-1),
            (Some(tap), true) => self.turn_of_kernel(&tap),
            (Some(tap), false) => self.turn_here(&tap, writer),
        };
        result.map_err(|error| failures.report(&error)).ok()
    }

    /// Takes the rings back from the kernel. From then on only the caller touches them.
    pub(super) fn leave(&mut self, failures: &Failures) {
        if self.kernel.is_some() {
            self.take_from_kernel(Side::Rx, failures);
            self.take_from_kernel(Side::Tx, failures);
        }
    }

    /// Returns whether the kernel works on a ring.
    pub(super) fn runs_in_kernel(&self) -> bool {
        self.kernel.as_ref().is_some_and(|kernel| kernel.vhost.runs(Side::Rx) || kernel.vhost.runs(Side::Tx))
    }

    /// Notes the event of `token`.
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

    fn turn_here(&mut self, tap: &TapQueue, writer: &mut BatchWriter) -> io::Result<i32> {
        let polled = self.polled();
        let (mut received, mut sent) = (false, false);
        if self.look_tx || polled {
            // Kicks stay disabled until it is clear that the worker sleeps.
            let turn = self.tx.run(self.index, tap, &self.counters.tx, Some(writer));
            sent = turn != Turn::Idle;
            self.look_tx = turn == Turn::More;
            // A TAP reports new room only if it was polled after it became full. Without this there is no edge.
            if turn == Turn::Full {
                self.epoll.rearm(tap, TAP_EVENTS, TAP)?;
            }
        }
        if self.look_rx || polled {
            let turn = self.rx.run(self.index, tap, &self.counters.rx);
            received = turn != Turn::Idle;
            self.look_rx = turn == Turn::More;
        }
        if self.watches_macvtap() && Instant::now() >= self.next_watch {
            tap.was_deleted();
            self.next_watch = Instant::now() + Duration::from_millis(TAP_WATCH.unsigned_abs().into());
        }
        if tap.is_gone() {
            return Err(io::Error::other("the TAP was deleted"));
        }
        if let Some(work) = Work::of(received, sent) {
            self.polling.worked(work);
        }
        if !self.look_rx && !self.look_tx {
            // The wait for events, with timeout 0, tells whether the TAP has a frame.
            self.look_tx = if self.polling.goes_on() {
                self.tx.suppress_kicks();
                true
            } else {
                !self.tx.wants_kicks() && !self.tx.enable_kicks()
            };
        }
        Ok(match (self.look_rx || self.look_tx, polled) {
            (true, _) => 0,
            (false, true) => POLLED_WAIT,
            (false, false) if self.watches_macvtap() => TAP_WATCH,
            (false, false) => -1,
        })
    }

    /// Returns whether this pair checks that its macvtap still exists.
    fn watches_macvtap(&self) -> bool {
        self.index == 0 && self.tap.as_ref().is_some_and(|tap| tap.is_macvtap())
    }

    /// Returns whether a ring has no kick and must be polled.
    pub(super) fn polled(&self) -> bool {
        let polled = |ring: &Option<Ring>| {
            ring.as_ref().is_some_and(|ring| ring.runs() && matches!(ring.kick, Kick::Polled))
        };
        polled(&self.rx.ring) || polled(&self.tx.ring)
    }
}
