//! What a network device's transport, its worker and the control socket share.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_protocol::control::{Frontend as Connection, NetStatus};
use baton_protocol::migration::facts::NetFacts;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;
use vmm_sys_util::eventfd::EventFd;

use super::identity::{Identity, for_backend};
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::vhost_user::frontend::Cutter;
use crate::virtio::{DeviceEvents, feature};

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
