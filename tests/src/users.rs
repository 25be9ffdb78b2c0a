//! Work that another user does, as far as the kernel can tell.
#![expect(unsafe_code, reason = "a thread becomes another user's")]

use std::thread;

use anyhow::{Result, anyhow};
use nix::errno::Errno;

/// A user without any rights: `nobody`.
pub const UNPRIVILEGED: u32 = 65534;

/// Does `work` in a thread of `user`, which takes root.
///
/// # Errors
/// Those of `work`, and without the privilege to become that user.
pub fn as_user<T: Send + 'static>(user: u32, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = thread::spawn(move || {
        // The system call by itself concerns this thread only, which ends with it.
        // SAFETY: takes numbers.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
        Errno::result(result)?;
        work()
    });
    done.join().map_err(|_| anyhow!("the thread of another user panicked"))?
}
