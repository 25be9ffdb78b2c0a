//! The process at the other end of a Unix socket: its user, which decides whether this process trusts it, and whether
//! it has exited.
//!
//! Only a [`PeerProcess`], a pidfd, proves that the peer has exited. A closed connection does not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Uid, geteuid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::path_trust::untrusted_component;

/// Why a peer is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It runs as a user that may not hand over to this process.
    #[error("the peer runs as user {peer}; only user {own} and root may hand over here")]
    UntrustedSource {
        /// The peer's user.
        peer: u32,
        /// This process' user.
        own: u32,
    },
    /// It runs as a user to which this process may not hand over.
    #[error("the peer runs as user {peer}; user {own} may hand over only to itself and root")]
    UntrustedTarget {
        /// The peer's user.
        peer: u32,
        /// This process' user.
        own: u32,
    },
    /// It runs as another user, and may have created the path without root's consent.
    #[error(
        "the peer runs as user {peer} and may have created {} without root's consent; use a directory that only root \
         or this user can write, in directories that only root can write",
        component.display()
    )]
    UntrustedPath {
        /// The peer's user.
        peer: u32,
        /// The part of the path that the peer's user may have created.
        component: PathBuf,
    },
    /// The peer's user, or the owners of its path, cannot be determined.
    #[error("cannot determine whether the peer may be trusted")]
    System(#[from] io::Error),
}

/// The process at the other end, as of when it connected or began to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id in this process' namespace; 0 if it has none there.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
}

impl Peer {
    /// Returns the process at the other end of `socket` (`SO_PEERCRED`).
    ///
    /// # Errors
    /// Returns the error of `getsockopt(2)`.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { pid: credentials.pid(), uid: credentials.uid() })
    }

    /// Returns whether it runs as the same user as this process.
    pub fn same_user(self) -> bool {
        self.uid == geteuid().as_raw()
    }

    /// Returns whether it runs as the same user as this process, or as root.
    pub fn same_user_or_root(self) -> bool {
        self.same_user() || Uid::from_raw(self.uid).is_root()
    }

    /// Returns the process at the other end if this process may accept descriptors from it: if it runs as the same user
    /// or as root.
    ///
    /// # Errors
    /// Returns [`PeerError::UntrustedSource`] for any other user.
    pub fn trusted(socket: &impl AsFd) -> Result<Self, PeerError> {
        let peer = Self::of(socket)?;
        if peer.same_user_or_root() {
            Ok(peer)
        } else {
            Err(PeerError::UntrustedSource { peer: peer.uid, own: geteuid().as_raw() })
        }
    }

    /// Returns the process that listens at `path`, to which `socket` is connected, if this process may send it
    /// descriptors: if it runs as the same user or as root. A process of root also trusts a user whose `path` root
    /// consented to.
    ///
    /// # Errors
    /// Returns [`PeerError::UntrustedTarget`] or [`PeerError::UntrustedPath`] for any other user.
    pub fn trusted_at(socket: &impl AsFd, path: &Path) -> Result<Self, PeerError> {
        match Self::trusted(socket) {
            Err(PeerError::UntrustedSource { peer, .. }) if geteuid().is_root() => {
                match untrusted_component(path, peer)? {
                    Some(component) => Err(PeerError::UntrustedPath { peer, component }),
                    None => Ok(Self::of(socket)?),
                }
            }
            Err(PeerError::UntrustedSource { peer, own }) => Err(PeerError::UntrustedTarget { peer, own }),
            other => other,
        }
    }
}

/// A pidfd of the process at the other end, readable once the process has exited.
#[derive(Debug)]
pub struct PeerProcess(OwnedFd);

impl PeerProcess {
    /// Opens the process at the other end of `socket`, as of when it connected or began to listen.
    ///
    /// # Errors
    /// Returns [`io::ErrorKind::NotFound`] if the peer has exited, or has no id in this process' namespace.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => Ok(Self(pidfd)),
            // Linux before 6.5 does not have SO_PEERPIDFD.
            Err(Errno::ENOPROTOOPT) => Self::by_pid(socket),
            Err(Errno::ESRCH) => Err(io::ErrorKind::NotFound.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn by_pid(socket: &impl AsFd) -> io::Result<Self> {
        let pid = Pid::from_raw(Peer::of(socket)?.pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| match errno {
            rustix::io::Errno::SRCH => io::ErrorKind::NotFound.into(),
            other => io::Error::from(other),
        })?;
        // If the peer still holds its end, its process id was not reused before pidfd_open(2).
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::ZERO)? {
            0 => Ok(Self(pidfd)),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns whether the process has exited.
    pub fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for PeerProcess {
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
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        assert!(peer.same_user());
    }

    #[test]
    fn a_running_process_has_not_exited() {
        let (here, there) = UnixStream::pair().unwrap();
        assert!(!PeerProcess::of(&here).unwrap().has_exited());
        assert!(!PeerProcess::by_pid(&here).unwrap().has_exited());
        drop(there);
        let error = PeerProcess::by_pid(&here).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_killed_process_has_exited() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let process = PeerProcess(pidfd_open(pid, PidfdFlags::empty()).unwrap());
        assert!(!process.has_exited());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.has_exited());
    }

    #[test]
    fn a_file_that_is_not_a_socket_has_no_peer() {
        let error = Peer::trusted(&tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, PeerError::System(_)), "{error}");
    }
}
