//! Yields the processor during long work without a deadline, so that the worker threads can move frames.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread on the same processor waits at most.
const INTERVAL: Duration = Duration::from_micros(100);

thread_local! {
    /// When this thread last yielded.
    static LAST: Cell<Instant> = Cell::new(Instant::now());
}

/// Yields unless this thread yielded less than 100 µs ago. Call this between small steps of such work.
pub fn yield_if_due() {
    if LAST.get().elapsed() >= INTERVAL {
        thread::yield_now();
        LAST.set(Instant::now());
    }
}
