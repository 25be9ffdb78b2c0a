//! Retries while a killed process is still being torn down: its TAP and its sockets stay in use until the kernel has
//! closed its files.

use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel may take to close a killed process' files.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait between attempts. The kernel does not notify of a TAP or a listener that becomes free.
const INTERVAL: Duration = Duration::from_millis(10);

/// Calls `attempt`, and repeats it for up to a second while it fails with an error for which `in_use` is true.
///
/// # Errors
/// Returns the error of the last attempt.
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
