//! `struct virtio_net_hdr` (virtio 1.2 §5.1.6), as the TAP writes and reads it: 10 bytes, and 12 with the number of
//! buffers where `VIRTIO_F_VERSION_1` or `VIRTIO_NET_F_MRG_RXBUF` was negotiated.

use virtio_bindings::virtio_net;

use crate::features::Features;

/// Length without `num_buffers`.
pub const SHORT: usize = 10;
/// Length with it.
pub const LONG: usize = 12;
/// Where `flags` lies.
pub const FLAGS: usize = 0;
/// Where `gso_type` lies.
pub const GSO_TYPE: usize = 1;
/// Where `hdr_len` lies.
const HDR_LEN: usize = 2;
/// Where `num_buffers` lies.
pub const NUM_BUFFERS: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_UDP`.
const GSO_UDP: u8 = 3;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, with one of the others.
const GSO_ECN: u8 = 0x80;

/// Clears an `hdr_len` beyond the end of `frame`, which begins with its header of `header` bytes. It is a hint that a
/// device must not rely on (virtio 1.3 §5.1.6.2), but the kernel's TAP refuses such a frame. Gives whether it did.
pub fn mend_length(frame: &mut [u8], header: usize) -> bool {
    let length = frame.len().saturating_sub(header);
    let Some(field) = frame.get_mut(HDR_LEN..HDR_LEN + 2) else { return false };
    let beyond = usize::from(u16::from_le_bytes([field[0], field[1]])) > length;
    if beyond {
        field.fill(0);
    }
    beyond
}

/// Which headers the guest can take, from the features it accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    checksum: bool,
    tso4: bool,
    tso6: bool,
    ecn: bool,
    ufo: bool,
    uso: bool,
}

/// What is to be done with a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as the guest wants it.
    Pass,
    /// It is, once `flags` is 0 (virtio 1.2 §5.1.6.4.1: without `GUEST_CSUM` no flag may be set).
    ClearFlags,
    /// It was queued when other offloads were on, and the guest could not read it.
    Drop,
}

impl From<Features> for Accepted {
    fn from(features: Features) -> Self {
        let has = |bit| features.has(bit);
        Self {
            checksum: has(virtio_net::VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(virtio_net::VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(virtio_net::VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(virtio_net::VIRTIO_NET_F_GUEST_ECN),
            ufo: has(virtio_net::VIRTIO_NET_F_GUEST_UFO),
            uso: has(virtio_net::VIRTIO_NET_F_GUEST_USO4) && has(virtio_net::VIRTIO_NET_F_GUEST_USO6),
        }
    }
}

impl Accepted {
    /// Judges a frame by its header's `flags` and `gso_type`.
    #[inline]
    pub fn judge(&self, flags: u8, gso_type: u8) -> Verdict {
        if flags == 0 && gso_type == 0 {
            return Verdict::Pass;
        }
        if !self.checksum && (flags & NEEDS_CSUM != 0 || gso_type != 0) {
            return Verdict::Drop;
        }
        let segmented = match gso_type & !GSO_ECN {
            0 => true,
            GSO_TCPV4 => self.tso4,
            GSO_TCPV6 => self.tso6,
            GSO_UDP => self.ufo,
            GSO_UDP_L4 => self.uso,
            _ => false,
        };
        if !segmented || (gso_type & GSO_ECN != 0 && !self.ecn) {
            Verdict::Drop
        } else if self.checksum {
            Verdict::Pass
        } else {
            Verdict::ClearFlags
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_offloads_gets_neither_flags_nor_segments() {
        let none = Accepted::default();
        assert_eq!(none.judge(0, 0), Verdict::Pass);
        assert_eq!(none.judge(2, 0), Verdict::ClearFlags);
        assert_eq!(none.judge(NEEDS_CSUM, 0), Verdict::Drop);
        assert_eq!(none.judge(0, GSO_TCPV4), Verdict::Drop);
    }

    #[test]
    fn each_segmentation_needs_its_own_feature() {
        let some = Accepted { checksum: true, tso4: true, ..Accepted::default() };
        assert_eq!(some.judge(NEEDS_CSUM, GSO_TCPV4), Verdict::Pass);
        assert_eq!(some.judge(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN), Verdict::Drop);
        assert_eq!(some.judge(NEEDS_CSUM, GSO_TCPV6), Verdict::Drop);
        assert_eq!(some.judge(NEEDS_CSUM, GSO_UDP_L4), Verdict::Drop);
        assert_eq!(some.judge(NEEDS_CSUM, 0x7f), Verdict::Drop);
    }
}
