//! Who is at the other end of a Unix socket. Descriptors, memory and paths are taken only from the same user or root.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Uid, geteuid};

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

    /// Who is at the other end, if that is the same user or root.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn trusted(socket: &impl AsFd) -> Result<Self, PeerError> {
        let peer = Self::of(socket)?;
        if peer.same_user() || Uid::from_raw(peer.user).is_root() {
            Ok(peer)
        } else {
            Err(PeerError::User { peer: peer.user, own: geteuid().as_raw() })
        }
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
    fn a_file_that_is_no_socket_has_no_peer() {
        let error = Peer::trusted(&tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, PeerError::System(_)), "{error}");
    }
}
