//! A worker thread, and its owner's side of the [gate](super::gate) at which it parks.
//!
//! A queue pair is in exactly one place: with the owner of its [`Worker`], with the thread, or, while the thread waits
//! for events, in the slot of the gate, where either can take it. [`Worker::park`] takes the pair back: at once from a
//! thread that waits, at the next batch boundary from one that works. So the holder of the pair is the only one that
//! reads the TAP's queue and touches the rings. The thread is created when it is first needed, or beforehand
//! ([`Worker::make_thread`]).
//!
//! ```text
//!   owner: Here(pair) ──resume──▶ Run(pair) ──thread wakes──▶ thread works ──nothing to do──▶ Waiting(pair)
//!                                    │                          │   ▲──────────event────────────┘ │
//!                                    │                     gate closed: Parked(pair)              │
//!          Here(pair) ◀─park─────────┴──────────────────────────┴─────────────────────────────────┘
//!                                 turn fails ──▶ Parked(pair), reported to the event loop
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
use crate::args::IoUring;
use crate::event_channel::EventSender;
use crate::events::{Epoll, Events, Ready};
use crate::notify::Notifier;
use crate::tap::TapQueue;
use crate::tap::batch::BatchWriter;

/// How long a worker may take to park before it is interrupted. Each interrupt ends one blocking call. The interval
/// doubles each time, so that a call that is merely slow can complete.
const PATIENCE: Duration = Duration::from_millis(1);

/// The longest time between two interrupts.
const LONGEST: Duration = Duration::from_millis(50);

/// How long a worker may take to park before it counts as lost. No signal ends what blocks it then, for example access
/// to a page of guest memory that the front-end does not provide.
const END_OF_PATIENCE: Duration = Duration::from_secs(10);

/// Ends a worker's wait for events.
#[derive(Debug)]
struct Bell(EventFd);

impl Wake for Bell {
    fn wake(&self) {
        // Fails only when the counter is full, after 2^64 writes.
        let _ = self.0.write(1);
    }
}

#[derive(Debug)]
struct Shared {
    gate: Gate<Box<QueuePair>, Bell>,
    failures: Failures,
    /// The epoll instance for the events of the pair and the bell.
    events: Arc<Epoll>,
    io_uring: IoUring,
}

/// Marks the gate as dead if the thread panics, so that the owner does not wait for ever.
struct PanicGuard(Arc<Shared>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.gate.die();
            self.0.failures.report(&io::Error::other("the worker thread panicked"));
        }
    }
}

/// The owner's side of a queue pair's worker.
#[derive(Debug)]
pub struct Worker {
    /// The pair, while the owner has it.
    here: Option<Box<QueuePair>>,
    /// The TAP's queue that the thread may block on while it has the pair.
    tap: Option<Arc<TapQueue>>,
    /// The thread did not give the pair back in time. The owner does not wait for it any more.
    lost: bool,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Creates a parked worker for `pair`, which may use `io_uring`. The worker reports failures of its thread to `failures`.
    ///
    /// # Errors
    /// Returns an error if the signal handler cannot be installed, or the eventfd cannot be created or watched.
    pub fn new(
        index: u16,
        pair: QueuePair,
        io_uring: IoUring,
        failures: EventSender<WorkerFailure>,
    ) -> io::Result<Self> {
        interrupt::install()?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let events = pair.events();
        // Edge-triggered: each write is an event, so the eventfd is never read.
        events.add(&wake, Events::EPOLLIN | Events::EPOLLET, WAKE)?;
        let failures = Failures::new(failures, index);
        let shared = Shared { gate: Gate::new(Bell(wake)), failures, events, io_uring };
        Ok(Self {
            here: Some(Box::new(pair)),
            tap: None,
            lost: false,
            shared: Arc::new(shared),
            thread: None,
        })
    }

    /// Tells the thread to stop at its next batch boundary, and does not wait. Closing several workers before parking
    /// them makes all of them stop at the same time.
    pub fn close(&self) {
        if self.here.is_none() {
            self.shared.gate.close();
        }
    }

