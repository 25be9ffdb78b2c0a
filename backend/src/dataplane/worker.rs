//! A worker thread, and its owner's side of the [gate](super::gate) at which it parks.
//!
//! A queue pair is in exactly one place: with its [`Worker`]'s owner, or with the thread; or it lies between them while
//! the thread waits for events, and whoever comes first has it. [`Worker::park`] gets it, at once from a thread that
//! waits, at a batch boundary from one that works; so whoever holds the pair knows that nobody else reads the TAP's queue
//! or touches a ring. The thread is made when it is first needed, or beforehand ([`Worker::make_thread`]).
//!
//! ```text
//!   owner: Here(pair) ──resume──▶ Run(pair) ──thread wakes──▶ thread works ──nothing to do──▶ Waiting(pair)
//!                                    │                          │   ▲──────────event────────────┘ │
//!                                    │                     gate closed: Parked(pair)              │
//!          Here(pair) ◀─park─────────┴──────────────────────────┴─────────────────────────────────┘
//!                                 thread cannot go on ──▶ Parked(pair), reported to the event loop
//! ```

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::failures::{Failures, WorkerFailure};
use super::gate::{Gate, Wake};
use super::interrupt;
use super::pair::{QueuePair, WAKE};
use crate::event_channel::EventSender;
use crate::events::{Epoll, Events, Ready};
use crate::notify::Notifier;
use crate::tap::TapQueue;

/// How long a worker may take to park before it is interrupted. Each interrupt ends one blocking call; the next one comes
/// after twice as long, so that none starves a call that only takes its time.
const PATIENCE: Duration = Duration::from_millis(1);

/// The longest time between two interrupts.
const LONGEST: Duration = Duration::from_millis(50);

/// After how long a worker counts as lost: what holds it up is no call that a signal ends, but for example a page of
/// guest memory that the front-end does not provide.
const END_OF_PATIENCE: Duration = Duration::from_secs(10);

/// What ends a worker's wait for events.
#[derive(Debug)]
struct Bell(EventFd);

impl Wake for Bell {
    fn wake(&self) {
        // Fails only when the counter is full, after 2^64 of them.
        let _ = self.0.write(1);
    }
}

#[derive(Debug)]
struct Shared {
    gate: Gate<Box<QueuePair>, Bell>,
    failures: Failures,
    /// The pair's events, and the bell's.
    events: Arc<Epoll>,
}

/// The thread's end if it panics: the owner must not wait for ever.
struct PanicGuard(Arc<Shared>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.gate.die();
            self.0.failures.report(&io::Error::other("the worker thread panicked"));
        }
    }
}

/// A queue pair's worker, from its owner's side.
#[derive(Debug)]
pub struct Worker {
    /// The pair, unless the thread has it.
    here: Option<Box<QueuePair>>,
    /// The TAP's queue that the thread may be blocked on, while it has the pair.
    tap: Option<Arc<TapQueue>>,
    /// The thread has not given the pair back in time, and is not waited for any more.
    lost: bool,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// A parked worker for `pair`; if its thread fails, `failures` is told.
    ///
    /// # Errors
    /// What making an eventfd fails with.
    pub fn new(index: u16, pair: QueuePair, failures: EventSender<WorkerFailure>) -> io::Result<Self> {
        interrupt::install()?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let events = pair.events();
        // Told of each time that it is written to, and so never read.
        events.add(&wake, Events::EPOLLIN | Events::EPOLLET, WAKE)?;
        let failures = Failures::new(failures, index);
        let shared = Shared { gate: Gate::new(Bell(wake)), failures, events };
        Ok(Self {
            here: Some(Box::new(pair)),
            tap: None,
            lost: false,
            shared: Arc::new(shared),
            thread: None,
        })
    }

    /// Has the thread stop at its next batch boundary, without waiting for that: where several are to be parked, all
    /// stop at the same time.
    pub fn close(&self) {
        if self.here.is_none() {
            self.shared.gate.close();
        }
    }

    /// Stops the thread at a batch boundary and gives the pair, which stays here until [`Self::resume`]. `None` if the
    /// thread died, which the event loop has been told, or does not stop.
    pub fn park(&mut self) -> Option<&mut QueuePair> {
        if self.here.is_none() && !self.lost {
            self.here = self.take_back(END_OF_PATIENCE);
            self.lost = self.here.is_none();
            // A TAP that goes to another process has its descriptors closed with it.
            self.tap = None;
        }
        self.here.as_deref_mut()
    }

    fn take_back(&self, end: Duration) -> Option<Box<QueuePair>> {
        let since = Instant::now();
        self.shared.gate.take_back(PATIENCE, |pause| {
            if since.elapsed() >= end {
                tracing::error!(pair = self.shared.failures.pair, "the worker does not stop");
                return None;
            }
            self.interrupt();
            Some(LONGEST.min(2 * pause))
        })
    }

