//! The dataplane: one worker thread per queue pair moves frames directly between guest memory and the TAP. With
//! vhost-net the kernel moves them, and the worker does what the kernel cannot ([`vhost`]).
//!
//! [`worker`] owns the threads and [`gate`] is where they park. [`pair`] holds everything that a worker works on; the
//! worker gives it back whole when it parks. [`interrupt`] ends a system call that blocks a worker. [`rx`] and [`tx`]
//! move the frames. [`polling`] decides when a worker
//! polls before it sleeps. [`buffers`] keeps the guest's receive buffers ready, and [`chain`] turns descriptor chains into I/O
//! vectors.

#[cfg(test)]
mod allocations;
pub mod buffers;
pub mod chain;
pub mod failures;
pub mod gate;
pub mod interrupt;
pub mod pair;
pub mod polling;
pub mod ring;
pub mod rx;
pub mod tx;
pub mod vhost;
pub mod worker;

/// The synchronisation primitives of [`gate`]. Its model test substitutes others.
mod sync {
    pub use std::sync::atomic::{AtomicBool, Ordering};
    pub use std::sync::{Condvar, Mutex, MutexGuard};
}

/// The most frames that a direction completes before it publishes them, except in [`pair::QueuePair::receive_last`].
const BATCH: u16 = 64;
/// Frames after which the other direction gets its turn.
const TURN_FRAMES: u32 = 256;
/// Bytes after which the other direction gets its turn.
const TURN_BYTES: usize = 512 * 1024;

/// How a direction's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do.
    More,
    /// The turn did some work, and there is nothing more to do until the next event.
    Done,
    /// There was nothing to do, and there is nothing to do until the next event.
    Idle,
    /// There is more to do once the TAP is writable.
    Full,
}

impl Turn {
    /// Returns how a turn ends that has run out of work.
    fn ended(worked: bool) -> Self {
        if worked { Self::Done } else { Self::Idle }
    }
}
