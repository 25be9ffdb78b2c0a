//! Waits until a process that was killed is gone: the kernel takes a moment to close its files, and until then its TAP
//! and its sockets are in use.

use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel may take to close a killed process' files.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait between attempts: the kernel does not signal that a TAP or a listener becomes free.
const INTERVAL: Duration = Duration::from_millis(10);

/// Makes an `attempt`, and repeats it for up to a second while it fails because something is `in_use`.
///
/// # Errors
/// That of the last attempt.
pub fn retry_while_in_use<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    in_use: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let began = Instant::now();
    loop {
        match attempt() {
            Err(error) if in_use(&error) && began.elapsed() < PATIENCE => thread::sleep(INTERVAL),
            result => return result,
        }
    }
}
