//! Creates, signals and clears eventfds.
#![expect(unsafe_code, reason = "EventFd lends its descriptor only as a number")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// Creates an eventfd that never blocks.
pub fn new() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
}

/// Returns the eventfd's descriptor, for `poll`.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Signals an eventfd. A full counter is signalled already.
pub fn signal(event: &EventFd) {
    if let Err(error) = event.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        tracing::error!("cannot signal an eventfd: {error}");
    }
}

/// Clears the pending signals. Returns false if there were none.
pub fn take(event: &EventFd) -> bool {
    event.read().is_ok()
}
