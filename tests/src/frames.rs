//! The frames that tests send: numbered frames that can be told apart, and TCP and UDP frames for the offloads.

use crate::fake_frontend::net::{NEEDS_CSUM, NetHeader};

/// The length of an Ethernet header.
pub const ETHERNET: usize = 14;

/// The ethertype for local experiments (IEEE 802, "Local Experimental Ethertype 1"): no network stack answers to it.
const EXPERIMENTAL: u16 = 0x88b5;

/// The shortest [`numbered`] frame.
pub const SHORTEST: usize = ETHERNET + 4;

/// Builds a frame of `length` bytes that carries `number`, followed by bytes that depend on it.
///
/// # Panics
/// Panics if `length` is less than [`SHORTEST`].
pub fn numbered(number: u32, length: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(length);
    write_numbered(&mut frame, number, length);
    frame
}

/// As [`numbered`], but reuses a vector.
///
/// # Panics
/// Panics if `length` is less than [`SHORTEST`].
pub fn write_numbered(frame: &mut Vec<u8>, number: u32, length: usize) {
    assert!(length >= SHORTEST, "a frame of {length} bytes is too short for a number");
    frame.clear();
    frame.extend_from_slice(&[0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2]);
    frame.extend_from_slice(&EXPERIMENTAL.to_be_bytes());
    frame.extend_from_slice(&number.to_be_bytes());
    let [.., seed] = number.to_be_bytes();
    frame.resize_with(length, {
        let mut byte = seed;
        move || {
            byte = byte.wrapping_mul(29).wrapping_add(113);
            byte
        }
    });
}

/// The number of a [`numbered`] frame. Returns `None` if the frame is not one, or was damaged.
pub fn number_of(frame: &[u8]) -> Option<u32> {
    let number = u32::from_be_bytes(frame.get(ETHERNET..SHORTEST)?.try_into().ok()?);
    (numbered(number, frame.len()) == frame).then_some(number)
}

/// Whether the Ethernet header of a [`numbered`] frame appears anywhere in these bytes.
pub fn appear_in(bytes: &[u8]) -> bool {
    let start = numbered(0, SHORTEST);
    bytes.windows(ETHERNET).any(|window| window == &start[..ETHERNET])
}

/// The network protocol of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// IPv4, 20 bytes of header.
    V4,
    /// IPv6, 40 bytes of header.
    V6,
}

/// The transport protocol of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, 20 bytes of header.
    Tcp,
    /// UDP, 8 bytes of header.
    Udp,
}

/// An IP frame whose transport checksum covers only the pseudo-header, as `NEEDS_CSUM` requires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The frame.
    pub bytes: Vec<u8>,
    /// Where the transport header begins: the header's `csum_start`.
    pub transport_offset: usize,
    /// Where in the transport header the checksum is: the header's `csum_offset`.
    pub checksum_offset: usize,
    /// Where the payload begins: the header's `hdr_len`.
    pub payload_offset: usize,
}

impl Segment {
    /// The virtio-net header for this frame.
    ///
    /// # Panics
    /// Never: the offsets are within the first bytes of the frame.
    pub fn header(&self, gso_type: u8, gso_size: u16) -> NetHeader {
        let offset = |offset| u16::try_from(offset).expect("an offset into the headers");
        NetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: offset(self.payload_offset),
            gso_size,
            csum_start: offset(self.transport_offset),
            csum_offset: offset(self.checksum_offset),
            num_buffers: 0,
        }
    }
}

/// Builds a frame with this payload. The IP packet has at most 65,535 bytes.
///
/// # Panics
/// Panics if the payload is too long.
pub fn segment(network: Network, transport: Transport, payload: &[u8]) -> Segment {
    let (transport_header, protocol, checksum_offset) = match transport {
        Transport::Tcp => (20, 6u8, 16),
        Transport::Udp => (8, 17u8, 6),
    };
    let length = u16::try_from(transport_header + payload.len()).expect("a segment that fits");
    let mut bytes = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    let mut sum;
    match network {
        Network::V4 => {
            let total = length.checked_add(20).expect("a packet that fits");
            let start = bytes.len() + 2;
            bytes.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
            bytes.extend_from_slice(&total.to_be_bytes());
            bytes.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let header_sum = !fold(add(0, &bytes[start..]));
            bytes[start + 10..start + 12].copy_from_slice(&header_sum.to_be_bytes());
            sum = add(0, &bytes[start + 12..]);
        }
        Network::V6 => {
            bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(&[protocol, 64]);
            let addresses = bytes.len();
            for last in [1, 2] {
                bytes.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
            }
            sum = add(0, &bytes[addresses..]);
        }
    }
    sum = sum + u32::from(protocol) + u32::from(length);
    let transport_offset = bytes.len();
    bytes.extend_from_slice(&[0x9c, 0x40, 0x9c, 0x41]);
    match transport {
        Transport::Tcp => {
            bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        }
        Transport::Udp => {
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(&[0, 0]);
        }
    }
    let place = transport_offset + checksum_offset;
    bytes[place..place + 2].copy_from_slice(&fold(sum).to_be_bytes());
    let payload_offset = bytes.len();
    bytes.extend_from_slice(payload);
    Segment { bytes, transport_offset, checksum_offset, payload_offset }
}

/// Whether the transport checksum of an IP frame without options is correct.
pub fn checksum_is_right(frame: &[u8]) -> bool {
    let (addresses, transport, protocol) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (&frame[26..34], 34, frame[23]),
        Some([0x86, 0xdd]) => (&frame[22..54], 54, frame[20]),
        _ => return false,
    };
    let Ok(length) = u32::try_from(frame.len() - transport) else { return false };
    let sum = add(add(0, addresses), &frame[transport..]) + u32::from(protocol) + length;
    fold(sum) == 0xffff
}

/// Adds 16-bit words to a ones' complement sum (RFC 1071).
fn add(sum: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(sum, |sum, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        sum + u32::from(word)
    })
}

/// Folds a ones' complement sum into 16 bits.
fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_only_from_an_undamaged_frame() {
        let mut frame = numbered(123_456, 1000);
        assert_eq!(number_of(&frame), Some(123_456));
        frame[999] ^= 1;
        assert_eq!(number_of(&frame), None);
        assert_eq!(number_of(&[0; 10]), None);
    }

    #[test]
    fn a_completed_checksum_is_correct() {
        for network in [Network::V4, Network::V6] {
            for transport in [Transport::Tcp, Transport::Udp] {
                let mut segment = segment(network, transport, &[0xab; 101]);
                assert!(!checksum_is_right(&segment.bytes));
                let sum = !fold(add(0, &segment.bytes[segment.transport_offset..]));
                let place = segment.transport_offset + segment.checksum_offset;
                segment.bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
                assert!(checksum_is_right(&segment.bytes), "{network:?} {transport:?}");
            }
        }
    }
}
