//! The offloads of a TAP (`TUNSETOFFLOAD`).

use virtio_bindings::virtio_net;

use crate::features::Features;

/// `TUN_F_*`: the offloads that the reader of a TAP accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(pub(super) u32);

impl Offloads {
    /// `TUN_F_CSUM`.
    pub const CSUM: Self = Self(0x01);
    /// `TUN_F_TSO4`.
    pub const TSO4: Self = Self(0x02);
    /// `TUN_F_TSO6`.
    pub const TSO6: Self = Self(0x04);
    /// `TUN_F_TSO_ECN`.
    pub const ECN: Self = Self(0x08);
    /// `TUN_F_UFO`.
    pub const UFO: Self = Self(0x10);
    /// `TUN_F_USO4` and `TUN_F_USO6`. The kernel accepts only both together.
    pub const USO: Self = Self(0x60);

    /// Returns the union of both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl From<Features> for Offloads {
    /// Returns the offloads that the guest accepts, from the negotiated features.
    fn from(features: Features) -> Self {
        if !features.has(virtio_net::VIRTIO_NET_F_GUEST_CSUM) {
            return Self::default();
        }
        let tso4 = features.has(virtio_net::VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = features.has(virtio_net::VIRTIO_NET_F_GUEST_TSO6);
        let uso = features.has(virtio_net::VIRTIO_NET_F_GUEST_USO4)
            && features.has(virtio_net::VIRTIO_NET_F_GUEST_USO6);
        let ecn = features.has(virtio_net::VIRTIO_NET_F_GUEST_ECN) && (tso4 || tso6);
        let ufo = features.has(virtio_net::VIRTIO_NET_F_GUEST_UFO);
        [(tso4, Self::TSO4), (tso6, Self::TSO6), (ecn, Self::ECN), (ufo, Self::UFO), (uso, Self::USO)]
            .into_iter()
            .filter(|(on, _)| *on)
            .fold(Self::CSUM, |offloads, (_, more)| offloads.and(more))
    }
}
