//! Runs code as another user.
#![expect(unsafe_code, reason = "changes the user of a single thread")]

use std::thread;

use anyhow::{Result, anyhow};
use nix::errno::Errno;

/// The unprivileged user `nobody`.
pub const UNPRIVILEGED: u32 = 65534;

/// Runs `work` in a thread that runs as `user`. Needs root.
///
/// # Errors
/// Returns the error of `work`, or an error if this process may not change its user.
pub fn as_user<T: Send + 'static>(user: u32, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = thread::spawn(move || {
        // Unlike setresuid(3), the raw system call changes only this thread.
        // SAFETY: takes only numbers.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
        Errno::result(result)?;
        work()
    });
    done.join().map_err(|_| anyhow!("the thread of user {user} panicked"))?
}
