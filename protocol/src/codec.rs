//! The layout of a message: a fixed header that can be read without the body, then the body in MessagePack with field
//! names. All header fields are little endian.
//!
//! ```text
//!   0  magic           u32   identifies the protocol
//!   4  newest          u16   the sender's newest version, in which the message is written
//!   6  oldest          u16   the oldest version that the sender reads
//!   8  kind            u16   identifies the message
//!  10  flags           u16   0
//!  12  length          u32   length of the body, in bytes
//!  16  body
//! ```
//! A reader skips unknown fields and has defaults for fields that were added after the oldest version, so either side
//! may be the newer one. An unknown kind is an error. The length is checked against the protocol's limit before
//! anything is allocated for the body, which bounds the memory that decoding takes.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::version::{VersionError, Versions};

/// Length of a header, in bytes.
pub const HEADER: usize = 16;

/// The deepest nesting of values in a body. Messages need a few levels.
const MAX_DEPTH: usize = 32;

/// One of Baton's protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The first four bytes of each packet.
    pub magic: [u8; 4],
    /// The versions that this build supports.
    pub versions: Versions,
    /// The longest body, in bytes.
    pub max_body: usize,
}

/// A checked packet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The versions that the sender supports.
    pub versions: Versions,
    /// The message's kind.
    pub kind: u16,
    /// Length of the body, in bytes.
    pub length: usize,
}

/// Why a message cannot be decoded or encoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The packet is shorter than a header, or than its header says.
    #[error("truncated message: {got} of {needed} bytes")]
    Truncated {
        /// The packet's length.
        got: usize,
        /// The expected length.
        needed: usize,
    },
    /// The packet belongs to another protocol.
    #[error("not a message of this protocol: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// The sender has no version in common with this build.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The header has a flag that no version defines.
    #[error("unknown message flags {0:#06x}")]
    Flags(u16),
    /// The body is longer than the protocol allows.
    #[error("message body has {length} bytes, the limit is {max}")]
    TooLong {
        /// The body's length.
        length: usize,
        /// The protocol's limit.
        max: usize,
    },
    /// Bytes follow the body.
    #[error("{0} trailing bytes after a message")]
    Surplus(usize),
    /// This version does not know the kind.
    #[error("unknown message kind {0}")]
    Kind(u16),
    /// The body cannot be decoded.
    #[error("cannot decode the body of message kind {kind}")]
    Body {
        /// The message's kind.
        kind: u16,
        /// Why not.
        #[source]
        source: rmp_serde::decode::Error,
    },
    /// The body cannot be encoded.
    #[error("cannot encode the body of message kind {kind}")]
    Write {
        /// The message's kind.
        kind: u16,
        /// Why not.
        #[source]
        source: rmp_serde::encode::Error,
    },
}

/// The messages of a protocol, implemented by [`messages!`](crate::messages).
pub trait Message: Sized {
    /// The protocol.
    const PROTOCOL: Protocol;

    /// Returns the header's `kind` for this message.
    fn kind(&self) -> u16;

    /// Returns the message's name, for logs and errors.
    fn name(&self) -> &'static str;

    /// Encodes the whole packet, header and body.
    ///
    /// # Errors
    /// Returns [`CodecError::TooLong`] if the body exceeds the protocol's limit, and [`CodecError::Write`] if it cannot
    /// be serialised.
    fn encode(&self) -> Result<Vec<u8>, CodecError>;

    /// Decodes the body of a message of this `kind`.
    ///
    /// # Errors
    /// Returns [`CodecError::Kind`] for an unknown kind, [`CodecError::Body`] for an invalid body and
    /// [`CodecError::Surplus`] for trailing bytes.
    fn from_body(kind: u16, body: &[u8]) -> Result<Self, CodecError>;

    /// Decodes a whole packet.
    ///
    /// # Errors
    /// Returns a [`CodecError`] if header or body is invalid, or the packet has another length than its header says.
    fn decode(packet: &[u8]) -> Result<Self, CodecError> {
        let header = Header::parse(Self::PROTOCOL, packet)?;
        let body = &packet[HEADER..];
        if body.len() < header.length {
            return Err(CodecError::Truncated { got: packet.len(), needed: HEADER + header.length });
        }
        if body.len() > header.length {
            return Err(CodecError::Surplus(body.len() - header.length));
        }
        Self::from_body(header.kind, body)
    }
}

