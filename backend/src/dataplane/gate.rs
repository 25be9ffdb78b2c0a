//! The gate between a worker's thread and its owner: where the queue pair is, and how each wakes the other.
//!
//! The pair is with the owner, with the thread, or in the *slot* between them. Either may take it from there: the owner
//! when it parks the worker, the thread when an event comes. A thread that finds the pair elsewhere falls asleep until the
//! owner gives it something. `backend/tests/gate_model.rs` runs this file under many orders of its steps, so it uses the
//! primitives of the module `sync` beside it, and is generic over the pair `P` and over what ends the thread's wait for
//! events, `W`.

use std::sync::PoisonError;
use std::time::Duration;

use super::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering};

/// Ends the thread's wait for events.
pub trait Wake {
    /// Ends this wait, or the next one.
    fn wake(&self);
}

/// Where the pair is, as far as thread and owner share it.
#[derive(Debug)]
enum Slot<P> {
    /// With the owner, or with the thread, which works.
    Empty,
    /// For the thread to begin with.
    Run(P),
    /// The thread waits for events, and goes on with it when one comes.
    Waiting(P),
    /// Given back by the thread.
    Parked(P),
    /// The thread is to end.
    End,
    /// The thread ended by itself, the pair lost.
    Dead,
}

/// What a thread without the pair does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    /// It has not begun to listen, and ignores the events that each new registration brings.
    Starting,
    /// It waits for an event. Every event finds it so, or asleep.
    Listening,
    /// An event came while the pair was elsewhere. It sees no other until the owner wakes it.
    Asleep,
}

#[derive(Debug)]
struct State<P> {
    slot: Slot<P>,
    thread: Thread,
    /// The owner waits until the thread has begun, or listens.
    awaited: bool,
}

/// The gate. Closed, it stops the thread at its next batch boundary.
#[derive(Debug)]
pub struct Gate<P, W> {
    closed: AtomicBool,
    state: Mutex<State<P>>,
    /// For the owner: the slot has changed.
    changed: Condvar,
    /// For the thread, which is asleep.
    wanted: Condvar,
    wake: W,
}

impl<P, W: Wake> Gate<P, W> {
    /// A closed gate; the pair is with the owner.
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

    /// Whether the thread is to park.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    // The owner's side.

    /// Opens the gate; the pair follows with [`Self::give`] or [`Self::lay_down`].
    pub fn open(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    /// Closes the gate: the thread stops at its next batch boundary. Does not wait for that.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        if matches!(self.state().slot, Slot::Empty) {
            // It works, or waits for what the kernel does.
            self.wake.wake();
        }
    }

    /// Gives the thread the pair to begin with.
    pub fn give(&self, pair: P) {
        self.fill(Slot::Run(pair));
    }

    /// Gives the thread a pair that has nothing to do, if it listens: then only an event makes it go on. Else as
    /// [`Self::give`].
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

    /// Makes a thread that waits for events look at its pair.
    pub fn nudge(&self) {
        if matches!(self.state().slot, Slot::Waiting(_)) {
            self.wake.wake();
        }
    }

    /// Takes the pair back; `None` if the thread ended by itself. Waits until the thread gives it back, and calls `late`
    /// after each `pause` that it does not, which gives the next pause or, with `None`, gives up.
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

    /// Whether the thread waits for an event, and has seen none while the pair was with the owner.
    pub fn is_listening(&self) -> bool {
        self.state().thread == Thread::Listening
    }

    /// Waits until the thread has begun with the pair that it was given, if it was woken for that. Each wait takes what
    /// `left` gives, until that is `None`.
    pub fn wait_begun(&self, left: impl FnMut() -> Option<Duration>) {
        self.wait_while(left, |state| matches!(state.slot, Slot::Run(_)));
    }

    /// Waits until the thread listens, or has done so. Otherwise as [`Self::wait_begun`].
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

    /// Begins to listen. False if the thread is wanted already.
    pub fn listen(&self) -> bool {
        let mut state = self.state();
        state.thread = Thread::Listening;
        if std::mem::take(&mut state.awaited) {
            self.changed.notify_all();
        }
        matches!(state.slot, Slot::Empty)
    }

    /// Lays the pair down while the thread waits for events: whichever comes first goes on with it.
    pub fn wait_with(&self, pair: P) {
        self.put_down(Slot::Waiting(pair));
    }

    /// Gives the pair back.
    pub fn park(&self, pair: P) {
        self.put_down(Slot::Parked(pair));
    }

    fn put_down(&self, slot: Slot<P>) {
        self.state().slot = slot;
        if self.is_closed() {
            self.changed.notify_all();
        }
    }

    /// Reports that the thread cannot go on: the pair is lost.
    pub fn die(&self) {
        self.state().slot = Slot::Dead;
        self.changed.notify_all();
    }

    /// The pair, if it is the thread's to go on with, and whether the thread begins with it; else sleeps until it is, since
    /// events concern the holder of the pair. `None`: the thread is to end.
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
