//! What a network device offers its guest: features, address, configuration space.

use baton_protocol::migration::state::NetIdentity;
use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::config::Mac;
use crate::vhost_user::frontend::{CONFIG_SIZE, Offer};
use crate::virtio::feature;

/// `VIRTIO_F_IN_ORDER`.
const IN_ORDER: u32 = 35;
/// The smallest MTU that a device may have (RFC 791).
const MIN_MTU: u16 = 68;

/// The features that need the back-end: offered to the guest if the back-end offers them, and acknowledged to the
/// back-end.
const BACKEND_FEATURES: u64 = feature(VIRTIO_NET_F_CSUM)
    | feature(VIRTIO_NET_F_GUEST_CSUM)
    | feature(VIRTIO_NET_F_MTU)
    | feature(VIRTIO_NET_F_GUEST_TSO4)
    | feature(VIRTIO_NET_F_GUEST_TSO6)
    | feature(VIRTIO_NET_F_GUEST_ECN)
    | feature(VIRTIO_NET_F_GUEST_UFO)
    | feature(VIRTIO_NET_F_HOST_TSO4)
    | feature(VIRTIO_NET_F_HOST_TSO6)
    | feature(VIRTIO_NET_F_HOST_ECN)
    | feature(VIRTIO_NET_F_HOST_UFO)
    | feature(VIRTIO_NET_F_MRG_RXBUF)
    | feature(VIRTIO_NET_F_GUEST_ANNOUNCE)
    | feature(VIRTIO_NET_F_MQ)
    | feature(VIRTIO_NET_F_GUEST_USO4)
    | feature(VIRTIO_NET_F_GUEST_USO6)
    | feature(VIRTIO_NET_F_HOST_USO)
    | feature(VIRTIO_RING_F_INDIRECT_DESC)
    | feature(VIRTIO_RING_F_EVENT_IDX)
    | feature(VIRTIO_F_VERSION_1)
    | feature(IN_ORDER);

/// The features that the VMM serves itself.
const OWN_FEATURES: u64 =
    feature(VIRTIO_NET_F_MAC) | feature(VIRTIO_NET_F_STATUS) | feature(VIRTIO_NET_F_CTRL_VQ);

/// Why a back-end does not fit its device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OfferError {
    /// Several queue pairs, and a back-end for one.
    #[error("the back-end does not offer VIRTIO_NET_F_MQ, which {0} queue pairs need")]
    NoMultiQueue(u16),
    /// A back-end that offers less than the guest uses.
    #[error("the back-end does not offer the features {0:#x}, which the guest uses")]
    FeaturesLost(u64),
}

/// What the guest is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The virtio features.
    pub features: u64,
    /// The MAC address.
    pub mac: Mac,
    /// The MTU, if the feature is offered.
    pub mtu: u16,
    /// The number of queue pairs.
    pub queue_pairs: u16,
}

impl Identity {
    /// Derives the identity from a back-end's offer. `mac` is the configured address, if any. `fallback` is used if
    /// neither the configuration nor the back-end gives an address.
    pub fn new(offer: &Offer, queue_pairs: u16, mac: Option<Mac>, fallback: Mac) -> Result<Self, OfferError> {
        let mut features = offer.features & BACKEND_FEATURES | OWN_FEATURES;
        if queue_pairs == 1 {
            features &= !feature(VIRTIO_NET_F_MQ);
        } else if features & feature(VIRTIO_NET_F_MQ) == 0 {
            return Err(OfferError::NoMultiQueue(queue_pairs));
        }
        let config = offer.config.unwrap_or_default();
        let [m0, m1, m2, m3, m4, m5, _, _, _, _, mtu_low, mtu_high] = config;
        let mtu = u16::from_le_bytes([mtu_low, mtu_high]);
        if mtu < MIN_MTU {
            features &= !feature(VIRTIO_NET_F_MTU);
        }
        let offered_mac = Mac([m0, m1, m2, m3, m4, m5]);
        let offers_mac = offer.features & feature(VIRTIO_NET_F_MAC) != 0 && offered_mac.is_unicast();
        let mac = mac.unwrap_or(if offers_mac { offered_mac } else { fallback });
        Ok(Self { features, mac, mtu, queue_pairs })
    }

