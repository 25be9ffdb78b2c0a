//! The network device's feature bits and the header before every frame (virtio 1.3, §5.1).

/// Feature bits (virtio 1.3, §5.1.3 and §6).
pub mod features {
    /// `VIRTIO_NET_F_CSUM`: the device takes frames with a partial checksum.
    pub const CSUM: u64 = 1 << 0;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the driver takes frames with a partial checksum.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_MTU`
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_GUEST_ECN`
    pub const GUEST_ECN: u64 = 1 << 9;
    /// `VIRTIO_NET_F_GUEST_UFO`
    pub const GUEST_UFO: u64 = 1 << 10;
    /// `VIRTIO_NET_F_HOST_TSO4`
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_HOST_ECN`
    pub const HOST_ECN: u64 = 1 << 13;
    /// `VIRTIO_NET_F_HOST_UFO`
    pub const HOST_UFO: u64 = 1 << 14;
    /// `VIRTIO_NET_F_MRG_RXBUF`
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_CTRL_VQ`
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `VIRTIO_NET_F_GUEST_ANNOUNCE`
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// `VIRTIO_NET_F_MQ`
    pub const MQ: u64 = 1 << 22;
    /// `VHOST_F_LOG_ALL`: the back-end logs every page that it writes.
    pub const LOG_ALL: u64 = 1 << 26;
    /// `VIRTIO_F_INDIRECT_DESC`
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1`
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_IN_ORDER`
    pub const IN_ORDER: u64 = 1 << 35;
    /// `VIRTIO_NET_F_GUEST_USO4`
    pub const GUEST_USO4: u64 = 1 << 54;
    /// `VIRTIO_NET_F_GUEST_USO6`
    pub const GUEST_USO6: u64 = 1 << 55;
    /// `VIRTIO_NET_F_HOST_USO`
    pub const HOST_USO: u64 = 1 << 56;
}

/// [`NetHeader::flags`]: the checksum is partial.
pub const NEEDS_CSUM: u8 = 1;
/// [`NetHeader::flags`]: the checksum has been verified.
pub const DATA_VALID: u8 = 2;
/// [`NetHeader::gso_type`]: one frame.
pub const GSO_NONE: u8 = 0;
/// [`NetHeader::gso_type`]: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// [`NetHeader::gso_type`]: UDP fragmentation.
pub const GSO_UDP: u8 = 3;
/// [`NetHeader::gso_type`]: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// [`NetHeader::gso_type`]: UDP segmentation.
pub const GSO_UDP_L4: u8 = 5;

/// The header before every frame (virtio 1.3, §5.1.6), little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` values.
    pub gso_type: u8,
    /// The length of the headers, which are copied into every segment.
    pub hdr_len: u16,
    /// The largest payload of a segment.
    pub gso_size: u16,
    /// Where the checksummed part begins.
    pub csum_start: u16,
    /// The offset of the checksum in that part.
    pub csum_offset: u16,
    /// How many receive buffers hold the frame; absent in a header of ten bytes.
    pub num_buffers: u16,
}

impl NetHeader {
    /// The header's length with these features: `num_buffers` is present only with `VERSION_1` or `MRG_RXBUF`.
    pub fn length(features: u64) -> usize {
        if features & (features::VERSION_1 | features::MRG_RXBUF) == 0 { 10 } else { 12 }
    }

    /// All twelve bytes.
    pub fn encode(&self) -> [u8; 12] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let numbers = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (place, number) in bytes[2..].chunks_exact_mut(2).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Reads a header of ten or twelve bytes.
    pub fn decode(bytes: &[u8]) -> Self {
        let number =
            |offset| bytes.get(offset..offset + 2).map_or(0, |pair| u16::from_le_bytes([pair[0], pair[1]]));
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
            num_buffers: number(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_round_trip() {
        let header = NetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 3,
        };
        let bytes = header.encode();
        assert_eq!(bytes, [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 3, 0]);
        assert_eq!(NetHeader::decode(&bytes), header);
        assert_eq!(NetHeader::decode(&bytes[..10]), NetHeader { num_buffers: 0, ..header });
    }

    #[test]
    fn only_the_legacy_header_is_short() {
        assert_eq!(NetHeader::length(0), 10);
        assert_eq!(NetHeader::length(features::MRG_RXBUF), 12);
        assert_eq!(NetHeader::length(features::VERSION_1), 12);
    }
}
