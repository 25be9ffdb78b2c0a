//! The gate between a worker's thread and its owner. It tracks which of them has the queue pair, and lets each wake the
//! other.
//!
//! The pair is with the owner, with the thread, or in the *slot* between them. Either side may take it from the slot:
//! the owner to park the worker, the thread to handle an event. A thread that wakes up and does not find the pair there
//! sleeps until the owner fills the slot.
//!
//! `backend/tests/gate_model.rs` runs this file under many interleavings. So the file takes its primitives from the
//! sibling module `sync`, and is generic over the pair `P` and over `W`, which ends the thread's wait for events.

use std::sync::PoisonError;
use std::time::Duration;

use super::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering};

/// Ends the thread's wait for events.
pub trait Wake {
    /// Ends this wait, or the next one.
    fn wake(&self);
}

/// The slot between thread and owner.
#[derive(Debug)]
enum Slot<P> {
    /// The owner has the pair, or the thread has it and works.
    Empty,
    /// The owner has given the pair to the thread, which starts with it.
    Run(P),
    /// The thread waits for events and takes the pair back when one arrives.
    Waiting(P),
    /// The thread has given the pair back.
    Parked(P),
    /// The owner has asked the thread to end.
    End,
    /// The thread ended by itself, and the pair is lost.
    Dead,
}

/// What the thread does while it does not have the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    /// It does not listen yet, and ignores the initial event of each new registration.
    Starting,
    /// It waits for an event.
    Listening,
    /// An event arrived while the pair was not in the slot. The thread sees no further event until the owner wakes it.
    Asleep,
}

#[derive(Debug)]
struct State<P> {
    slot: Slot<P>,
    thread: Thread,
    /// The owner waits in [`Gate::wait_begun`] or [`Gate::wait_listening`].
    awaited: bool,
}

/// The gate. Closed, it stops the thread at its next batch boundary.
#[derive(Debug)]
pub struct Gate<P, W> {
    closed: AtomicBool,
    state: Mutex<State<P>>,
    /// Wakes the owner: the slot or the thread's state has changed.
    changed: Condvar,
    /// Wakes the thread while it is asleep.
    wanted: Condvar,
    wake: W,
}

impl<P, W: Wake> Gate<P, W> {
    /// Creates a closed gate. The owner has the pair.
    pub fn new(wake: W) -> Self {
        let state = State { slot: Slot::Empty, thread: Thread::Starting, awaited: false };
        Self {
            closed: AtomicBool::new(true),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wanted: Condvar::new(),
            wake,
        }
    }

    fn state(&self) -> MutexGuard<'_, State<P>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the thread must park.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    // The owner's side.

