//! The descriptors of a message. The body contains a manifest: the descriptors' names, in order. The receiver claims
//! each descriptor by name. A missing or unclaimed descriptor is an error that names it; unclaimed descriptors are
//! dropped and thus closed.
//!
//! Descriptors that do not fit one message are spread over several: [`NamedFds::packets`] and [`NamedFds::join`].
//!
//! Generic over the descriptor type: nothing here opens or closes a descriptor.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The most descriptors that one message can carry (Linux: `SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// The longest name, in bytes.
const MAX_NAME: usize = 32;

/// The names of a message's descriptors, in order. Untrusted until [`FdManifest::pair`] has checked them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdManifest(Vec<String>);

/// Why a message's descriptors are invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The number of descriptors differs from the number of names.
    #[error("message names {named} descriptors but carries {came}")]
    Count {
        /// Names in the manifest.
        named: usize,
        /// Descriptors received.
        came: usize,
    },
    /// The message names more descriptors than one message can carry.
    #[error("message names {0} descriptors, the limit is {MAX_FDS}")]
    TooMany(usize),
    /// A name is invalid.
    #[error("invalid descriptor name {0:?}: empty, too long or not plain ASCII")]
    Name(String),
    /// A name occurs twice.
    #[error("descriptor {0} is named twice")]
    Twice(String),
    /// A required descriptor is missing.
    #[error("descriptor {0} is missing")]
    Missing(String),
    /// The receiver has no use for a descriptor.
    #[error("unexpected descriptor {0}")]
    Unclaimed(String),
}

impl FdManifest {
    /// Creates a manifest of these names.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().collect())
    }

    /// Returns the number of names.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether the manifest is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks the names and pairs each with its descriptor.
    ///
    /// # Errors
    /// Returns a [`ManifestError`] if a name is invalid or their number differs from that of `fds`. All descriptors are
    /// dropped.
    pub fn pair<F>(self, fds: Vec<F>) -> Result<NamedFds<F>, ManifestError> {
        if self.len() > MAX_FDS {
            return Err(ManifestError::TooMany(self.len()));
        }
        if self.len() != fds.len() {
            return Err(ManifestError::Count { named: self.len(), came: fds.len() });
        }
        let mut seen = BTreeSet::new();
        for name in &self.0 {
            let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
            if name.is_empty() || name.len() > MAX_NAME || !plain {
                return Err(ManifestError::Name(name.chars().take(MAX_NAME).collect()));
            }
            if !seen.insert(name) {
                return Err(ManifestError::Twice(name.clone()));
            }
        }
        Ok(NamedFds(self.0.into_iter().zip(fds).collect()))
    }
}

/// Named descriptors, to be sent or to be claimed by the receiver.
#[derive(Debug)]
pub struct NamedFds<F>(Vec<(String, F)>);

/// Collects named descriptors for sending.
impl<F> FromIterator<(String, F)> for NamedFds<F> {
    fn from_iter<I: IntoIterator<Item = (String, F)>>(named: I) -> Self {
        Self(named.into_iter().collect())
    }
}

impl<F> NamedFds<F> {
    /// Splits into the manifest and the descriptors, in the same order, for sending.
    pub fn unzip(self) -> (FdManifest, Vec<F>) {
        let (names, fds) = self.0.into_iter().unzip();
        (FdManifest(names), fds)
    }

    /// Splits into one part per message: at least one part, each of at most [`MAX_FDS`] descriptors.
    pub fn packets(self) -> Vec<Self> {
        let mut rest = self.0.into_iter();
        let mut packets = vec![Self(rest.by_ref().take(MAX_FDS).collect())];
        while rest.len() > 0 {
            packets.push(Self(rest.by_ref().take(MAX_FDS).collect()));
        }
        packets
    }

    /// Returns the number of descriptors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no descriptors.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the descriptors of another message.
    ///
    /// # Errors
    /// Returns [`ManifestError::Twice`] if a name occurs in both. All descriptors are dropped.
    pub fn join(mut self, more: Self) -> Result<Self, ManifestError> {
        let own: BTreeSet<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        if let Some((name, _)) = more.0.iter().find(|(name, _)| own.contains(name.as_str())) {
            return Err(ManifestError::Twice(name.clone()));
        }
        self.0.extend(more.0);
        Ok(self)
    }

