//! Negotiates a protocol version between two processes.
//!
//! Every packet header carries its sender's newest and oldest supported version, so either side can refuse the other
//! by name before it parses a body.

use serde::{Deserialize, Serialize};

/// The versions that a process supports, `oldest..=newest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest version that the process reads.
    pub oldest: u16,
    /// The newest version, in which the process writes.
    pub newest: u16,
}

/// Two processes have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no common protocol version: the peer supports {} to {}, this program {} to {}",
    peer.oldest, peer.newest, own.oldest, own.newest
)]
pub struct VersionError {
    /// This process's versions.
    pub own: Versions,
    /// The peer's versions.
    pub peer: Versions,
}

impl Versions {
    /// Returns the newest version that both processes support.
    ///
    /// # Errors
    /// Returns [`VersionError`] if they have no version in common.
    pub fn common(self, peer: Self) -> Result<u16, VersionError> {
        let newest = self.newest.min(peer.newest);
        if newest < self.oldest || newest < peer.oldest {
            return Err(VersionError { own: self, peer });
        }
        Ok(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_common_version_is_chosen() {
        let old = Versions { oldest: 1, newest: 2 };
        let new = Versions { oldest: 2, newest: 5 };
        assert_eq!(old.common(new), Ok(2));
        assert_eq!(new.common(old), Ok(2));
        assert_eq!(old.common(old), Ok(2));
    }

    #[test]
    fn both_sides_reject_a_peer_without_a_common_version() {
        let old = Versions { oldest: 1, newest: 2 };
        let new = Versions { oldest: 3, newest: 5 };
        old.common(new).unwrap_err();
        new.common(old).unwrap_err();
    }
}
