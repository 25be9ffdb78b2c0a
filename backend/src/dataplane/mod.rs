//! The dataplane: one worker thread a queue pair, straight between guest memory and the TAP; or the kernel, and a
//! worker for what it leaves to do ([`vhost`]).
//!
//! [`worker`] owns the threads, [`gate`] is where they park; [`pair`] is what a worker works on, handed over whole whenever
//! it parks; [`interrupt`] ends the call that one blocks in; [`rx`] and [`tx`] move the frames; [`buffers`] has the
//! guest's receive buffers ready; [`chain`] makes I/O vectors of descriptor chains.

pub mod buffers;
pub mod chain;
pub mod failures;
pub mod gate;
pub mod interrupt;
pub mod pair;
pub mod ring;
pub mod rx;
pub mod tx;
pub mod vhost;
pub mod worker;

/// What [`gate`] is made of.
mod sync {
    pub use std::sync::atomic::{AtomicBool, Ordering};
    pub use std::sync::{Condvar, Mutex, MutexGuard};
}

/// Frames after which a direction publishes what it completed.
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
    /// Something was done, and there is nothing more to do until an event comes.
    Done,
    /// Nothing was to be done, nor is until an event comes.
    Idle,
    /// There is more to do once the TAP is writable.
    Full,
}

impl Turn {
    /// A turn that ends for want of anything to do.
    fn ended(worked: bool) -> Self {
        if worked { Self::Done } else { Self::Idle }
    }
}
