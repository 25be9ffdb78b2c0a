//! Who is at the other end of a Unix socket. Descriptors, memory and paths are taken only from the same user or root.
//!
//! A peer's [`Life`] is a descriptor of its process: the only proof that it is dead. A closed connection is none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Uid, geteuid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::place;

/// A peer that is not trusted, or that cannot be known.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Another user.
    #[error("the peer runs as user {peer}; only user {own} and root may hand over here")]
    User {
        /// The peer's.
        peer: u32,
        /// This process'.
        own: u32,
    },
    /// Another user, who would get what is this one's.
    #[error("the peer runs as user {peer}; user {own} gives nothing but to itself and root")]
    Strange {
        /// The peer's.
        peer: u32,
        /// This process'.
        own: u32,
    },
    /// Another user, at a path that does not say that root meant that user.
    #[error(
        "the peer runs as user {peer} and may have taken {} without root's doing; use a folder that only root or that \
         user may write, in folders that only root may write",
        component.display()
    )]
    Squatter {
        /// The peer's.
        peer: u32,
        /// The part of the path that any user could have put there.
        component: PathBuf,
    },
    /// The system does not say.
    #[error("cannot find out who the peer is")]
    System(#[from] io::Error),
}

/// The process at the other end, as it was when it connected or listened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process number in our namespace; 0 if it has none there.
    pub process: i32,
    /// Its effective user.
    pub user: u32,
}

impl Peer {
    /// Who is at the other end of `socket` (`SO_PEERCRED`).
    ///
    /// # Errors
    /// What `getsockopt(2)` fails with.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { process: credentials.pid(), user: credentials.uid() })
    }

    /// Whether it runs as the same user as this process.
    pub fn same_user(self) -> bool {
        self.user == geteuid().as_raw()
    }

    /// Whether it runs as the same user as this process, or as root.
    pub fn same_user_or_root(self) -> bool {
        self.same_user() || Uid::from_raw(self.user).is_root()
    }

    /// Who is at the other end, if that is the same user or root.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn trusted(socket: &impl AsFd) -> Result<Self, PeerError> {
        let peer = Self::of(socket)?;
        if peer.same_user_or_root() {
            Ok(peer)
        } else {
            Err(PeerError::User { peer: peer.user, own: geteuid().as_raw() })
        }
    }

    /// The process that listens at `path`, to which `socket` is connected, if this process may give away what it has:
    /// to the same user and root, and as root to any user whom root gave that path.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn entrusted(socket: &impl AsFd, path: &Path) -> Result<Self, PeerError> {
        match Self::trusted(socket) {
            Err(PeerError::User { peer, .. }) if geteuid().is_root() => match place::squatted(path, peer)? {
                Some(component) => Err(PeerError::Squatter { peer, component }),
                None => Ok(Self::of(socket)?),
            },
            Err(PeerError::User { peer, own }) => Err(PeerError::Strange { peer, own }),
            other => other,
        }
    }
}

/// The process at the other end, to be waited for: readable once it is dead.
#[derive(Debug)]
pub struct Life(OwnedFd);

impl Life {
    /// Of the process at the other end of `socket`, as it was when it connected or listened.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::NotFound`] where it is dead already, or has no number here.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => Ok(Self(pidfd)),
            // Linux before 6.5 has no such option.
            Err(Errno::ENOPROTOOPT) => Self::by_number(socket),
            Err(Errno::ESRCH) => Err(io::ErrorKind::NotFound.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn by_number(socket: &impl AsFd) -> io::Result<Self> {
        let process = Pid::from_raw(Peer::of(socket)?.process).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(process, PidfdFlags::empty()).map_err(|errno| match errno {
            rustix::io::Errno::SRCH => io::ErrorKind::NotFound.into(),
            other => io::Error::from(other),
        })?;
        // Only a process that still held the connection then had that number still.
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::ZERO)? {
            0 => Ok(Self(pidfd)),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Life {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_of_the_same_user_is_trusted() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = Peer::trusted(&here).unwrap();
        assert_eq!(peer.process, i32::try_from(std::process::id()).unwrap());
        assert!(peer.same_user());
    }

    #[test]
    fn a_process_that_runs_is_alive() {
        let (here, there) = UnixStream::pair().unwrap();
        assert!(!Life::of(&here).unwrap().is_over());
        assert!(!Life::by_number(&here).unwrap().is_over());
        drop(there);
        let error = Life::by_number(&here).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_life_is_over_when_the_process_is_dead() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let life = Life(pidfd_open(pid, PidfdFlags::empty()).unwrap());
        assert!(!life.is_over());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(life.is_over());
    }

    #[test]
    fn a_file_that_is_no_socket_has_no_peer() {
        let error = Peer::trusted(&tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, PeerError::System(_)), "{error}");
    }
}