    /// Ends the call that blocks the thread, if one does. A peer that shares the open file can make any call block: on a
    /// full call or error eventfd, or on the TAP where the kernel takes no `RWF_NOWAIT`.
    fn interrupt(&self) {
        if let Some(tap) = &self.tap {
            tap.set_nonblocking();
        }
        if let Some(thread) = &self.thread {
            interrupt::interrupt(thread);
        }
    }

    /// Gives the pair to the thread, if there is anything to do for it.
    ///
    /// # Errors
    /// What making a thread fails with; the pair stays here.
    pub fn resume(&mut self) -> io::Result<()> {
        let Some(pair) = &self.here else { return Ok(()) };
        if !pair.has_rings() {
            return Ok(());
        }
        self.make_thread()?;
        if let Some(pair) = self.hand_out() {
            self.shared.gate.give(pair);
        }
        Ok(())
    }

    /// The pair on its way to the thread.
    fn hand_out(&mut self) -> Option<Box<QueuePair>> {
        let pair = self.here.take()?;
        self.tap.clone_from(&pair.tap);
        // A peer that held the TAP meanwhile may have cleared it.
        if let Some(tap) = &self.tap {
            tap.set_nonblocking();
        }
        self.shared.gate.open();
        Some(pair)
    }

    /// Whether the thread waits for an event, and has heard none while the pair was here.
    pub fn listens(&self) -> bool {
        self.shared.gate.is_listening()
    }

    /// As [`Self::resume`], for a pair whose TAP had nothing to read since [`Self::listens`] was true: where its rings have
    /// nothing either, the thread is not woken until an event comes. Calls that are due wait as long, or until
    /// [`Self::nudge`].
    ///
    /// # Errors
    /// Those of [`Self::resume`].
    pub fn resume_idle(&mut self) -> io::Result<()> {
        if !self.here.as_mut().is_some_and(|pair| pair.is_idle()) {
            return self.resume();
        }
        if let Some(pair) = self.hand_out() {
            self.shared.gate.lay_down(pair);
        }
        Ok(())
    }

    /// Has the thread make the calls that are due.
    pub fn nudge(&self) {
        self.shared.gate.nudge();
    }

    /// Waits until the thread has begun with the pair that it was given, if it was woken for that. No longer than until
    /// `deadline`.
    pub fn wait_begun(&self, deadline: Instant) {
        self.shared.gate.wait_begun(until(deadline));
    }

    /// Waits until the thread, if there is one, [listens](Self::listens) or has done so. No longer than until `deadline`.
    pub fn wait_listens(&self, deadline: Instant) {
        if self.thread.is_some() {
            self.shared.gate.wait_listening(until(deadline));
        }
    }

