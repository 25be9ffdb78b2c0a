//! Waits for a process that was killed. The kernel takes a moment to close its files, and until then its TAP and its
//! sockets are in use.

use std::thread;
use std::time::{Duration, Instant};

/// How long a process that was killed may take to go.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often to look. Nothing tells of a TAP or of a listener that becomes free.
const INTERVAL: Duration = Duration::from_millis(10);

/// Makes an `attempt`, and makes it again for a second while it fails because something is `in_use`.
///
/// # Errors
/// That of the last attempt.
pub fn outlast<T, E>(mut attempt: impl FnMut() -> Result<T, E>, in_use: impl Fn(&E) -> bool) -> Result<T, E> {
    let began = Instant::now();
    loop {
        match attempt() {
            Err(error) if in_use(&error) && began.elapsed() < PATIENCE => thread::sleep(INTERVAL),
            result => return result,
        }
    }
}
