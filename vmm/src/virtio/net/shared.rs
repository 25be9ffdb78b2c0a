//! The state that a network device's transport, its worker and the control socket share.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_protocol::control::{Frontend, NetStatus};
use baton_protocol::migration::facts::NetFacts;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;
use vmm_sys_util::eventfd::EventFd;

use super::identity::{Identity, for_backend};
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::shutdown::ShutdownHandle;
use crate::virtio::{DeviceEvents, feature};

/// The part that changes.
#[derive(Clone, Copy, Debug)]
struct State {
    identity: Identity,
    connected: bool,
    /// What the back-end offers.
    offered: u64,
    /// Whether the back-end can save and load device state.
    device_state: bool,
    acknowledged: u64,
    active_pairs: u16,
    announce: bool,
}

/// The state that the transport, the worker and the control socket share.
#[derive(Debug)]
pub struct NetShared {
    config: NetConfig,
    state: Mutex<State>,
    /// The connection to the back-end, if there is one.
    connection: Mutex<Option<ShutdownHandle>>,
    /// Changes of the configuration, and whether the device needs a reset.
    pub events: DeviceEvents,
    /// One for each virtqueue: the driver's notifications.
    pub kicks: Vec<EventFd>,
    /// One for each virtqueue: the device's interrupts.
    pub calls: Vec<EventFd>,
}

impl NetShared {
    /// Creates the state of a device that has no back-end yet.
    pub fn new(config: &NetConfig) -> io::Result<Self> {
        let queues = usize::from(config.queue_pairs) * 2 + 1;
        let events = || (0..queues).map(|_| event::new()).collect::<io::Result<Vec<_>>>();
        let identity = Identity { features: 0, mac: Mac::default(), mtu: 0, queue_pairs: config.queue_pairs };
        let state = State {
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
            state: Mutex::new(state),
            connection: Mutex::default(),
            events: DeviceEvents::new()?,
            kicks: events()?,
            calls: events()?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the path of the back-end's socket.
    pub fn socket(&self) -> &Path {
        &self.config.socket
    }

    /// Returns whether a local migration hands over the device's TAP.
    pub fn moves_locally(&self) -> bool {
        self.config.local_migration
    }

    /// Returns what the target of a migration checks about this device. `local` says whether its TAP migrates, too.
    pub fn source_facts(&self, local: bool) -> NetFacts {
        let state = *self.state();
        NetFacts {
            queue_pairs: self.config.queue_pairs,
            local,
            device_state: state.device_state,
            connected: state.connected,
            features: for_backend(state.acknowledged),
            mac: Some(state.identity.mac.0),
        }
    }

    /// Returns what the target of a migration compares with the source's facts about this device.
    pub fn target_facts(&self, local: bool) -> NetFacts {
        let features = self.state().offered;
        NetFacts { features, mac: self.config.mac.map(|mac| mac.0), ..self.source_facts(local) }
    }

    /// Returns the number of queue pairs.
    pub fn queue_pairs(&self) -> u16 {
        self.config.queue_pairs
    }

    /// Returns the device's status for the control socket.
    pub fn status(&self) -> NetStatus {
        let state = *self.state();
        NetStatus {
            socket: self.config.socket.display().to_string(),
            backend: if state.connected { Frontend::Connected } else { Frontend::Disconnected },
            queue_pairs: self.config.queue_pairs,
            active_queue_pairs: state.active_pairs,
            features: format!("{:#x}", state.acknowledged),
        }
    }

    /// Returns what the guest is offered, and whether the driver is asked to announce its addresses.
    pub fn offered(&self) -> (Identity, bool) {
        let state = *self.state();
        (state.identity, state.announce)
    }

    /// Changes what the guest is offered. No driver may use the device.
    pub fn offer(&self, identity: Identity) {
        self.state().identity = identity;
    }

    /// Records that a back-end is connected, its features, and whether it offers `DEVICE_STATE`.
    pub fn set_connected(&self, offered: u64, device_state: bool) {
        let mut state = self.state();
        state.connected = true;
        state.offered = offered;
        state.device_state = device_state;
    }

    /// Records that no back-end is connected.
    pub fn set_disconnected(&self) {
        self.state().connected = false;
    }

    /// Sets the features that the driver has acknowledged and the number of queue pairs that it uses; 0 and 1 after
    /// a reset.
    pub fn set_driver(&self, acknowledged: u64, active_pairs: u16) {
        let mut state = self.state();
        state.acknowledged = acknowledged;
        state.active_pairs = active_pairs;
    }

    /// Asks the driver to announce its addresses, if it can.
    pub fn announce(&self) {
        if self.state().acknowledged & feature(VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
            self.set_announce(true);
        }
    }

    /// Asks the driver to announce its addresses, or withdraws that request.
    pub fn set_announce(&self, announce: bool) {
        self.state().announce = announce;
        if announce {
            self.events.config_changed();
        }
    }

    /// Sets the handle with which other threads shut down the connection; `None` if there is no connection.
    pub fn set_shutdown_handle(&self, connection: Option<ShutdownHandle>) {
        *self.connection() = connection;
    }

    /// Shuts down the connection, so that the worker does not wait for its back-end.
    pub fn shut_down_connection(&self) {
        if let Some(connection) = &*self.connection() {
            connection.shut_down();
        }
    }

    fn connection(&self) -> MutexGuard<'_, Option<ShutdownHandle>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
