//! How a message is laid out: a fixed header that can be read without the body, then the body in MessagePack with
//! field names. All numbers of the header are little endian.
//!
//! ```text
//!   0  magic           u32   which protocol
//!   4  newest          u16   the sender's newest version, in which this is written
//!   6  oldest          u16   the oldest version that the sender understands
//!   8  kind            u16   which message
//!  10  flags           u16   0
//!  12  length          u32   bytes of body
//!  16  body
//! ```
//! A reader skips the fields that it does not know and has a default for those that came later than the oldest
//! version, so either side may be the newer one. Unknown kinds are errors. A body is bounded by its protocol before
//! anything is allocated for it, and everything in it takes its memory from there.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::version::{VersionError, Versions};

/// Bytes of a header.
pub const HEADER: usize = 16;

/// How deep the values of a body may be nested. Messages need a few levels.
const MAX_DEPTH: usize = 32;

/// One of Baton's protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The first four bytes of each packet.
    pub magic: [u8; 4],
    /// What this build speaks.
    pub versions: Versions,
    /// The longest body, in bytes.
    pub max_body: usize,
}

/// A packet's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the sender speaks.
    pub versions: Versions,
    /// Which message.
    pub kind: u16,
    /// Bytes of body.
    pub length: usize,
}

/// Why bytes are no message, or a message cannot become bytes.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Fewer bytes than a header has, or than the header says.
    #[error("a message ends after {got} bytes of {needed}")]
    Truncated {
        /// How many there are.
        got: usize,
        /// How many there should be.
        needed: usize,
    },
    /// Not this protocol.
    #[error("this is no message of this protocol: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// No common version.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// A flag that no version so far knows.
    #[error("a message has unknown flags: {0:#06x}")]
    Flags(u16),
    /// More than the protocol allows.
    #[error("a message's body has {length} bytes, more than {max}")]
    TooLong {
        /// What it has.
        length: usize,
        /// What is allowed.
        max: usize,
    },
    /// Bytes after the body.
    #[error("{0} bytes follow a message")]
    Surplus(usize),
    /// A kind that this version does not know.
    #[error("unknown message {0}")]
    Kind(u16),
    /// The body makes no sense.
    #[error("the body of message {kind} makes no sense")]
    Body {
        /// Which message.
        kind: u16,
        /// What is wrong.
        #[source]
        source: rmp_serde::decode::Error,
    },
    /// The body cannot be written.
    #[error("cannot write the body of message {kind}")]
    Write {
        /// Which message.
        kind: u16,
        /// Why.
        #[source]
        source: rmp_serde::encode::Error,
    },
}

/// All messages of a protocol, made by [`messages!`](crate::messages).
pub trait Message: Sized {
    /// Which protocol.
    const PROTOCOL: Protocol;

    /// The header's word for this message.
    fn kind(&self) -> u16;

    /// The packet's name, for logs and errors.
    fn name(&self) -> &'static str;

    /// The whole packet: header and body.
    ///
    /// # Errors
    /// [`CodecError::TooLong`] and [`CodecError::Write`].
    fn encode(&self) -> Result<Vec<u8>, CodecError>;

    /// The message of `kind` with this body.
    ///
    /// # Errors
    /// [`CodecError::Kind`], [`CodecError::Body`] and [`CodecError::Surplus`].
    fn from_body(kind: u16, body: &[u8]) -> Result<Self, CodecError>;

    /// The message in a whole packet.
    ///
    /// # Errors
    /// [`CodecError`].
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
    /// Reads and checks the header at the start of `bytes`; the body need not be there yet.
    ///
    /// # Errors
    /// [`CodecError`], but for those of a body.
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

/// The packet of one message.
///
/// # Errors
/// [`CodecError::TooLong`] and [`CodecError::Write`].
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

/// The value that `body` is, to its last byte.
///
/// # Errors
/// [`CodecError::Body`] and [`CodecError::Surplus`].
pub fn decode_body<T: DeserializeOwned>(kind: u16, body: &[u8]) -> Result<T, CodecError> {
    let mut rest = body;
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(MAX_DEPTH);
    let value = T::deserialize(&mut reader).map_err(|source| CodecError::Body { kind, source })?;
    if rest.is_empty() { Ok(value) } else { Err(CodecError::Surplus(rest.len())) }
}

/// Defines the messages of a protocol: an enum with one struct in each variant, and the header's word for each.
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
///     /// What is said.
///     #[derive(Debug, PartialEq)]
///     pub enum Said: PROTOCOL {
///         /// The first word.
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
