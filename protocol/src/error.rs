//! What can be wrong with a packet as a whole: its bytes or its descriptors.

use crate::codec::CodecError;
use crate::fd_manifest::ManifestError;

/// Why a packet is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The bytes are no message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The descriptors are not those that the message needs.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}
