//! A worker thread and the gate at which it parks.
//!
//! A queue pair is in exactly one place: with its [`Worker`]'s owner, or with the thread. [`Worker::park`] asks for
//! it and returns when the thread has stopped at a batch boundary and given it back, so whoever holds the pair knows
//! that nobody else reads the TAP's queue or touches a ring. The thread is made when it is first needed.
//!
//! ```text
//!   owner: Here(pair) ──resume──▶ thread: Run(pair) ──park: gate closed, wake──▶ Parked(pair) ──▶ Here(pair)
//!                                 thread ends by an error ──▶ Failed(pair) ──▶ Here(pair), reported to the event loop
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::pair::QueuePair;
use crate::mailbox::Mailer;
use crate::notify::Notifier;

/// How long a worker may take to park before what could block it is cleared away.
const PATIENCE: Duration = Duration::from_millis(50);

/// Where the pair is, as far as the thread and its owner share it.
#[derive(Debug)]
enum Slot {
    /// The thread has nothing.
    Empty,
    /// For the thread to run.
    Run(Box<QueuePair>),
    /// Given back by the thread.
    Parked(Box<QueuePair>),
    /// The thread is to end.
    End,
    /// The thread ended by itself, the pair lost.
    Dead,
}

#[derive(Debug)]
struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
    gate: Gate,
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What stops a worker at its next batch boundary.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicBool,
    wake: EventFd,
    news: Mailer<WorkerNews>,
    pair: u16,
}

/// What the event loop hears of a worker.
#[derive(Debug)]
pub enum WorkerNews {
    /// It could not go on.
    Failed {
        /// Its queue pair.
        pair: u16,
        /// Why.
        error: io::Error,
    },
    /// The driver has kicked a ring, and there is no TAP to work with.
    RingStarted {
        /// Its queue pair.
        pair: u16,
    },
}

impl Gate {
    /// Whether the worker is to park.
    #[inline]
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Tells the event loop that the worker cannot go on.
    pub fn report(&self, error: &io::Error) {
        let error = io::Error::new(error.kind(), error.to_string());
        // Without a receiver the process is ending.
        let _ = self.news.send(WorkerNews::Failed { pair: self.pair, error });
    }

    /// Tells the event loop that a ring has started without a TAP.
    pub(super) fn report_start(&self) {
        let _ = self.news.send(WorkerNews::RingStarted { pair: self.pair });
    }
}

/// The thread's end if it panics: the owner must not wait for ever.
struct LastWord(Arc<Shared>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            *self.0.slot() = Slot::Dead;
            self.0.changed.notify_all();
            self.0.gate.report(&io::Error::other("the worker thread panicked"));
        }
    }
}

/// A queue pair's worker, from its owner's side.
#[derive(Debug)]
pub struct Worker {
    /// The pair, unless the thread has it.
    here: Option<Box<QueuePair>>,
    /// Call and kick descriptors that the thread may be blocked on, while it has the pair.
    calls: Vec<Notifier>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// A parked worker for `pair`; what happens in its thread goes to `news`.
    ///
    /// # Errors
    /// What making an eventfd fails with.
    pub fn new(index: u16, pair: QueuePair, news: Mailer<WorkerNews>) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        pair.watch_wake(&wake)?;
        let gate = Gate { closed: AtomicBool::new(true), wake, news, pair: index };
        let shared = Shared { slot: Mutex::new(Slot::Empty), changed: Condvar::new(), gate };
        Ok(Self { here: Some(Box::new(pair)), calls: Vec::new(), shared: Arc::new(shared), thread: None })
    }

    /// Stops the thread at a batch boundary and gives the pair, which stays here until [`Self::resume`]. `None` if
    /// the thread died, which the event loop has been told.
    pub fn park(&mut self) -> Option<&mut QueuePair> {
        if self.here.is_none() {
            self.here = self.take_back();
            // A ring that is stopped now has its descriptors dropped with it.
            self.calls.clear();
        }
        self.here.as_deref_mut()
    }

    fn take_back(&self) -> Option<Box<QueuePair>> {
        let gate = &self.shared.gate;
        gate.closed.store(true, Ordering::Relaxed);
        // Fails only when the counter is full, and then the thread is awake.
        let _ = gate.wake.write(1);
        let mut slot = self.shared.slot();
        loop {
            match std::mem::replace(&mut *slot, Slot::Empty) {
                Slot::Parked(pair) => {
                    let _ = gate.wake.read();
                    return Some(pair);
                }
                Slot::Dead => {
                    *slot = Slot::Dead;
                    return None;
                }
                other => *slot = other,
            }
            let (next, waited) =
                self.shared.changed.wait_timeout(slot, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            slot = next;
            if waited.timed_out() {
                // A front-end's blocking eventfd may be full.
                self.calls.iter().for_each(Notifier::unblock_writer);
            }
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
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let name = format!("pair{}", shared.gate.pair);
            self.thread = Some(std::thread::Builder::new().name(name).spawn(move || work(&shared))?);
        }
        let Some(pair) = self.here.take() else { return Ok(()) };
        for ring in [&pair.rx.ring, &pair.tx.ring].into_iter().flatten() {
            self.calls.extend(ring.vring.call().cloned());
            self.calls.extend(ring.error.clone());
        }
        self.shared.gate.closed.store(false, Ordering::Relaxed);
        *self.shared.slot() = Slot::Run(pair);
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.park();
        if let Some(thread) = self.thread.take() {
            *self.shared.slot() = Slot::End;
            self.shared.changed.notify_all();
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Arc<Shared>) {
    let _last_word = LastWord(Arc::clone(shared));
    let mut slot = shared.slot();
    loop {
        match std::mem::replace(&mut *slot, Slot::Empty) {
            Slot::Run(mut pair) => {
                drop(slot);
                pair.run(&shared.gate);
                slot = shared.slot();
                *slot = Slot::Parked(pair);
                shared.changed.notify_all();
            }
            Slot::End => return,
            other => *slot = other,
        }
        slot = shared.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
    }
}
