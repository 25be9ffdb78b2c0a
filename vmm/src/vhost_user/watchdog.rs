//! Shuts down a connection whose back-end takes too long to reply.
//!
//! The `vhost` crate waits for a reply without limit. A back-end that is stopped or stuck, or that has not accepted the
//! connection because it serves another front-end, would block the worker, and with it a vCPU, for ever. One thread per
//! connection shuts down the connection when that happens, which ends the wait with an error.
//!
//! ```text
//!         watch                  time is up
//! Idle ──────────▶ Waiting ───────────────────▶ TimedOut
//!      ◀──────────
//!       Watch dropped
//! ```

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No reply is awaited.
    Idle,
    /// A reply is awaited until this time.
    Waiting(Instant),
    /// No reply arrived in time: the connection is shut down.
    TimedOut,
    /// The connection is closed.
    Ended,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, unless it is final.
    fn enter(&self, next: State) {
        let mut state = self.lock();
        if matches!(*state, State::Idle | State::Waiting(_)) {
            *state = next;
            self.changed.notify_all();
        }
    }
}

/// Watches over one connection.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    timeout: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the watchdog of `connection`. A reply may take as long as `timeout`.
    pub fn start(connection: UnixStream, timeout: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::new(State::Idle), changed: Condvar::new() });
        let thread = {
            let shared = Arc::clone(&shared);
            Builder::new().name("watchdog".to_owned()).spawn(move || keep_watch(&shared, &connection))?
        };
        Ok(Self { shared, timeout, thread: Some(thread) })
    }

    /// Starts the timeout, which stops when the returned [`Watch`] is dropped.
    pub fn watch(&self) -> Watch {
        self.shared.enter(State::Waiting(Instant::now() + self.timeout));
        Watch(Arc::clone(&self.shared))
    }

    /// Returns whether a reply did not arrive in time.
    pub fn timed_out(&self) -> bool {
        *self.shared.lock() == State::TimedOut
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.enter(State::Ended);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a connection's watchdog panicked");
        }
    }
}

/// A reply is awaited until this is dropped.
#[derive(Debug)]
pub struct Watch(Arc<Shared>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.enter(State::Idle);
    }
}

fn keep_watch(shared: &Shared, connection: &UnixStream) {
    let mut state = shared.lock();
    loop {
        state = match *state {
            State::Idle => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            State::Waiting(until) => match until.checked_duration_since(Instant::now()) {
                Some(rest) if !rest.is_zero() => {
                    shared.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
                }
                _ => {
                    *state = State::TimedOut;
                    state
                }
            },
            State::TimedOut => {
                // Fails if the peer has closed the connection; then the wait is over, too.
                let _ = connection.shutdown(Shutdown::Both);
                return;
            }
            State::Ended => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    const LONG: Duration = Duration::from_secs(600);

    fn watched(timeout: Duration) -> (UnixStream, UnixStream, Watchdog) {
        let (here, there) = UnixStream::pair().unwrap();
        let watchdog = Watchdog::start(here.try_clone().unwrap(), timeout).unwrap();
        (here, there, watchdog)
    }

    #[test]
    fn silent_connection_is_shut_down() {
        let (mut here, _there, watchdog) = watched(Duration::from_millis(10));
        let watch = watchdog.watch();
        assert_eq!(here.read(&mut [0]).unwrap(), 0);
        drop(watch);
        assert!(watchdog.timed_out());
    }

    #[test]
    fn replies_in_time_keep_the_connection_open() {
        let (mut here, mut there, watchdog) = watched(LONG);
        for _ in 0..3 {
            let _watch = watchdog.watch();
            there.write_all(&[1]).unwrap();
            here.read_exact(&mut [0]).unwrap();
        }
        assert_eq!(*watchdog.shared.lock(), State::Idle);
        assert!(!watchdog.timed_out());
    }

    #[test]
    fn dropping_the_watchdog_ends_it_during_a_wait() {
        let (_here, _there, watchdog) = watched(LONG);
        let watch = watchdog.watch();
        drop(watchdog);
        drop(watch);
    }
}
