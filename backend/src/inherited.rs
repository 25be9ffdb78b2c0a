//! Descriptors that the parent process opened and named on the command line.
#![expect(unsafe_code, reason = "takes ownership of descriptors by number")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes ownership of inherited descriptor `fd` and makes it close-on-exec. `None` if it is not open, or standard
/// input, output or error. To be called once a number, and before anything else is opened that could get it.
pub fn claim(fd: RawFd) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    // SAFETY: only to set a flag; a descriptor that is not open is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: the operator gave us this descriptor, it is open, and it is claimed once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
