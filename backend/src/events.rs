//! An owned epoll instance, a wrapper around the `epoll` crate, which uses raw descriptors.
#![expect(unsafe_code, reason = "takes ownership of the descriptor that epoll_create1 returns")]

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use baton_control::limited;
pub use epoll::Events;

/// An epoll instance; closed on drop.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// A buffer of events for [`Epoll::wait`].
#[derive(Clone, Copy, Debug)]
pub struct Ready<const N: usize>([epoll::Event; N]);

impl<const N: usize> Default for Ready<N> {
    fn default() -> Self {
        Self([epoll::Event::new(Events::empty(), 0); N])
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Epoll {
    /// Creates an instance, close-on-exec.
    ///
    /// # Errors
    /// Returns an error if `epoll_create1(2)` fails.
    pub fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: `fd` was just created and has no other owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches `fd`. [`Self::wait`] returns `token` with its events.
    ///
    /// # Errors
    /// Returns an error if `epoll_ctl(2)` fails: `EPERM` for a file that cannot be polled.
    pub fn add(&self, fd: &impl AsFd, events: Events, token: u64) -> io::Result<()> {
        let event = epoll::Event::new(events, token);
        epoll::ctl(self.0.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_fd().as_raw_fd(), event)
    }

    /// Re-arms `fd`: [`Self::wait`] reports what `fd` is ready for now, even if it already reported that edge.
    ///
    /// # Errors
    /// Returns an error if `epoll_ctl(2)` fails: `ENOENT` if `fd` is not watched.
    pub fn rearm(&self, fd: &impl AsFd, events: Events, token: u64) -> io::Result<()> {
        let event = epoll::Event::new(events, token);
        epoll::ctl(self.0.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_MOD, fd.as_fd().as_raw_fd(), event)
    }

    /// Stops watching `fd`. Call this before closing `fd`: a registration belongs to the open file description, which
    /// another process may still hold.
    ///
    /// # Errors
    /// Returns an error if `epoll_ctl(2)` fails: `ENOENT` if `fd` is not watched.
    pub fn remove(&self, fd: &impl AsFd) -> io::Result<()> {
        let event = epoll::Event::new(Events::empty(), 0);
        epoll::ctl(self.0.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_fd().as_raw_fd(), event)
    }

    /// Waits for events and returns them with their tokens. Returns none after `timeout` milliseconds (−1: no limit) or
    /// when a signal interrupts the wait.
    ///
    /// # Errors
    /// Returns an error if `epoll_wait(2)` fails, except with `EINTR`.
    pub fn wait<'a, const N: usize>(
        &self,
        timeout: i32,
        ready: &'a mut Ready<N>,
    ) -> io::Result<impl Iterator<Item = (u64, Events)> + use<'a, N>> {
        let count = match epoll::wait(self.0.as_raw_fd(), timeout, &mut ready.0) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        Ok(ready.0[..count].iter().map(|event| (event.data, Events::from_bits_truncate(event.events))))
    }
}

/// A value with a descriptor, which an epoll instance watches until this is dropped.
#[derive(Debug)]
pub struct Watched<T: AsFd> {
    inner: T,
    /// `None` after [`Self::ignore`].
    epoll: Option<Arc<Epoll>>,
}

impl<T: AsFd> Watched<T> {
    /// Watches `inner` for input. [`Epoll::wait`] returns `token` with its events.
    ///
    /// # Errors
    /// Returns an error if `epoll_ctl(2)` fails.
    pub fn new(inner: T, epoll: &Arc<Epoll>, token: u64) -> io::Result<Self> {
        epoll.add(&inner, Events::EPOLLIN, token)?;
        Ok(Self { inner, epoll: Some(Arc::clone(epoll)) })
    }

    /// Stops watching the value, which stays open.
    pub fn ignore(&mut self) {
        if let Some(epoll) = self.epoll.take()
            && let Err(error) = epoll.remove(&self.inner)
        {
            limited!(warn, %error, "cannot stop watching a descriptor");
        }
    }
}

impl<T: AsFd> Deref for Watched<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: AsFd> Drop for Watched<T> {
    fn drop(&mut self) {
        self.ignore();
    }
}
