//! Events: eventfds as the rest of the program uses them.
#![expect(unsafe_code, reason = "EventFd lends its descriptor only as a number")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// An event that never blocks.
pub fn new() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
}

/// The event's descriptor, for `poll`.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Signals an event. A counter that is full has been signalled, too.
pub fn signal(event: &EventFd) {
    if let Err(error) = event.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        tracing::error!("cannot signal an event: {error}");
    }
}

/// Takes the signals that have come so far; false if there were none.
pub fn take(event: &EventFd) -> bool {
    event.read().is_ok()
}
