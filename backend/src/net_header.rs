//! `struct virtio_net_hdr` (virtio 1.2 §5.1.6), as the TAP writes and reads it: 10 bytes, or 12 with `num_buffers` if
//! `VIRTIO_F_VERSION_1` or `VIRTIO_NET_F_MRG_RXBUF` was negotiated.
#![expect(unsafe_code, reason = "reads a header in guest memory")]

use virtio_bindings::virtio_net;

use crate::features::Features;

/// Length without `num_buffers`.
pub const SHORT: usize = 10;
/// Length with `num_buffers`.
pub const LONG: usize = 12;
/// Offset of `flags`.
pub const FLAGS: usize = 0;
/// Offset of `gso_type`.
pub const GSO_TYPE: usize = 1;
/// Offset of `hdr_len`.
const HDR_LEN: usize = 2;
/// Offset of `num_buffers`.
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

/// Clears an `hdr_len` beyond the end of `frame`, which begins with a header of `header` bytes. Returns whether it did.
/// A device must not rely on `hdr_len` (virtio 1.3 §5.1.6.2), but the kernel's TAP refuses such a frame.
pub fn mend_length(frame: &mut [u8], header: usize) -> bool {
    let length = frame.len().saturating_sub(header);
    let Some(field) = frame.get_mut(HDR_LEN..HDR_LEN + 2) else { return false };
    let beyond = usize::from(u16::from_le_bytes([field[0], field[1]])) > length;
    if beyond {
        field.fill(0);
    }
    beyond
}

/// Returns whether [`mend_length`] would mend the frame in `vectors`, `length` bytes long with its header. Returns true
/// if the field is not in the first vector.
///
/// # Safety
/// The first vector must be readable guest memory.
#[inline]
pub unsafe fn may_need_mending(vectors: &[libc::iovec], length: usize, header: usize) -> bool {
    match vectors.first() {
        Some(first) if first.iov_len >= HDR_LEN + 2 => {
            let field = first.iov_base.wrapping_byte_add(HDR_LEN).cast::<[u8; 2]>();
            // SAFETY: the field is inside the vector, and bytes need no alignment.
            let field = unsafe { field.read_volatile() };
            usize::from(u16::from_le_bytes(field)) > length.saturating_sub(header)
        }
        _ => true,
    }
}

/// The headers that the guest accepts, from the negotiated features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    checksum: bool,
    tso4: bool,
    tso6: bool,
    ecn: bool,
    ufo: bool,
    uso: bool,
}

/// What to do with a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Deliver it unchanged.
    Pass,
    /// Deliver it with `flags` 0 (virtio 1.2 §5.1.6.4.1: without `GUEST_CSUM` no flag may be set).
    ClearFlags,
    /// Drop it: it was queued while other offloads were on, and the guest cannot read it.
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
    fn guest_without_offloads_gets_neither_flags_nor_segments() {
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
