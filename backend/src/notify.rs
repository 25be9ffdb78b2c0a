//! The eventfds of a vring (vhost-user: `SET_VRING_KICK`, `SET_VRING_CALL`, `SET_VRING_ERR`).
//!
//! They belong to the front-end, which shares their file description and so their flags and their counter. Only
//! eventfds are accepted: a write to anything else could block for ever or raise a signal.
#![expect(unsafe_code, reason = "preadv2 with RWF_NOWAIT has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

/// Why a descriptor is of no use for notifications.
#[derive(Debug, thiserror::Error)]
pub enum NotifierError {
    /// It is something else.
    #[error("the descriptor for notifications is not an eventfd")]
    NotEventfd,
    /// It could not be looked at.
    #[error("cannot inspect the descriptor for notifications")]
    Inspect(#[source] io::Error),
}

/// An eventfd shared with the front-end; clones share the descriptor.
#[derive(Clone, Debug)]
pub struct Notifier(Arc<File>);

impl TryFrom<File> for Notifier {
    type Error = NotifierError;

    fn try_from(file: File) -> Result<Self, NotifierError> {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let target = std::fs::read_link(link).map_err(NotifierError::Inspect)?;
        if target == Path::new("anon_inode:[eventfd]") {
            Ok(Self(Arc::new(file)))
        } else {
            Err(NotifierError::NotEventfd)
        }
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Notifier {
    /// Adds one to the counter. Where the counter is full the reader has been notified already.
    #[inline]
    pub fn notify(&self) {
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Frees a writer that a full counter blocks, without ever blocking itself: the counter is emptied.
    pub fn unblock_writer(&self) {
        let mut count = [0u8; 8];
        let vector = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: one vector of 8 writable bytes; RWF_NOWAIT makes an empty counter an error.
        unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::OwnedFd;

    fn eventfd(initial: u32) -> File {
        File::from(OwnedFd::from(EventFd::from_value_and_flags(initial, EfdFlags::EFD_CLOEXEC).unwrap()))
    }

    #[test]
    fn only_an_eventfd_is_accepted() {
        Notifier::try_from(eventfd(0)).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Notifier::try_from(file), Err(NotifierError::NotEventfd)));
    }

    #[test]
    fn unblocking_empties_a_full_counter_and_does_not_wait_for_an_empty_one() {
        let file = eventfd(0);
        nix::unistd::write(&file, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let notifier = Notifier::try_from(file).unwrap();
        let writer = std::thread::spawn({
            let notifier = notifier.clone();
            move || notifier.notify()
        });
        while !writer.is_finished() {
            notifier.unblock_writer();
        }
        writer.join().unwrap();
    }
}