impl Header {
    /// Decodes and checks the header at the start of `bytes`, which need not contain the body yet.
    ///
    /// # Errors
    /// Returns a [`CodecError`] if the header is incomplete or invalid.
    pub fn parse(protocol: Protocol, bytes: &[u8]) -> Result<Self, CodecError> {
        let truncated = || CodecError::Truncated { got: bytes.len(), needed: HEADER };
        let (magic, rest) = bytes.split_first_chunk::<4>().ok_or_else(truncated)?;
        let (words, rest) = rest.split_first_chunk::<8>().ok_or_else(truncated)?;
        let length = u32::from_le_bytes(*rest.first_chunk::<4>().ok_or_else(truncated)?);
        if *magic != protocol.magic {
            return Err(CodecError::Magic(*magic));
        }
        let [newest, oldest, kind, flags] =
            [0, 2, 4, 6].map(|at| u16::from_le_bytes([words[at], words[at + 1]]));
        let versions = Versions { oldest, newest };
        protocol.versions.common(versions)?;
        if flags != 0 {
            return Err(CodecError::Flags(flags));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > protocol.max_body {
            return Err(CodecError::TooLong { length, max: protocol.max_body });
        }
        Ok(Self { versions, kind, length })
    }
}

/// Encodes the packet of one message.
///
/// # Errors
/// Returns [`CodecError::TooLong`] if the body exceeds the protocol's limit, and [`CodecError::Write`] if it cannot be
/// serialised.
pub fn encode<T: Serialize>(protocol: Protocol, kind: u16, body: &T) -> Result<Vec<u8>, CodecError> {
    let body = rmp_serde::to_vec_named(body).map_err(|source| CodecError::Write { kind, source })?;
    let too_long = || CodecError::TooLong { length: body.len(), max: protocol.max_body };
    let length = u32::try_from(body.len()).map_err(|_| too_long())?;
    if body.len() > protocol.max_body {
        return Err(too_long());
    }
    let mut packet = Vec::with_capacity(HEADER + body.len());
    packet.extend_from_slice(&protocol.magic);
    packet.extend_from_slice(&protocol.versions.newest.to_le_bytes());
    packet.extend_from_slice(&protocol.versions.oldest.to_le_bytes());
    packet.extend_from_slice(&kind.to_le_bytes());
    packet.extend_from_slice(&0u16.to_le_bytes());
    packet.extend_from_slice(&length.to_le_bytes());
    packet.extend_from_slice(&body);
    Ok(packet)
}

/// Decodes a value that occupies all of `body`.
///
/// # Errors
/// Returns [`CodecError::Body`] if `body` is invalid, and [`CodecError::Surplus`] if bytes follow the value.
pub fn decode_body<T: DeserializeOwned>(kind: u16, body: &[u8]) -> Result<T, CodecError> {
    let mut rest = body;
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(MAX_DEPTH);
    let value = T::deserialize(&mut reader).map_err(|source| CodecError::Body { kind, source })?;
    if rest.is_empty() { Ok(value) } else { Err(CodecError::Surplus(rest.len())) }
}

/// Defines the messages of a protocol: an enum with one body struct per variant, and each variant's kind and name.
///
/// ```
/// use baton_protocol::codec::{Message, Protocol};
/// use baton_protocol::version::Versions;
///
/// #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
/// pub struct Hello { pub name: String }
///
/// const PROTOCOL: Protocol =
///     Protocol { magic: *b"EXMP", versions: Versions { oldest: 1, newest: 1 }, max_body: 1024 };
///
/// baton_protocol::messages! {
///     /// The example's messages.
///     #[derive(Debug, PartialEq)]
///     pub enum Said: PROTOCOL {
///         /// The first message.
///         Hello(Hello) = 1 "HELLO",
///     }
/// }
///
/// let packet = Said::Hello(Hello { name: "A".to_owned() }).encode().unwrap();
/// assert_eq!(Said::decode(&packet).unwrap().kind(), 1);
/// ```
#[macro_export]
macro_rules! messages {
    (
        $(#[$meta:meta])*
        $visibility:vis enum $name:ident: $protocol:ident {
            $($(#[$variant_meta:meta])* $variant:ident($body:ty) = $kind:literal $packet:literal,)+
        }
    ) => {
        $(#[$meta])*
        $visibility enum $name {
            $($(#[$variant_meta])* $variant($body),)+
        }

        impl $crate::codec::Message for $name {
            const PROTOCOL: $crate::codec::Protocol = $protocol;

            fn kind(&self) -> u16 {
                match self {
                    $(Self::$variant(_) => $kind,)+
                }
            }

            fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $packet,)+
                }
            }

            fn encode(&self) -> Result<Vec<u8>, $crate::codec::CodecError> {
                match self {
                    $(Self::$variant(body) => $crate::codec::encode(Self::PROTOCOL, $kind, body),)+
                }
            }

            fn from_body(kind: u16, body: &[u8]) -> Result<Self, $crate::codec::CodecError> {
                match kind {
                    $($kind => $crate::codec::decode_body(kind, body).map(Self::$variant),)+
                    unknown => Err($crate::codec::CodecError::Kind(unknown)),
                }
            }
        }
    };
}
