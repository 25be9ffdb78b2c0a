//! Virtio features by bit number (virtio 1.2 §§2.2, 5.1.3, 6), and what Baton offers.

use baton_protocol::control::Datapath;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_config, virtio_net, virtio_ring};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const PROTOCOL_FEATURES: u32 = 30;
/// `VHOST_F_LOG_ALL`: the front-end logs every page that is written.
pub const LOG_ALL: u32 = 26;
/// `VIRTIO_F_ACCESS_PLATFORM`: addresses need translation. Not offered.
const ACCESS_PLATFORM: u32 = virtio_config::VIRTIO_F_ACCESS_PLATFORM;
/// `VIRTIO_F_RING_PACKED`: another ring layout. Not offered.
const RING_PACKED: u32 = virtio_config::VIRTIO_F_RING_PACKED;

/// The features that change the layout of rings, descriptors or headers, or the meaning of addresses.
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

/// Returns the vhost-user protocol features of a device. The `vhost` crate implements `REPLY_ACK` and always offers it.
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
    /// Returns whether feature `bit` is in the set.
    #[inline]
    pub const fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// Returns the set with the features in `bits` added.
    #[must_use]
    pub fn with(self, bits: &[u32]) -> Self {
        Self(bits.iter().fold(self.0, |set, bit| set | 1 << bit))
    }

    /// Returns the set without feature `bit`.
    #[must_use]
    pub fn without(self, bit: u32) -> Self {
        Self(self.0 & !(1 << bit))
    }

    /// Returns whether the virtio-net header has `num_buffers`.
    pub fn long_header(self) -> bool {
        self.has(virtio_config::VIRTIO_F_VERSION_1) || self.has(virtio_net::VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Returns the features in this set that change the layout of rings, descriptors or headers, or the meaning of
    /// addresses. Unlike other features they cannot be masked out: a driver that uses them cannot be served without.
    #[must_use]
    pub fn fundamental(self) -> Self {
        Self(FUNDAMENTAL.iter().fold(0, |set, bit| set | self.0 & 1 << bit))
    }
}

/// What determines which features a device offers in addition to those of every device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// `--mac` was given.
    pub mac: bool,
    /// `--mtu` was given.
    pub mtu: bool,
    /// The TAP supports UDP fragmentation offload.
    pub ufo: bool,
    /// The TAP supports UDP segmentation offload.
    pub uso: bool,
}

impl Offer {
    /// Returns the features that the device offers.
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
