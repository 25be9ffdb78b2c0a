//! The worker of a network device. It alone talks to the back-end, and it serves the control virtqueue.
//!
//! ```text
//!              connected, handshake                    back-end gone
//! Disconnected ────────────────────▶ Connected ───────────────────────▶ Disconnected
//! ```
//!
//! Whether the driver has started the device is a second, independent state: without a back-end, the rings start when
//! one connects. A back-end that replaces a lost one gets each ring at its *used* index. Completion is in order, so the
//! device still owns all buffers from that index on: none is skipped or forgotten, and frames that were in hand are
//! sent again. The worker then kicks each ring and calls the driver once for it, in case a notification was lost.
//!
//! A device is *suspended* while its VM is paused. Its rings are stopped. The worker keeps their bases and does not
//! serve the control virtqueue, so nothing touches guest memory. A device whose VM has not arrived yet is suspended
//! from the start ([`suspend`]).

mod setup;
mod suspend;

use std::sync::Arc;

use baton_control::{error_chain, limited};
use baton_protocol::migration::state::RingBase;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use self::setup::{Control, DeviceSetup, Suspended, rings};
use super::error::NetError;
use super::identity::{Identity, check_offer, for_backend};
use super::mailbox::Inbox;
use super::reconnect::{self, Reconnection};
use super::shared::NetShared;
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::memory::GuestMemory;
use crate::vhost_user::frontend::Connection;
use crate::virtio::control_queue::{self, ControlQueue, Refused};
use crate::virtio::{Activation, InvalidQueue, feature};

/// Owns the connection to the back-end, and what the driver has set up.
pub struct Worker {
    name: String,
    config: NetConfig,
    /// The MAC address if neither the configuration nor the back-end has one.
    fallback: Mac,
    shared: Arc<NetShared>,
    memory: GuestMemory,
    inbox: Inbox,
    connection: Option<Connection>,
    /// Present while there is no back-end.
    reconnection: Option<Reconnection>,
    device: Option<DeviceSetup>,
    /// What [`Self::prepare`] has set up in the back-end.
    prepared: Option<DeviceSetup>,
    suspended: Option<Suspended>,
    /// The guest has migrated to another VMM.
    retired: bool,
    /// The thread must end.
    quitting: bool,
    /// The last warning about a lost back-end. A repeated warning is not logged.
    last_warning: Option<String>,
}

/// Why the worker was woken.
struct Woken {
    task: bool,
    control: bool,
    backend: bool,
}

impl Worker {
    /// Creates a worker without a connection. Without `memory` the device is suspended.
    ///
    /// # Errors
    /// Returns an error if `/dev/urandom` cannot be read.
    pub fn new(
        name: String,
        config: NetConfig,
        shared: Arc<NetShared>,
        memory: Option<GuestMemory>,
        inbox: Inbox,
    ) -> std::io::Result<Self> {
        Ok(Self {
            name,
            config,
            fallback: random_mac()?,
            shared,
            suspended: memory.is_none().then(Suspended::default),
            memory: memory.unwrap_or_default(),
            inbox,
            connection: None,
            reconnection: None,
            device: None,
            prepared: None,
            retired: false,
            quitting: false,
            last_warning: None,
        })
    }

    /// Connects to the back-end, which must be listening.
    pub fn connect(&mut self) -> Result<(), NetError> {
        let connection = reconnect::connect(&self.shared)?;
        self.use_connection(connection)
    }