    /// Stops the thread at a batch boundary and returns the pair, which stays with the owner until [`Self::resume`].
    /// Returns `None` if the thread has died, which it reports to the event loop, or if it does not stop.
    pub fn park(&mut self) -> Option<&mut QueuePair> {
        if self.here.is_none() && !self.lost {
            self.here = self.take_back(END_OF_PATIENCE);
            self.lost = self.here.is_none();
            // When the TAP goes to another process, no descriptor of it may stay open here.
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

    /// Ends the system call that the thread is blocked in, if any. A peer that shares the open file can make the thread
    /// block: on a full call or error eventfd, or on the TAP if the kernel does not support `RWF_NOWAIT`.
    fn interrupt(&self) {
        if let Some(tap) = &self.tap {
            tap.set_nonblocking();
        }
        if let Some(thread) = &self.thread {
            interrupt::interrupt(thread);
        }
    }

    /// Gives the pair to the thread, if it has a ring.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be created. The pair stays with the owner.
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

    /// Opens the gate and returns the pair for the thread.
    fn hand_out(&mut self) -> Option<Box<QueuePair>> {
        let pair = self.here.take()?;
        self.tap.clone_from(&pair.tap);
        // A peer that shares the TAP may have cleared the flag.
        if let Some(tap) = &self.tap {
            tap.set_nonblocking();
        }
        self.shared.gate.open();
        Some(pair)
    }

    /// Returns whether the thread waits for an event and has seen none while the owner had the pair.
    pub fn listens(&self) -> bool {
        self.shared.gate.is_listening()
    }

    /// Acts like [`Self::resume`] for a pair whose TAP has had nothing to read since [`Self::listens`] returned `true`.
    /// If its rings have no work either, the thread sleeps until an event. Due calls wait for that, or for
    /// [`Self::nudge`].
    ///
    /// # Errors
    /// As for [`Self::resume`].
    pub fn resume_idle(&mut self) -> io::Result<()> {
        if !self.here.as_mut().is_some_and(|pair| pair.is_idle()) {
            return self.resume();
        }
        if let Some(pair) = self.hand_out() {
            self.shared.gate.lay_down(pair);
        }
        Ok(())
    }

    /// Makes a thread that waits for events take a turn, in which it makes the due calls.
    pub fn nudge(&self) {
        self.shared.gate.nudge();
    }

    /// Waits until the thread has taken the pair that [`Self::resume`] gave to it, until `deadline` at most.
    pub fn wait_begun(&self, deadline: Instant) {
        self.shared.gate.wait_begun(until(deadline));
    }

    /// Waits until the thread, if there is one, [listens](Self::listens) or has listened before, until `deadline` at
    /// most.
    pub fn wait_listens(&self, deadline: Instant) {
        if self.thread.is_some() {
            self.shared.gate.wait_listening(until(deadline));
        }
    }

    /// Creates the thread, if there is none yet. It waits for the pair.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be created.
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
            // The panic guard has already reported a panic.
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
    let mut writer = BatchWriter::new(shared.io_uring);
    // Discard the initial events: each new registration reports old kicks. If this wait fails, so does the next one,
    // which handles the error.
    drop(shared.events.wait(0, &mut ready));
    if !gate.listen() {
        match pick_up(gate) {
            Some(pair) => held = Some(pair),
            None => return,
        }
    }
    loop {
        let mut timeout = -1;
        let mut sleeps = None;
        if let Some(mut pair) = held.take() {
            // Make due calls before moving frames, so that a driver that sees a frame has been called. A call that may
            // block, since the front-end filled its eventfd, comes after the frames.
            pair.make_calls(Notifier::has_room);
            // After a failure, which the turn reports to the event loop, the thread gives the pair back.
            let turn = if gate.is_closed() { None } else { pair.turn(&shared.failures, &mut writer) };
            pair.make_calls(|_| true);
            timeout = turn.unwrap_or(-1);
            match turn {
                None => {
                    pair.leave(&shared.failures);
                    gate.park(pair);
                }
                Some(timeout) if timeout == 0 || pair.runs_in_kernel() => held = Some(pair),
                Some(_) => {
                    sleeps = pair.polling.sleeps();
                    gate.wait_with(pair);
                }
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
            if let Some(before) = sleeps {
                pair.polling.slept(before);
            }
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

/// Returns a function that returns the time left until `deadline`, or `None` after it.
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
    use crate::dataplane::polling::PollTime;
    use crate::dataplane::ring::{Kick, Ring, Side};
    use crate::event_channel::event_channel;
    use crate::memory::{GuestMemory, RegionLayout};
    use crate::metrics::PairCounters;
    use crate::vring::{RingAddresses, Vring, VringLayout};

    const LONG: Duration = Duration::from_secs(30);
    /// `VIRTQ_DESC_F_WRITE`.
    const WRITABLE: u16 = 2;

    /// Creates a ring of 8 in its own memory, with `available` buffers available. Descriptor 0 has 2048 bytes.
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

    /// Parks a worker that receives from a TAP, here a socket, while a peer keeps clearing `O_NONBLOCK`, so that reads
    /// may block.
    fn check_parks_while_peer_clears_flag(as_queue: impl Fn(File) -> TapQueue) {
        for _ in 0..20 {
            let (near, _far) = UnixDatagram::pair().unwrap();
            let peer = near.try_clone().unwrap();
            let mut pair =
                QueuePair::new(0, None, Arc::new(PairCounters::default()), PollTime::default()).unwrap();
            pair.put_ring(Side::Rx, ring(eventfd(), 1)).unwrap();
            pair.attach(&Arc::new(as_queue(File::from(OwnedFd::from(near))))).unwrap();
            let (mailer, _news) = event_channel().unwrap();
            let mut worker = Worker::new(0, pair, IoUring::Auto, mailer).unwrap();
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
                assert!(parked, "the worker did not park");
            });
        }
    }

    #[test]
    fn worker_parks_while_peer_clears_nonblock_flag() {
        check_parks_while_peer_clears_flag(TapQueue::new);
    }

    #[test]
    fn worker_parks_while_peer_clears_nonblock_flag_without_rwf_nowait() {
        check_parks_while_peer_clears_flag(|file| TapQueue::new(file).without_nowait());
    }

    #[test]
    fn worker_that_does_not_park_is_given_up() {
        let (mailer, _news) = event_channel().unwrap();
        let pair = QueuePair::new(0, None, Arc::new(PairCounters::default()), PollTime::default()).unwrap();
        let mut worker = Worker::new(0, pair, IoUring::Auto, mailer).unwrap();
        // As if a thread had the pair.
        worker.here = None;
        assert!(worker.take_back(PATIENCE).is_none());
        worker.lost = true;
        assert!(worker.park().is_none());
    }
}
