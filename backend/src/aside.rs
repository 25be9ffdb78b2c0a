//! Long work that nobody is in a hurry for, beside threads that move frames.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// How long others wait at most where there is but one processor.
const TURN: Duration = Duration::from_micros(100);

thread_local! {
    /// When this thread stepped aside last.
    static LAST: Cell<Instant> = Cell::new(Instant::now());
}

/// Lets other threads have the processor if it has been a while since: to be called between the small steps of such work.
pub fn step_aside() {
    if LAST.get().elapsed() >= TURN {
        thread::yield_now();
        LAST.set(Instant::now());
    }
}
