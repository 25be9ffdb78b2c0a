//! A network device as its guest sees it: features, configuration space, and the way to its thread.
//!
//! [`Net`] stands behind the transport and is used by the vCPU threads; everything that concerns the back-end is
//! done by the device's own thread ([`super::net_worker`]), which alone owns the connection. The two share
//! [`NetShared`]. The vCPU that resets the device waits for the thread, because a driver gives its memory another use
//! after that; to start the device it does not wait, since what the driver asks for meanwhile is kept for the back-end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_protocol::control::{Frontend as Connection, NetStatus};
use baton_protocol::migration::facts::NetFacts;
use baton_protocol::migration::state::{DriverState, NetIdentity, NetState, Outline};
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::net_thread::NetError;
use super::{Activation, DeviceEvents, VirtioDevice, feature};
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::memory::GuestMemory;
use crate::mmio_bus::Pending;
use crate::vhost_user::frontend::{CONFIG_SIZE, Cutter, Offer};

/// The largest size of a data virtqueue.
pub const DATA_QUEUE_SIZE: u16 = 1024;
/// The largest size of the control virtqueue.
pub const CONTROL_QUEUE_SIZE: u16 = 64;
/// `VIRTIO_F_IN_ORDER`.
const IN_ORDER: u32 = 35;
/// The smallest MTU that a device may have (RFC 791).
const MIN_MTU: u16 = 68;

/// The features that need the back-end: offered to the guest if it offers them, and acknowledged to it.
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
    #[error("it does not offer VIRTIO_NET_F_MQ, which {0} queue pairs need")]
    NoMultiQueue(u16),
    /// A back-end that came back with less than the guest uses.
    #[error("it does not offer the features {0:#x}, which the guest uses")]
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
    /// How many queue pairs the device has.
    pub queue_pairs: u16,
}

impl Identity {
    /// What comes of a back-end's offer. `mac` is the configured address or none; `fallback` is used if neither it nor
    /// the back-end names one.
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

