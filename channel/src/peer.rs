//! The process at the other end of a Unix socket: its user, which decides whether it is trusted, and its end.
//!
//! Only a descriptor of the process, a [`PeerProcess`], proves that the peer has exited. A closed connection does not.

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
    /// It runs as a user from which this process accepts nothing.
    #[error("the peer runs as user {peer}; only user {own} and root may hand over here")]
    UntrustedSource {
        /// The peer's user.
        peer: u32,
        /// This process' user.
        own: u32,
    },
    /// It runs as a user to which this process gives nothing.
    #[error("the peer runs as user {peer}; user {own} gives nothing but to itself and root")]
    UntrustedTarget {
        /// The peer's user.
        peer: u32,
        /// This process' user.
        own: u32,
    },
    /// It runs as another user, at a path that any user could have created.
    #[error(
        "the peer runs as user {peer} and may have taken {} without root's doing; use a folder that only root or that \
         user may write, in folders that only root may write",
        component.display()
    )]
    UntrustedPath {
        /// The peer's user.
        peer: u32,
        /// The part of the path that any user could have created.
        component: PathBuf,
    },
    /// The system does not tell who the peer is.
    #[error("cannot find out who the peer is")]
    System(#[from] io::Error),
}

/// The process at the other end, as it was when it connected or began to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id in this process' namespace; 0 if it has none there.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
}

impl Peer {
    /// The process at the other end of `socket` (`SO_PEERCRED`).
    ///
    /// # Errors
    /// What `getsockopt(2)` fails with.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { pid: credentials.pid(), uid: credentials.uid() })
    }

    /// Whether it runs as the same user as this process.
    pub fn same_user(self) -> bool {
        self.uid == geteuid().as_raw()
    }

    /// Whether it runs as the same user as this process, or as root.
    pub fn same_user_or_root(self) -> bool {
        self.same_user() || Uid::from_raw(self.uid).is_root()
    }

    /// The process at the other end, from which this process may accept descriptors: of the same user, or of root.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn trusted(socket: &impl AsFd) -> Result<Self, PeerError> {
        let peer = Self::of(socket)?;
        if peer.same_user_or_root() {
            Ok(peer)
        } else {
            Err(PeerError::UntrustedSource { peer: peer.uid, own: geteuid().as_raw() })
        }
    }

    /// The process that listens at `path`, to which `socket` is connected, and to which this process may give
    /// descriptors: of the same user or of root, and for root also of a user whose path root consented to.
    ///
    /// # Errors
    /// [`PeerError`].
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

/// A descriptor of the process at the other end (pidfd), readable once that has exited.
#[derive(Debug)]
pub struct PeerProcess(OwnedFd);

impl PeerProcess {
    /// The process at the other end of `socket`, as it was when it connected or began to listen.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::NotFound`] if it has exited, or has no id in this process' namespace.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => Ok(Self(pidfd)),
            // Linux before 6.5 has no such option.
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
        // If the peer still holds its end, its process id was not reused before the call above.
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::ZERO)? {
            0 => Ok(Self(pidfd)),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Whether the process has exited.
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
    fn a_file_that_is_no_socket_has_no_peer() {
        let error = Peer::trusted(&tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, PeerError::System(_)), "{error}");
    }
}
