//! Yields the processor during long work that nothing waits for, so that the workers' threads can move frames.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// The longest that a thread on the same processor waits.
const INTERVAL: Duration = Duration::from_micros(100);

thread_local! {
    /// When this thread yielded last.
    static LAST: Cell<Instant> = Cell::new(Instant::now());
}

/// Yields if the last time was long ago. To be called between the small steps of such work.
pub fn yield_if_due() {
    if LAST.get().elapsed() >= INTERVAL {
        thread::yield_now();
        LAST.set(Instant::now());
    }
}
