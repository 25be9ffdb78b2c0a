//! Descriptors that the parent process opened and named on the command line.
#![expect(unsafe_code, reason = "takes ownership of descriptors by number")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes ownership of inherited descriptor `fd` and makes it close-on-exec. Returns `None` if it is not open, or is
/// standard input, output or error. Call this once per number, before opening anything that could get the number.
pub fn claim(fd: RawFd) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    // SAFETY: the borrow only sets a flag; fcntl(2) fails if the descriptor is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: the operator passed this descriptor to us, it is open, and it is claimed once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