    /// Takes the descriptor of this name, if there is one.
    pub fn claim_optional(&mut self, name: &str) -> Option<F> {
        let at = self.0.iter().position(|(own, _)| own == name)?;
        Some(self.0.remove(at).1)
    }

    /// Takes the descriptor of this name.
    ///
    /// # Errors
    /// Returns [`ManifestError::Missing`] if there is none.
    pub fn claim(&mut self, name: &str) -> Result<F, ManifestError> {
        self.claim_optional(name).ok_or_else(|| ManifestError::Missing(name.to_owned()))
    }

    /// Checks that every descriptor was claimed.
    ///
    /// # Errors
    /// Returns [`ManifestError::Unclaimed`] with the first unclaimed name. All unclaimed descriptors are dropped.
    pub fn finish(self) -> Result<(), ManifestError> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(ManifestError::Unclaimed(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(names: &[&str]) -> FdManifest {
        FdManifest::new(names.iter().map(|&name| name.to_owned()))
    }

    #[test]
    fn descriptors_are_claimed_by_name_in_any_order() {
        let mut fds = manifest(&["tap/1", "ownership", "tap/0"]).pair(vec![11, 20, 10]).unwrap();
        assert_eq!(fds.claim("tap/0"), Ok(10));
        assert_eq!(fds.claim("tap/1"), Ok(11));
        assert_eq!(fds.claim_optional("frames"), None);
        assert_eq!(fds.claim("ownership"), Ok(20));
        fds.finish().unwrap();
    }

    #[test]
    fn many_descriptors_are_spread_over_several_messages() {
        let named = |count: usize| (0..count).map(|fd| (format!("kick/{fd}"), fd)).collect::<NamedFds<_>>();
        let lengths = |count| named(count).packets().iter().map(NamedFds::len).collect::<Vec<_>>();
        assert_eq!(lengths(0), [0]);
        assert_eq!(lengths(MAX_FDS), [MAX_FDS]);
        assert_eq!(lengths(2 * MAX_FDS + 1), [MAX_FDS, MAX_FDS, 1]);
        let mut packets = named(300).packets().into_iter();
        let first = packets.next().unwrap();
        let mut all = packets.try_fold(first, NamedFds::join).unwrap();
        assert_eq!(all.claim("kick/299"), Ok(299));
        assert_eq!(all.len(), 299);
        let twice = named(2).join(named(1)).unwrap_err();
        assert_eq!(twice, ManifestError::Twice("kick/0".to_owned()));
    }

    #[test]
    fn error_names_the_missing_or_unclaimed_descriptor() {
        let mut fds = manifest(&["tap/0", "spare"]).pair(vec![1, 2]).unwrap();
        assert_eq!(fds.claim("ownership"), Err(ManifestError::Missing("ownership".to_owned())));
        fds.claim("tap/0").unwrap();
        assert_eq!(fds.finish(), Err(ManifestError::Unclaimed("spare".to_owned())));
    }

    #[test]
    fn number_of_names_and_descriptors_must_match() {
        for fds in [vec![], vec![1], vec![1, 2, 3]] {
            let came = fds.len();
            let error = manifest(&["a", "b"]).pair(fds).unwrap_err();
            assert_eq!(error, ManifestError::Count { named: 2, came });
        }
    }

    #[test]
    fn invalid_names_are_refused() {
        for names in [&["a", "a"][..], &[""], &["a b"], &["a\n"], &["é"], &["x".repeat(33).as_str()]] {
            manifest(names).pair(vec![0; names.len()]).unwrap_err();
        }
        let many: Vec<String> = (0..=MAX_FDS).map(|n| n.to_string()).collect();
        let error = FdManifest::new(many).pair(vec![0; MAX_FDS + 1]).unwrap_err();
        assert_eq!(error, ManifestError::TooMany(MAX_FDS + 1));
    }

    #[test]
    fn refused_message_drops_all_its_descriptors() {
        let fd = std::sync::Arc::new(());
        manifest(&["a"]).pair(vec![fd.clone(), fd.clone()]).unwrap_err();
        manifest(&["a", "b"]).pair(vec![fd.clone(), fd.clone()]).unwrap().finish().unwrap_err();
        assert_eq!(std::sync::Arc::strong_count(&fd), 1);
    }
}