    /// Makes the thread, if there is none yet: it waits.
    ///
    /// # Errors
    /// What making a thread fails with.
    pub fn make_thread(&mut self) -> io::Result<()> {
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let name = format!("pair{}", shared.failures.pair);
            self.thread = Some(std::thread::Builder::new().name(name).spawn(move || work(&shared))?);
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.park();
        if let Some(thread) = self.thread.take()
            && !self.lost
        {
            self.shared.gate.end();
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Arc<Shared>) {
    let _guard = PanicGuard(Arc::clone(shared));
    interrupt::allow();
    let gate = &shared.gate;
    let mut ready = Ready::<4>::default();
    let mut held: Option<Box<QueuePair>> = None;
    // What there is to hear at first is not news: each new watch tells of kicks that came long ago. What makes the wait fail
    // does so again, where it is seen to.
    drop(shared.events.wait(0, &mut ready));
    if !gate.listen() {
        match pick_up(gate) {
            Some(pair) => held = Some(pair),
            None => return,
        }
    }
    loop {
        let mut timeout = -1;
        if let Some(mut pair) = held.take() {
            // Before any frame, so that whoever sees one has been called before; but a call that may take as long as the
            // front-end likes comes after the frames.
            pair.make_calls(Notifier::has_room);
            // It must not spin on what fails, nor end unseen: it gives the pair back, and the event loop was told.
            let turn = if gate.is_closed() { None } else { pair.turn(&shared.failures) };
            pair.make_calls(|_| true);
            timeout = turn.unwrap_or(-1);
            match turn {
                None => {
                    pair.leave(&shared.failures);
                    gate.park(pair);
                }
                Some(timeout) if timeout == 0 || pair.runs_in_kernel() => held = Some(pair),
                Some(_) => gate.wait_with(pair),
            }
        }
        let events = match shared.events.wait(timeout, &mut ready) {
            Ok(events) => events,
            Err(error) => {
                // Only a bug makes this fail.
                shared.failures.report(&error);
                gate.die();
                return;
            }
        };
        if held.is_none() {
            match pick_up(gate) {
                Some(pair) => held = Some(pair),
                None => return,
            }
        }
        if let Some(pair) = &mut held {
            for (token, events) in events {
                pair.hear(token, events);
            }
        }
    }
}

fn pick_up(gate: &Gate<Box<QueuePair>, Bell>) -> Option<Box<QueuePair>> {
    let (mut pair, begins) = gate.pick_up()?;
    if begins {
        pair.begin();
    }
    Some(pair)
}

/// How much time is left until `deadline`.
fn until(deadline: Instant) -> impl FnMut() -> Option<Duration> {
    move || Some(deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixDatagram;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::dataplane::ring::{Kick, Ring, Side};
    use crate::event_channel::event_channel;
    use crate::memory::{GuestMemory, RegionLayout};
    use crate::metrics::PairCounters;
    use crate::vring::{RingAddresses, Vring, VringLayout};

    const LONG: Duration = Duration::from_secs(30);
    /// `VIRTQ_DESC_F_WRITE`.
    const WRITABLE: u16 = 2;

    /// A ring of 8 in memory of its own, with this many buffers available: descriptor 0 has 2048 bytes.
    fn ring(kick: EventFd, available: u16) -> Ring {
        let memory = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(0x4000).unwrap();
        let mut descriptor = 0x3000u64.to_le_bytes().to_vec();
        descriptor.extend(2048u32.to_le_bytes());
        descriptor.extend(WRITABLE.to_le_bytes());
        memory.write_all_at(&descriptor, 0).unwrap();
        memory.write_all_at(&available.to_le_bytes(), 0x1002).unwrap();
        let layout = RegionLayout { guest_address: 0, size: 0x4000, user_address: 0, file_offset: 0 };
        let memory = GuestMemory::map([(layout, memory)]).unwrap();
        let addresses = RingAddresses { descriptors: 0, available: 0x1000, used: 0x2000 };
        let layout = VringLayout { size: 8, addresses, event_idx: false, indirect: false };
        Ring {
            vring: Vring::new(layout, Arc::new(memory), None).unwrap(),
            kick: Kick::Eventfd(File::from(OwnedFd::from(kick)).try_into().unwrap()),
            error: None,
            call_due: false,
            held: false,
            enabled: true,
            broken: false,
        }
    }

    fn eventfd() -> EventFd {
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
    }

    fn clear_flags(file: &impl AsFd) {
        fcntl(file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    }

    /// A worker that receives and whose TAP, a socket here, blocks whenever it is looked at: the peer never leaves the
    /// flag alone.
    fn parks_though_a_peer_clears_the_flag(as_queue: impl Fn(File) -> TapQueue) {
        for _ in 0..20 {
            let (near, _far) = UnixDatagram::pair().unwrap();
            let peer = near.try_clone().unwrap();
            let mut pair =
                QueuePair::new(0, None, Arc::new(PairCounters::default()), Duration::ZERO).unwrap();
            pair.put_ring(Side::Rx, ring(eventfd(), 1)).unwrap();
            pair.attach(&Arc::new(as_queue(File::from(OwnedFd::from(near))))).unwrap();
            let (mailer, _news) = event_channel().unwrap();
            let mut worker = Worker::new(0, pair, mailer).unwrap();
            let end = AtomicBool::new(false);
            std::thread::scope(|scope| {
                clear_flags(&peer);
                scope.spawn(|| {
                    while !end.load(Ordering::Relaxed) {
                        clear_flags(&peer);
                    }
                });
                worker.resume().unwrap();
                worker.wait_begun(Instant::now() + LONG);
                let parked = worker.park().is_some();
                end.store(true, Ordering::Relaxed);
                assert!(parked, "the worker is held up");
            });
        }
    }

    #[test]
    fn a_worker_parks_though_a_peer_clears_the_taps_flag() {
        parks_though_a_peer_clears_the_flag(TapQueue::new);
    }

    #[test]
    fn a_worker_parks_though_a_peer_clears_the_taps_flag_on_a_kernel_without_nowait() {
        parks_though_a_peer_clears_the_flag(|file| TapQueue::new(file).without_nowait());
    }

    #[test]
    fn a_worker_that_nothing_interrupts_is_given_up() {
        let (mailer, _news) = event_channel().unwrap();
        let pair = QueuePair::new(0, None, Arc::new(PairCounters::default()), Duration::ZERO).unwrap();
        let mut worker = Worker::new(0, pair, mailer).unwrap();
        // As if a thread had it.
        worker.here = None;
        assert!(worker.take_back(PATIENCE).is_none());
        worker.lost = true;
        assert!(worker.park().is_none());
    }
}
