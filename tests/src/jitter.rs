//! Stops back-ends for short times, as a busy machine does, if [`VARIABLE`] is set. The outcome of a test must not
//! depend on when a back-end reads a message, or the ownership word that goes with it.
//!
//! Stops only processes that a test started, through their pidfds, and continues each after every stop.

use std::env;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::hostile::Random;
use crate::process;

/// The environment variable that enables jitter: the longest stop in milliseconds.
pub const VARIABLE: &str = "BATON_JITTER";

/// The longest time between two stops, in milliseconds.
const RUN: usize = 40;

/// The jitter of one process. Ends with the process.
#[derive(Debug)]
pub(crate) struct Jitter {
    /// Locked while the jitter has stopped the process; true while the test itself has stopped it.
    stopped: Arc<Mutex<bool>>,
}

impl Jitter {
    /// Starts the jitter if the environment variable is set.
    pub(crate) fn of(process: BorrowedFd<'_>) -> Result<Option<Self>> {
        let Ok(longest) = env::var(VARIABLE) else { return Ok(None) };
        let longest =
            longest.parse().with_context(|| format!("invalid {VARIABLE}={longest}: not a number"))?;
        Self::start(process, longest).map(Some)
    }

    fn start(process: BorrowedFd<'_>, longest: usize) -> Result<Self> {
        /// Gives each process of a test another seed.
        static SEED: AtomicU64 = AtomicU64::new(1);
        let process = process.try_clone_to_owned()?;
        let random =
            Random::seeded(u64::from(std::process::id()) << 16 | SEED.fetch_add(1, Ordering::Relaxed));
        let stopped = Arc::<Mutex<bool>>::default();
        let of_thread = Arc::clone(&stopped);
        Builder::new().name("jitter".to_owned()).spawn(move || run(&process, &of_thread, random, longest))?;
        Ok(Self { stopped })
    }

    /// Waits until the jitter lets the process run. It does so for as long as the guard lives. A test that stops the
    /// process itself sets the guard's value to true.
    pub(crate) fn hold(&self) -> MutexGuard<'_, bool> {
        locked(&self.stopped)
    }
}

fn locked(stopped: &Mutex<bool>) -> MutexGuard<'_, bool> {
    stopped.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stops and continues the process until it ends or cannot be signalled.
fn run(process: &OwnedFd, stopped: &Mutex<bool>, mut random: Random, longest: usize) {
    while !ended_within(process, random.below(RUN + 1)) {
        let by_test = locked(stopped);
        if *by_test {
            continue;
        }
        if process::send(process.as_fd(), Signal::SIGSTOP).is_err() {
            return;
        }
        // The product of four random fractions: many short stops, few long ones.
        let length = (0..4).fold(longest, |length, _| length * random.below(1001) / 1000);
        let ended = ended_within(process, length);
        let continued = process::send(process.as_fd(), Signal::SIGCONT);
        if ended || continued.is_err() {
            return;
        }
    }
}

/// Whether the process ends within this many milliseconds.
fn ended_within(process: &OwnedFd, milliseconds: usize) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let timeout = u16::try_from(milliseconds).map_or(PollTimeout::MAX, PollTimeout::from);
    match poll(&mut fds, timeout) {
        Ok(ready) => ready > 0,
        Err(Errno::EINTR) => false,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::process::{Process, is_stopped, until};

    #[test]
    fn a_process_is_stopped_briefly_and_never_while_the_test_holds_it() {
        let process = Process::start(Path::new("/bin/sleep"), &["1000".into()], &[]).unwrap();
        let jitter = Jitter::start(process.pidfd(), 10).unwrap();
        for _ in 0..20 {
            until("it was stopped", || is_stopped(process.pid())).unwrap();
            let held = jitter.hold();
            assert!(!is_stopped(process.pid()).unwrap());
            drop(held);
        }
    }
}