    /// Returns the configuration space (`struct virtio_net_config`).
    pub fn config_space(&self, status: u16) -> [u8; CONFIG_SIZE] {
        let mut space = [0; CONFIG_SIZE];
        space[..6].copy_from_slice(&self.mac.0);
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

impl From<Identity> for NetIdentity {
    fn from(identity: Identity) -> Self {
        let Identity { features, mac, mtu, queue_pairs } = identity;
        Self { features, mac: mac.0, mtu, queue_pairs }
    }
}

impl From<NetIdentity> for Identity {
    fn from(identity: NetIdentity) -> Self {
        let NetIdentity { features, mac, mtu, queue_pairs } = identity;
        Self { features, mac: Mac(mac), mtu, queue_pairs }
    }
}

/// Returns the acknowledged features that concern the back-end.
pub fn for_backend(acknowledged: u64) -> u64 {
    acknowledged & BACKEND_FEATURES
}

/// Checks that a back-end offers every feature that the guest has acknowledged.
pub fn check_offer(acknowledged: u64, offer: &Offer) -> Result<(), OfferError> {
    match for_backend(acknowledged) & !offer.features {
        0 => Ok(()),
        lost => Err(OfferError::FeaturesLost(lost)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FALLBACK: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const BACKEND: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    const EVERYTHING: Offer =
        Offer { features: u64::MAX, config: Some([0x52, 0x54, 0, 1, 2, 3, 1, 0, 4, 0, 0x78, 0x05]) };

    fn has(identity: &Identity, bit: u32) -> bool {
        identity.features & feature(bit) != 0
    }

    #[test]
    fn only_features_of_both_vmm_and_back_end_are_offered() {
        let identity = Identity::new(&EVERYTHING, 4, None, FALLBACK).unwrap();
        assert_eq!(identity.features, BACKEND_FEATURES | OWN_FEATURES);
        let least = Offer { features: feature(VIRTIO_F_VERSION_1), config: None };
        let identity = Identity::new(&least, 1, None, FALLBACK).unwrap();
        assert_eq!(identity.features, feature(VIRTIO_F_VERSION_1) | OWN_FEATURES);
    }

    #[test]
    fn multi_queue_is_required_for_several_pairs_and_not_offered_for_one() {
        let without = Offer { features: !feature(VIRTIO_NET_F_MQ), ..EVERYTHING };
        assert_eq!(Identity::new(&without, 2, None, FALLBACK), Err(OfferError::NoMultiQueue(2)));
        assert!(!has(&Identity::new(&EVERYTHING, 1, None, FALLBACK).unwrap(), VIRTIO_NET_F_MQ));
    }

    #[test]
    fn configured_mac_takes_precedence_over_the_back_ends() {
        let configured = Mac([0x52, 0x54, 0, 9, 9, 9]);
        let mac = |offer: &Offer, mac| Identity::new(offer, 1, mac, FALLBACK).unwrap().mac;
        assert_eq!(mac(&EVERYTHING, Some(configured)), configured);
        assert_eq!(mac(&EVERYTHING, None), BACKEND);
        let no_feature = Offer { features: !feature(VIRTIO_NET_F_MAC), ..EVERYTHING };
        assert_eq!(mac(&no_feature, None), FALLBACK);
        let no_address = Offer { config: Some([0; CONFIG_SIZE]), ..EVERYTHING };
        assert_eq!(mac(&no_address, None), FALLBACK);
    }

    #[test]
    fn invalid_mtu_is_not_offered() {
        assert_eq!(Identity::new(&EVERYTHING, 1, None, FALLBACK).unwrap().mtu, 1400);
        for config in [None, Some([0; CONFIG_SIZE])] {
            let offer = Offer { config, ..EVERYTHING };
            assert!(!has(&Identity::new(&offer, 1, None, FALLBACK).unwrap(), VIRTIO_NET_F_MTU));
        }
    }

    #[test]
    fn back_end_gets_only_its_own_features() {
        assert_eq!(
            for_backend(OWN_FEATURES | feature(VIRTIO_NET_F_MRG_RXBUF)),
            feature(VIRTIO_NET_F_MRG_RXBUF)
        );
        let lost = Offer { features: !feature(VIRTIO_NET_F_CSUM), config: None };
        assert_eq!(check_offer(OWN_FEATURES | feature(VIRTIO_NET_F_MQ), &lost), Ok(()));
        assert_eq!(check_offer(feature(VIRTIO_NET_F_CSUM), &lost), Err(OfferError::FeaturesLost(1)));
    }
}