    /// Opens the gate. The owner then passes the pair with [`Self::give`] or [`Self::lay_down`].
    pub fn open(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    /// Closes the gate, so that the thread stops at its next batch boundary. Does not wait for it to stop.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        if matches!(self.state().slot, Slot::Empty) {
            // The thread works, or waits while the kernel works on its rings.
            self.wake.wake();
        }
    }

    /// Gives the pair to the thread and wakes it.
    pub fn give(&self, pair: P) {
        self.fill(Slot::Run(pair));
    }

    /// Puts a pair without work into the slot of a listening thread, which takes it at the next event. If the thread
    /// does not listen, acts like [`Self::give`].
    pub fn lay_down(&self, pair: P) {
        let mut state = self.state();
        if state.thread == Thread::Listening {
            state.slot = Slot::Waiting(pair);
        } else {
            drop(state);
            self.give(pair);
        }
    }

    /// Tells the thread to end.
    pub fn end(&self) {
        self.fill(Slot::End);
    }

    fn fill(&self, slot: Slot<P>) {
        let mut state = self.state();
        state.slot = slot;
        let thread = state.thread;
        drop(state);
        if thread == Thread::Asleep {
            self.wanted.notify_one();
        } else {
            self.wake.wake();
        }
    }

    /// Makes a thread that waits for events take a turn with its pair.
    pub fn nudge(&self) {
        if matches!(self.state().slot, Slot::Waiting(_)) {
            self.wake.wake();
        }
    }

    /// Closes the gate and waits until the thread gives the pair back. Calls `late` each time that `pause` elapses:
    /// `late` returns the next pause, or `None` to give up. Returns `None` if the thread died or `late` gave up.
    pub fn take_back(
        &self,
        mut pause: Duration,
        mut late: impl FnMut(Duration) -> Option<Duration>,
    ) -> Option<P> {
        self.close();
        let mut state = self.state();
        loop {
            match std::mem::replace(&mut state.slot, Slot::Empty) {
                Slot::Run(pair) | Slot::Waiting(pair) | Slot::Parked(pair) => return Some(pair),
                Slot::Dead => {
                    state.slot = Slot::Dead;
                    return None;
                }
                other => state.slot = other,
            }
            let (next, waited) =
                self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() {
                pause = late(pause)?;
            }
        }
    }

    /// Returns whether the thread waits for an event and has seen none while the owner had the pair.
    pub fn is_listening(&self) -> bool {
        self.state().thread == Thread::Listening
    }

    /// Waits until the thread has taken the pair that [`Self::give`] passed to it. Before each wait `left` returns the
    /// timeout, or `None` to give up.
    pub fn wait_begun(&self, left: impl FnMut() -> Option<Duration>) {
        self.wait_while(left, |state| matches!(state.slot, Slot::Run(_)));
    }

    /// Waits until the thread listens, or has listened before. `left` is as in [`Self::wait_begun`].
    pub fn wait_listening(&self, left: impl FnMut() -> Option<Duration>) {
        self.wait_while(left, |state| state.thread == Thread::Starting);
    }

    fn wait_while(&self, mut left: impl FnMut() -> Option<Duration>, condition: impl Fn(&State<P>) -> bool) {
        let mut state = self.state();
        while condition(&state) {
            let Some(left) = left() else { return };
            state.awaited = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    // The thread's side.

    /// Begins to listen. Returns `false` if the owner has already filled the slot.
    pub fn listen(&self) -> bool {
        let mut state = self.state();
        state.thread = Thread::Listening;
        if std::mem::take(&mut state.awaited) {
            self.changed.notify_all();
        }
        matches!(state.slot, Slot::Empty)
    }

    /// Puts the pair into the slot while the thread waits for events. Thread or owner may take it from there.
    pub fn wait_with(&self, pair: P) {
        self.put_down(Slot::Waiting(pair));
    }

    /// Gives the pair back to the owner.
    pub fn park(&self, pair: P) {
        self.put_down(Slot::Parked(pair));
    }

    fn put_down(&self, slot: Slot<P>) {
        self.state().slot = slot;
        if self.is_closed() {
            self.changed.notify_all();
        }
    }

    /// Reports that the thread cannot continue. The pair is lost.
    pub fn die(&self) {
        self.state().slot = Slot::Dead;
        self.changed.notify_all();
    }

    /// Takes the pair from the slot, and returns it with whether it is a new start ([`Self::give`]). Sleeps while the
    /// slot has no pair for the thread, since events concern only the holder. Returns `None` if the thread must end.
    pub fn pick_up(&self) -> Option<(P, bool)> {
        let mut state = self.state();
        loop {
            match std::mem::replace(&mut state.slot, Slot::Empty) {
                Slot::Run(pair) => {
                    let awaited = std::mem::take(&mut state.awaited);
                    drop(state);
                    if awaited {
                        self.changed.notify_all();
                    }
                    return Some((pair, true));
                }
                Slot::Waiting(pair) if !self.is_closed() => return Some((pair, false)),
                Slot::End => return None,
                other => state.slot = other,
            }
            state.thread = Thread::Asleep;
            state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.thread = Thread::Listening;
        }
    }
}