    /// Runs until [`Self::quit`].
    pub fn run(&mut self) {
        loop {
            let woken = match self.wait() {
                Ok(woken) => woken,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!("{}: cannot wait for events: {error}", self.name);
                    self.shared.events.need_reset();
                    return;
                }
            };
            if woken.task && !self.run_tasks() {
                return;
            }
            if woken.control {
                self.serve_control();
            }
            if woken.backend {
                self.lose_connection("the connection was closed");
            }
            if self.connection.is_none() && !self.retired {
                self.reconnect();
            }
        }
    }

    fn wait(&self) -> nix::Result<Woken> {
        let mut watched = vec![event::descriptor(&self.inbox.wake)];
        let mut watch = |fd| {
            watched.push(fd);
            watched.len() - 1
        };
        let control = self.control_kick().map(event::descriptor).map(&mut watch);
        let backend = self.connection.as_ref().map(Connection::socket).map(&mut watch);
        let mut events: Vec<_> = watched.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        poll(&mut events, PollTimeout::NONE)?;
        let ready = |index: Option<usize>| index.is_some_and(|index| events[index].any().unwrap_or(true));
        Ok(Woken { task: ready(Some(0)), control: ready(control), backend: ready(backend) })
    }

    fn control_kick(&self) -> Option<&EventFd> {
        if self.suspended.is_some() {
            return None;
        }
        let control = self.device.as_ref()?.control.as_ref()?;
        self.shared.kicks.get(control.index)
    }

    /// Runs the pending tasks. Returns false after [`Self::quit`].
    fn run_tasks(&mut self) -> bool {
        event::take(&self.inbox.wake);
        while !self.quitting
            && let Ok(task) = self.inbox.tasks.try_recv()
        {
            task(self);
        }
        !self.quitting
    }

    /// Ends the thread.
    pub fn quit(&mut self) {
        self.quitting = true;
    }

    /// Stops reconnecting to a lost back-end, after the guest has migrated to another VMM.
    pub fn retire(&mut self) {
        self.retired = true;
    }

    /// Returns the connection to the back-end. A failed transfer does not end the connection: the back-end keeps its
    /// device, or the next message fails.
    pub fn connection(&mut self) -> Result<&mut Connection, NetError> {
        self.connection.as_mut().ok_or(NetError::NoBackend)
    }

    /// Starts the device as the driver has set it up. If that is not possible, the device needs a reset.
    pub fn start(&mut self, activation: &Activation) {
        let device = match self.check(activation) {
            Ok(device) => device,
            Err(error) => {
                limited!(warn, "{}: cannot start the device: {error}", self.name);
                self.shared.events.need_reset();
                return;
            }
        };
        self.shared.set_driver(device.features, device.pairs);
        self.device = Some(device);
        if let Err(error) = self.start_rings(&[], false, false) {
            self.lose_connection(&error_chain(&error));
        }
    }

    /// Shares the memory of a VM that was created without memory.
    pub fn use_memory(&mut self, memory: GuestMemory) -> Result<(), NetError> {
        self.memory = memory;
        let connection = self.connection.as_mut().ok_or(NetError::NoBackend)?;
        Ok(connection.share_memory(&self.memory)?)
    }

    /// Checks what the driver has set up.
    fn check(&self, activation: &Activation) -> Result<DeviceSetup, InvalidQueue> {
        let features = activation.features;
        for (index, queue) in activation.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            queue.check(index, &self.memory)?;
        }
        // Without MQ there is one queue pair, and the control virtqueue follows it.
        let pairs = if features & feature(VIRTIO_NET_F_MQ) == 0 { 1 } else { self.config.queue_pairs };
        let index = usize::from(pairs) * 2;
        let control = match activation.queues.get(index).filter(|queue| queue.ready) {
            Some(queue) => {
                let event_idx = features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
                Some(Control {
                    queue: ControlQueue::new(queue.check(index, &self.memory)?, event_idx),
                    index,
                })
            }
            None => None,
        };
        let queues = activation.queues.iter().copied().take(index).collect();
        Ok(DeviceSetup { features, queues, control, pairs: 1, inflight: None })
    }

    /// Starts the driver's rings, each at its base or 0, if there are a driver and a back-end. `set_up` says that the
    /// rings are set up and have their bases, `resume` that they ran before.
    fn start_rings(&mut self, bases: &[RingBase], set_up: bool, resume: bool) -> Result<(), NetError> {
        let (Some(connection), Some(device)) = (&mut self.connection, &mut self.device) else {
            return Ok(());
        };
        check_offer(device.features, connection.offer())?;
        let rings = rings(device, &self.shared, bases);
        if !set_up {
            connection.set_up(for_backend(device.features), &self.memory, &mut device.inflight, &rings)?;
            connection.set_bases(&rings)?;
        }
        connection.start_rings(&rings)?;
        if resume {
            for ring in rings {
                event::signal(ring.kick);
                event::signal(ring.call);
            }
        }
        Ok(())
    }

    /// Starts the rings of a lost back-end at their used indices.
    fn restart_rings(&mut self) -> Result<(), NetError> {
        if self.suspended.is_some() {
            return Ok(());
        }
        let ready: Vec<_> = self.device.iter().flat_map(DeviceSetup::ready).collect();
        let mut bases = Vec::new();
        for (index, setup) in ready {
            let base = self.used_index(index, &setup)?;
            bases.extend(u16::try_from(index).map(|index| RingBase { index, base }));
        }
        self.start_rings(&bases, false, true)
    }

    /// Resets the device. On return, the back-end does not touch guest memory.
    pub fn reset(&mut self) {
        self.device = None;
        self.shared.set_driver(0, 1);
        self.shared.set_announce(false);
        let stopped = self.connection.as_mut().map_or(Ok(()), Connection::stop);
        if let Err(error) = stopped {
            // A back-end without a connection has no session, so it does not use guest memory.
            self.lose_connection(&error_chain(&error));
        }
    }

    fn serve_control(&mut self) {
        let Some(DeviceSetup { features, control: Some(control), pairs, .. }) = &mut self.device else {
            return;
        };
        let (kick, call) = (&self.shared.kicks[control.index], &self.shared.calls[control.index]);
        event::take(kick);
        let (shared, connection, max) = (&self.shared, &mut self.connection, self.config.queue_pairs);
        let mut broken_connection = None;
        let served = control.queue.serve(&self.memory, |command| match command {
            control_queue::Command::AcknowledgeAnnounce
                if *features & feature(VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 =>
            {
                shared.set_announce(false);
                Ok(())
            }
            control_queue::Command::SetQueuePairs(wanted)
                if *features & feature(VIRTIO_NET_F_MQ) != 0 && (1..=max).contains(&wanted) =>
            {
                *pairs = wanted;
                shared.set_driver(*features, wanted);
                if let Some(connection) = connection.as_mut().filter(|_| broken_connection.is_none()) {
                    // If this fails, the next back-end is set up for the new number.
                    broken_connection = connection.enable_pairs(wanted).err();
                }
                Ok(())
            }
            _ => Err(Refused),
        });
        match served {
            Ok(served) => {
                if served.interrupt {
                    event::signal(call);
                }
                if served.more {
                    event::signal(kick);
                }
            }
            Err(error) => {
                limited!(warn, "{}: {error}; waiting for the driver to reset the device", self.name);
                if let Some(device) = &mut self.device {
                    device.control = None;
                }
                self.shared.events.need_reset();
            }
        }
        if let Some(error) = broken_connection {
            self.lose_connection(&error_chain(&error));
        }
    }

    /// Keeps a new connection, if its back-end fits the device. Does not touch the driver's rings.
    fn use_connection(&mut self, connection: Connection) -> Result<(), NetError> {
        let identity =
            Identity::new(connection.offer(), self.config.queue_pairs, self.config.mac, self.fallback)?;
        if self.device.is_none() {
            self.shared.offer(identity);
        }
        self.shared.set_connected(connection.offer().features, connection.has_device_state());
        self.connection = Some(connection);
        Ok(())
    }

    /// Starts reconnecting, or finishes it.
    fn reconnect(&mut self) {
        if let Some(outcome) = self.reconnection.as_mut().and_then(Reconnection::outcome) {
            self.reconnection = None;
            match outcome
                .map_err(NetError::from)
                .and_then(|connection| self.use_connection(connection))
                .and_then(|()| self.restart_rings())
            {
                Ok(()) => self.reconnected(),
                Err(error) => {
                    self.drop_connection();
                    let socket = self.config.socket.display();
                    let warning = format!("cannot use the back-end at {socket}: {}", error_chain(&error));
                    if self.is_new(&warning) {
                        limited!(warn, "{}: {warning}", self.name);
                    }
                }
            }
        }
        if self.connection.is_none() && self.reconnection.is_none() {
            match Reconnection::start(Arc::clone(&self.shared), Arc::clone(&self.inbox.wake)) {
                Ok(reconnection) => self.reconnection = Some(reconnection),
                Err(error) => {
                    limited!(error, "{}: cannot start to reconnect to the back-end: {error}", self.name);
                    self.shared.events.need_reset();
                }
            }
        }
    }

    fn reconnected(&mut self) {
        self.last_warning = None;
        limited!(info, "{}: reconnected to the back-end at {}", self.name, self.config.socket.display());
        self.shared.announce();
    }

    fn lose_connection(&mut self, reason: &str) {
        if self.connection.is_some() {
            self.drop_connection();
            let socket = self.config.socket.display();
            let warning = format!("lost the back-end at {socket} ({reason}); reconnecting");
            if self.is_new(&warning) {
                limited!(warn, "{}: {warning}", self.name);
            }
        }
    }

    fn drop_connection(&mut self) {
        self.connection = None;
        self.prepared = None;
        if let Some(suspended) = &mut self.suspended {
            suspended.set_up = false;
        }
        self.shared.set_shutdown_handle(None);
        self.shared.set_disconnected();
    }

    /// Returns whether `warning` differs from the last one since the back-end was connected.
    fn is_new(&mut self, warning: &str) -> bool {
        let new = self.last_warning.as_deref() != Some(warning);
        if new {
            self.last_warning = Some(warning.to_owned());
        }
        new
    }
}

fn random_mac() -> std::io::Result<Mac> {
    let mut bytes = [0; 6];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(Mac::locally_administered(bytes))
}

#[cfg(test)]
mod tests;