    /// The configuration space (`struct virtio_net_config`).
    fn config_space(&self, status: u16) -> [u8; CONFIG_SIZE] {
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

/// Of the features that a guest acknowledged, those that its back-end has to know of.
pub fn for_backend(acknowledged: u64) -> u64 {
    acknowledged & BACKEND_FEATURES
}

/// What a guest needs of a back-end that takes the place of another.
pub fn check_offer(acknowledged: u64, offer: &Offer) -> Result<(), OfferError> {
    match for_backend(acknowledged) & !offer.features {
        0 => Ok(()),
        lost => Err(OfferError::FeaturesLost(lost)),
    }
}

/// What changes while the device lives.
#[derive(Clone, Copy, Debug)]
struct Live {
    identity: Identity,
    connected: bool,
    /// What the back-end offers.
    offered: u64,
    /// Whether it can give or take device state.
    device_state: bool,
    acknowledged: u64,
    active_pairs: u16,
    announce: bool,
}

/// What the transport's side, the device's thread and the control socket share.
#[derive(Debug)]
pub struct NetShared {
    config: NetConfig,
    queue_pairs: u16,
    live: Mutex<Live>,
    cutter: Mutex<Option<Cutter>>,
    /// What the driver is told unasked.
    pub events: DeviceEvents,
    /// One for each virtqueue: the driver's notifications.
    pub kicks: Vec<EventFd>,
    /// One for each virtqueue: the device's interrupts.
    pub calls: Vec<EventFd>,
}

impl NetShared {
    /// A device that has no back-end yet.
    pub fn new(config: &NetConfig) -> io::Result<Self> {
        let queues = usize::from(config.queue_pairs) * 2 + 1;
        let events = || (0..queues).map(|_| event::new()).collect::<io::Result<Vec<_>>>();
        let identity = Identity { features: 0, mac: Mac::default(), mtu: 0, queue_pairs: config.queue_pairs };
        let live = Live {
            identity,
            connected: false,
            offered: 0,
            device_state: false,
            acknowledged: 0,
            active_pairs: 1,
            announce: false,
        };
        Ok(Self {
            config: config.clone(),
            queue_pairs: config.queue_pairs,
            live: Mutex::new(live),
            cutter: Mutex::default(),
            events: DeviceEvents::new()?,
            kicks: events()?,
            calls: events()?,
        })
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The back-end's socket.
    pub fn socket(&self) -> &Path {
        &self.config.socket
    }

    /// Whether a local migration hands the device's TAP over.
    pub fn moves_locally(&self) -> bool {
        self.config.local_migration
    }

    /// What a migration has to know of the device that a guest has, which is said to be `local`.
    pub fn facts(&self, local: bool) -> NetFacts {
        let live = *self.live();
        NetFacts {
            queue_pairs: self.queue_pairs,
            local,
            device_state: live.device_state,
            connected: live.connected,
            features: for_backend(live.acknowledged),
            mac: Some(live.identity.mac.0),
        }
    }

    /// The same of the device for a guest that has yet to come.
    pub fn place_facts(&self, local: bool) -> NetFacts {
        let features = self.live().offered;
        NetFacts { features, mac: self.config.mac.map(|mac| mac.0), ..self.facts(local) }
    }

    /// How many queue pairs the device has.
    pub fn queue_pairs(&self) -> u16 {
        self.queue_pairs
    }

    /// What the control socket says about the device.
    pub fn status(&self) -> NetStatus {
        let live = *self.live();
        NetStatus {
            socket: self.config.socket.display().to_string(),
            backend: if live.connected { Connection::Connected } else { Connection::Disconnected },
            queue_pairs: self.queue_pairs,
            active_queue_pairs: live.active_pairs,
            features: format!("{:#x}", live.acknowledged),
        }
    }

    /// What the guest is offered, and whether it is asked to announce its addresses.
    pub fn offered(&self) -> (Identity, bool) {
        let live = *self.live();
        (live.identity, live.announce)
    }

    /// What the guest is offered from now on; only while no driver has the device.
    pub fn offer(&self, identity: Identity) {
        self.live().identity = identity;
    }

    /// There is a back-end, which offers these features, and device state or not.
    pub fn set_connected(&self, offered: u64, device_state: bool) {
        let mut live = self.live();
        live.connected = true;
        live.offered = offered;
        live.device_state = device_state;
    }

    /// There is no back-end.
    pub fn set_disconnected(&self) {
        self.live().connected = false;
    }

    /// What the driver has acknowledged, and how many queue pairs it uses; 0 and 1 after a reset.
    pub fn set_driver(&self, acknowledged: u64, active_pairs: u16) {
        let mut live = self.live();
        live.acknowledged = acknowledged;
        live.active_pairs = active_pairs;
    }

    /// Asks the driver to announce its addresses, if it can.
    pub fn announce(&self) {
        if self.live().acknowledged & feature(VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
            self.set_announce(true);
        }
    }

    /// Asks the driver to announce its addresses, or takes note that it has.
    pub fn set_announce(&self, announce: bool) {
        self.live().announce = announce;
        if announce {
            self.events.config_changed();
        }
    }

    /// Lets other threads cut the connection, or (`None`) forgets it.
    pub fn set_cutter(&self, cutter: Option<Cutter>) {
        *self.cutter.lock().unwrap_or_else(PoisonError::into_inner) = cutter;
    }

    /// Ends the connection, so that the device's thread can end whatever its back-end does.
    pub fn cut(&self) {
        if let Some(cutter) = &*self.cutter.lock().unwrap_or_else(PoisonError::into_inner) {
            cutter.cut();
        }
    }
}

/// What the device's thread answers, with its outcome.
pub type Answer<T> = SyncSender<Result<T, NetError>>;

/// What the device's thread is asked to do.
#[derive(Debug)]
pub enum Command {
    /// The guest has got its memory.
    UseMemory(GuestMemory, Answer<()>),
    /// What the driver has started, as far as it usually stays.
    Outline(Answer<Option<Outline>>),
    /// A driver that runs elsewhere will most likely bring this along. Answered once the back-end knows.
    Expect(Outline, Answer<()>),
    /// The VM stands still. Answered once nobody touches guest memory any more.
    Suspend(Answer<()>),
    /// The VM is about to run on. Answered once the rings run, or will as soon as there is a back-end.
    Resume(Answer<()>),
    /// What the driver has started, of a device that is suspended.
    Save(Answer<Option<DriverState>>),
    /// What the driver of another device has started is this one's, which is suspended and whose registers hold this.
    /// Answered once all is set up but what starts the rings.
    Restore(Box<NetState>, Answer<()>),
    /// The back-end of a suspended device begins to give its state away, or to take another's.
    BeginTransfer(VhostTransferStateDirection, OwnedFd, Answer<()>),
    /// Answered once it has.
    FinishTransfer(Answer<()>),
    /// The guest has moved away: a back-end that is lost is not looked for.
    Retire,
    /// The driver is ready. If the rings cannot be run as it wants, the device needs a reset.
    Start(Activation),
    /// The driver resets the device. Answered once nobody touches guest memory any more.
    Reset(SyncSender<()>),
    /// The VMM ends.
    Quit,
}

/// The way to the device's thread.
#[derive(Debug)]
pub struct Mailbox {
    /// Commands.
    pub commands: std::sync::mpsc::Sender<Command>,
    /// Signalled after each.
    pub wake: EventFd,
}

impl Mailbox {
    /// Sends a command; false if the thread has ended: then nobody answers.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        if sent {
            event::signal(&self.wake);
        }
        sent
    }
}

/// The transport's side of a network device.
#[derive(Debug)]
pub struct Net {
    shared: Arc<NetShared>,
    mailbox: Mailbox,
    queue_sizes: Vec<u16>,
}

impl Net {
    /// For the thread behind `mailbox`.
    pub fn new(shared: Arc<NetShared>, mailbox: Mailbox) -> Self {
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; usize::from(shared.queue_pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Self { shared, mailbox, queue_sizes }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.shared.live().identity.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let live = *self.shared.live();
        let announce = if live.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = u16::try_from(VIRTIO_NET_S_LINK_UP | announce).unwrap_or(0);
        let space = live.identity.config_space(status);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        let length = data.len().min(space.len() - from);
        data.fill(0);
        data[..length].copy_from_slice(&space[from..from + length]);
    }

    fn events(&self) -> &DeviceEvents {
        &self.shared.events
    }

    fn notify(&self, queue: u16) {
        if let Some(kick) = self.shared.kicks.get(usize::from(queue)) {
            event::signal(kick);
        }
    }

    fn activate(&mut self, activation: Activation) {
        if !self.mailbox.send(Command::Start(activation)) {
            self.shared.events.need_reset();
        }
    }

    fn reset(&mut self) -> Pending {
        let (sender, answer) = sync_channel(1);
        // A thread that has ended has no connection, and so nobody has guest memory.
        self.mailbox.send(Command::Reset(sender));
        Pending::new(answer)
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
    fn only_what_both_can_is_offered() {
        let identity = Identity::new(&EVERYTHING, 4, None, FALLBACK).unwrap();
        assert_eq!(identity.features, BACKEND_FEATURES | OWN_FEATURES);
        let least = Offer { features: feature(VIRTIO_F_VERSION_1), config: None };
        let identity = Identity::new(&least, 1, None, FALLBACK).unwrap();
        assert_eq!(identity.features, feature(VIRTIO_F_VERSION_1) | OWN_FEATURES);
    }

    #[test]
    fn several_pairs_need_multi_queue_and_one_does_not_offer_it() {
        let without = Offer { features: !feature(VIRTIO_NET_F_MQ), ..EVERYTHING };
        assert_eq!(Identity::new(&without, 2, None, FALLBACK), Err(OfferError::NoMultiQueue(2)));
        assert!(!has(&Identity::new(&EVERYTHING, 1, None, FALLBACK).unwrap(), VIRTIO_NET_F_MQ));
    }

    #[test]
    fn the_configured_address_comes_before_the_back_ends() {
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
    fn an_mtu_that_is_none_is_not_offered() {
        assert_eq!(Identity::new(&EVERYTHING, 1, None, FALLBACK).unwrap().mtu, 1400);
        for config in [None, Some([0; CONFIG_SIZE])] {
            let offer = Offer { config, ..EVERYTHING };
            assert!(!has(&Identity::new(&offer, 1, None, FALLBACK).unwrap(), VIRTIO_NET_F_MTU));
        }
    }

    #[test]
    fn the_back_end_hears_of_its_features_only() {
        assert_eq!(
            for_backend(OWN_FEATURES | feature(VIRTIO_NET_F_MRG_RXBUF)),
            feature(VIRTIO_NET_F_MRG_RXBUF)
        );
        let lost = Offer { features: !feature(VIRTIO_NET_F_CSUM), config: None };
        assert_eq!(check_offer(OWN_FEATURES | feature(VIRTIO_NET_F_MQ), &lost), Ok(()));
        assert_eq!(check_offer(feature(VIRTIO_NET_F_CSUM), &lost), Err(OfferError::FeaturesLost(1)));
    }

    #[test]
    fn the_configuration_space_has_an_end() {
        let config: NetConfig = "socket=/s,queue-pairs=4".parse().unwrap();
        let shared = Arc::new(NetShared::new(&config).unwrap());
        shared.offer(Identity::new(&EVERYTHING, 4, None, FALLBACK).unwrap());
        let (commands, _receiver) = std::sync::mpsc::channel();
        let net = Net::new(shared, Mailbox { commands, wake: event::new().unwrap() });
        let read = |offset, length| {
            let mut data = vec![0xaa; length];
            net.read_config(offset, &mut data);
            data
        };
        assert_eq!(read(0, 8), [0x52, 0x54, 0, 1, 2, 3, 1, 0]);
        assert_eq!(read(8, 8), [4, 0, 0x78, 5, 0, 0, 0, 0]);
        assert_eq!(read(11, 2), [5, 0]);
        assert_eq!(read(u64::MAX, 4), [0; 4]);
        net.shared.set_announce(true);
        assert_eq!(read(6, 2), [3, 0]);
        assert_eq!(net.queue_sizes(), [1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 64]);
    }
}
