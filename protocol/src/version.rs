//! Which versions of a protocol two processes have in common.
//!
//! Every packet says what its sender speaks and the oldest that it still understands, so either side can refuse the
//! other by name before it looks at a body.

use serde::{Deserialize, Serialize};

/// The versions that a process speaks: `oldest` up to `newest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest that it understands.
    pub oldest: u16,
    /// The newest, which it writes.
    pub newest: u16,
}

/// Two processes have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer speaks versions {} to {} of the protocol, this program {} to {}", peer.oldest, peer.newest, own.oldest, own.newest)]
pub struct VersionError {
    /// This process'.
    pub own: Versions,
    /// The peer's.
    pub peer: Versions,
}

impl Versions {
    /// The newest version that both speak.
    ///
    /// # Errors
    /// [`VersionError`] if there is none.
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
    fn the_newest_that_both_speak_is_chosen() {
        let old = Versions { oldest: 1, newest: 2 };
        let new = Versions { oldest: 2, newest: 5 };
        assert_eq!(old.common(new), Ok(2));
        assert_eq!(new.common(old), Ok(2));
        assert_eq!(old.common(old), Ok(2));
    }

    #[test]
    fn none_in_common_is_an_error_on_both_sides() {
        let old = Versions { oldest: 1, newest: 2 };
        let new = Versions { oldest: 3, newest: 5 };
        old.common(new).unwrap_err();
        new.common(old).unwrap_err();
    }
}
