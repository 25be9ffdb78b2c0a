//! Virtio features by bit number (virtio 1.2 §§2.2, 5.1.3, 6), and what Baton offers.

use baton_protocol::control::Datapath;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_config, virtio_net, virtio_ring};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const PROTOCOL_FEATURES: u32 = 30;
/// `VHOST_F_LOG_ALL`: the front-end wants to know of every page that is written.
pub const LOG_ALL: u32 = 26;
/// `VIRTIO_F_ACCESS_PLATFORM`: addresses would need translation, which is not offered.
const ACCESS_PLATFORM: u32 = virtio_config::VIRTIO_F_ACCESS_PLATFORM;
/// `VIRTIO_F_RING_PACKED`: another ring layout, which is not offered.
const RING_PACKED: u32 = virtio_config::VIRTIO_F_RING_PACKED;

/// What decides how rings, descriptors and headers are laid out.
const FUNDAMENTAL: [u32; 7] = [
    ACCESS_PLATFORM,
    RING_PACKED,
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
    virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    // A header of 20 bytes (virtio 1.2 §5.1.6).
    virtio_net::VIRTIO_NET_F_HASH_REPORT,
];

/// The vhost-user protocol features of a device. `REPLY_ACK` is the `vhost` crate's own, and always offered.
pub fn protocol_offer(datapath: Datapath) -> VhostUserProtocolFeatures {
    let offer = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::DEVICE_STATE;
    match datapath {
        Datapath::Userspace => offer | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        // The kernel keeps no such region.
        Datapath::VhostNet => offer,
    }
}

/// A set of virtio features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Whether feature `bit` is in the set.
    #[inline]
    pub const fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// The set with the features in `bits`, too.
    #[must_use]
    pub fn with(self, bits: &[u32]) -> Self {
        Self(bits.iter().fold(self.0, |set, bit| set | 1 << bit))
    }

    /// The set without feature `bit`.
    #[must_use]
    pub fn without(self, bit: u32) -> Self {
        Self(self.0 & !(1 << bit))
    }

    /// Whether the virtio-net header has its `num_buffers`.
    pub fn long_header(self) -> bool {
        self.has(virtio_config::VIRTIO_F_VERSION_1) || self.has(virtio_net::VIRTIO_NET_F_MRG_RXBUF)
    }

    /// The features in this set which change the layout of rings, descriptors or headers, or what addresses mean. A
    /// driver that has them cannot be served without: unlike the rest they cannot be left out of a peer's choice.
    #[must_use]
    pub fn fundamental(self) -> Self {
        Self(FUNDAMENTAL.iter().fold(0, |set, bit| set | self.0 & 1 << bit))
    }
}

/// What decides which features a device has, beyond what every device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// `--mac` was given.
    pub mac: bool,
    /// `--mtu` was given.
    pub mtu: bool,
    /// The TAP does UDP fragmentation offload.
    pub ufo: bool,
    /// The TAP does UDP segmentation offload.
    pub uso: bool,
}

impl Offer {
    /// The features of the device.
    pub fn features(self) -> Features {
        let mut features = Features::default().with(&[
            PROTOCOL_FEATURES,
            LOG_ALL,
            virtio_config::VIRTIO_F_VERSION_1,
            virtio_config::VIRTIO_F_IN_ORDER,
            virtio_ring::VIRTIO_RING_F_EVENT_IDX,
            virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
            virtio_net::VIRTIO_NET_F_MRG_RXBUF,
            virtio_net::VIRTIO_NET_F_CSUM,
            virtio_net::VIRTIO_NET_F_GUEST_CSUM,
            virtio_net::VIRTIO_NET_F_HOST_TSO4,
            virtio_net::VIRTIO_NET_F_HOST_TSO6,
            virtio_net::VIRTIO_NET_F_HOST_ECN,
            virtio_net::VIRTIO_NET_F_GUEST_TSO4,
            virtio_net::VIRTIO_NET_F_GUEST_TSO6,
            virtio_net::VIRTIO_NET_F_GUEST_ECN,
            virtio_net::VIRTIO_NET_F_STATUS,
            virtio_net::VIRTIO_NET_F_CTRL_VQ,
            virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE,
            virtio_net::VIRTIO_NET_F_MQ,
        ]);
        if self.mac {
            features = features.with(&[virtio_net::VIRTIO_NET_F_MAC]);
        }
        if self.mtu {
            features = features.with(&[virtio_net::VIRTIO_NET_F_MTU]);
        }
        if self.ufo {
            features =
                features.with(&[virtio_net::VIRTIO_NET_F_HOST_UFO, virtio_net::VIRTIO_NET_F_GUEST_UFO]);
        }
        if self.uso {
            features = features.with(&[
                virtio_net::VIRTIO_NET_F_HOST_USO,
                virtio_net::VIRTIO_NET_F_GUEST_USO4,
                virtio_net::VIRTIO_NET_F_GUEST_USO6,
            ]);
        }
        features
    }
}
