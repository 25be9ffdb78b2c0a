//! The eventfds of a vring (vhost-user: `SET_VRING_KICK`, `SET_VRING_CALL`, `SET_VRING_ERR`).
//!
//! The front-end owns them and shares the open file, so it can change flags and counter. Only eventfds are accepted: a
//! write to anything else could block for ever or raise a signal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Why a descriptor cannot be used for notifications.
#[derive(Debug, thiserror::Error)]
pub enum NotifierError {
    /// The descriptor is not an eventfd.
    #[error("the descriptor for notifications is not an eventfd")]
    NotEventfd,
    /// The descriptor cannot be inspected.
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
    /// Returns whether [`Self::notify`] would return at once.
    pub fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Adds one to the counter. If the counter is full, the reader has been notified already: the write fails, or in
    /// blocking mode waits until a read or a signal (an eventfd does not support `RWF_NOWAIT`).
    #[inline]
    pub fn notify(&self) {
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::interrupt;
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
    fn interrupt_ends_the_wait_for_a_full_counter_and_leaves_it_full() {
        let file = eventfd(0);
        nix::unistd::write(&file, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let notifier = Notifier::try_from(file).unwrap();
        interrupt::install().unwrap();
        let writer = std::thread::spawn({
            let notifier = notifier.clone();
            move || {
                interrupt::allow();
                notifier.notify();
            }
        });
        while !writer.is_finished() {
            interrupt::interrupt(&writer);
            std::thread::yield_now();
        }
        writer.join().unwrap();
        let mut count = [0; 8];
        nix::unistd::read(&notifier, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
    }
}
