//! The thread of a network device: it alone talks to the back-end, and it serves the control virtqueue.
//!
//! ```text
//!              connected, handshake                    back-end gone
//! Disconnected ────────────────────▶ Connected ───────────────────────▶ Disconnected
//! ```
//! Whether the driver has started the device is a second, independent state: a device that was started while
//! there is no back-end starts when one comes. A back-end that takes the place of a lost one gets the rings at
//! the index up to which the lost one had *used* them. Completion is in order, so the buffers after it are all
//! still the device's: none is skipped and none is forgotten; frames that were in hand are sent again. Then every
//! ring is kicked and every driver called once, in case the lost one took a notification with it.
//!
//! A device is *suspended* while its VM stands still: its rings are stopped, the thread knows how far they are and
//! leaves the control virtqueue alone, so nobody touches guest memory. A device whose VM has yet to arrive is suspended
//! from its start ([`suspend`]).

mod started;
mod suspend;

use std::sync::Arc;

use baton_control::{error_chain, limited};
use baton_protocol::migration::state::RingBase;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use self::started::{Control, Started, Suspended, rings};
use super::identity::{Identity, check_offer, for_backend};
use super::mailbox::Inbox;
use super::reconnect::{Dialler, dial};
use super::shared::NetShared;
use super::thread::NetError;
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::memory::GuestMemory;
use crate::vhost_user::frontend::Link;
use crate::virtio::control_queue::{self, ControlQueue, Refused};
use crate::virtio::{Activation, InvalidQueue, feature};

/// What the thread of a network device works with.
pub struct Worker {
    name: String,
    config: NetConfig,
    fallback: Mac,
    shared: Arc<NetShared>,
    memory: GuestMemory,
    inbox: Inbox,
    link: Option<Link>,
    /// The search for a back-end, while there is none.
    dialler: Option<Dialler>,
    device: Option<Started>,
    /// What the back-end was told of a driver that has yet to come.
    expected: Option<Started>,
    suspended: Option<Suspended>,
    /// The guest has moved away.
    retired: bool,
    /// The VMM ends.
    quitting: bool,
    /// What was last said about the missing back-end, so that it is said once.
    complaint: Option<String>,
}

/// What a wait has brought.
struct Woken {
    task: bool,
    control: bool,
    backend: bool,
}

impl Worker {
    /// One that has yet to greet its back-end. Without `memory` the device is suspended.
    ///
    /// # Errors
    /// What reading from `/dev/urandom` fails with.
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
            link: None,
            dialler: None,
            device: None,
            expected: None,
            retired: false,
            quitting: false,
            complaint: None,
        })
    }

    /// Connects to the back-end, which must be there.
    pub fn greet(&mut self) -> Result<(), NetError> {
        let link = dial(&self.shared)?;
        self.adopt(link)
    }

    /// Works until it is told to end.
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
                self.lose("it closed the connection");
            }
            if self.link.is_none() && !self.retired {
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
        let backend = self.link.as_ref().map(Link::socket).map(&mut watch);
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

    /// Runs the tasks that have come; false when the thread shall end.
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

    /// The guest has moved away: a back-end that is lost is not looked for.
    pub fn retire(&mut self) {
        self.retired = true;
    }

    /// The connection to the back-end. A transfer that fails does not end it: the back-end keeps its device, or is lost with
    /// the next message.
    pub fn link(&mut self) -> Result<&mut Link, NetError> {
        self.link.as_mut().ok_or(NetError::NoBackend)
    }

    /// The driver is ready. If the rings cannot be run as it wants, the device needs a reset.
    pub fn start(&mut self, activation: &Activation) {
        let device = match self.accept(activation) {
            Ok(device) => device,
            Err(error) => {
                limited!(warn, "{}: the device cannot be started: {error}", self.name);
                self.shared.events.need_reset();
                return;
            }
        };
        self.shared.set_driver(device.features, device.pairs);
        self.device = Some(device);
        if let Err(error) = self.start_rings(&[], false, false) {
            self.lose(&error_chain(&error));
        }
    }

    /// The guest has got its memory, which the back-end is to share.
    pub fn use_memory(&mut self, memory: GuestMemory) -> Result<(), NetError> {
        self.memory = memory;
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        Ok(link.share_memory(&self.memory)?)
    }

    /// Checks what the driver has set up.
    fn accept(&self, activation: &Activation) -> Result<Started, InvalidQueue> {
        let features = activation.features;
        for (index, queue) in activation.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            queue.check(index, &self.memory)?;
        }
        // Without MQ there is one pair, and the control virtqueue comes right after it.
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
        Ok(Started { features, queues, control, pairs: 1, inflight: None })
    }

    /// Hands the driver's rings to the back-end, if there are both, each with its base or 0. `set_up`: the back-end
    /// knows all but what starts them. `resume`: they were running before.
    fn start_rings(&mut self, bases: &[RingBase], set_up: bool, resume: bool) -> Result<(), NetError> {
        let (Some(link), Some(device)) = (&mut self.link, &mut self.device) else { return Ok(()) };
        check_offer(device.features, link.offer())?;
        let rings = rings(device, &self.shared, bases);
        if !set_up {
            link.set_up(for_backend(device.features), &self.memory, &mut device.inflight, &rings)?;
            link.place(&rings)?;
        }
        link.run(&rings)?;
        if resume {
            for ring in rings {
                event::signal(ring.kick);
                event::signal(ring.call);
            }
        }
        Ok(())
    }

    /// Has a back-end go on where a lost one was.
    fn restart_rings(&mut self) -> Result<(), NetError> {
        if self.suspended.is_some() {
            return Ok(());
        }
        let ready: Vec<_> = self.device.iter().flat_map(Started::ready).collect();
        let mut bases = Vec::new();
        for (index, setup) in ready {
            let base = self.used_index(index, &setup)?;
            bases.extend(u16::try_from(index).map(|index| RingBase { index, base }));
        }
        self.start_rings(&bases, false, true)
    }

    /// The driver resets the device; on return nobody touches guest memory.
    pub fn reset(&mut self) {
        self.device = None;
        self.shared.set_driver(0, 1);
        self.shared.set_announce(false);
        let stopped = self.link.as_mut().map_or(Ok(()), Link::stop);
        if let Err(error) = stopped {
            // A back-end without a connection has no session, and so no guest memory.
            self.lose(&error_chain(&error));
        }
    }

    fn serve_control(&mut self) {
        let Some(Started { features, control: Some(control), pairs, .. }) = &mut self.device else {
            return;
        };
        let (kick, call) = (&self.shared.kicks[control.index], &self.shared.calls[control.index]);
        event::take(kick);
        let (shared, link, max) = (&self.shared, &mut self.link, self.config.queue_pairs);
        let mut broken_link = None;
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
                if let Some(link) = link.as_mut().filter(|_| broken_link.is_none()) {
                    // If it fails, the next back-end gets it right from the start.
                    broken_link = link.enable_pairs(wanted).err();
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
        if let Some(error) = broken_link {
            self.lose(&error_chain(&error));
        }
    }

    /// Takes a greeted back-end on; the driver's rings are not touched.
    fn adopt(&mut self, link: Link) -> Result<(), NetError> {
        let identity = Identity::new(link.offer(), self.config.queue_pairs, self.config.mac, self.fallback)?;
        if self.device.is_none() {
            self.shared.offer(identity);
        }
        self.shared.set_connected(link.offer().features, link.has_device_state());
        self.link = Some(link);
        Ok(())
    }

    /// Looks for a back-end, and takes it on when it is found.
    fn reconnect(&mut self) {
        if let Some(outcome) = self.dialler.as_mut().and_then(Dialler::found) {
            self.dialler = None;
            match outcome
                .map_err(NetError::from)
                .and_then(|link| self.adopt(link))
                .and_then(|()| self.restart_rings())
            {
                Ok(()) => self.welcome(),
                Err(error) => {
                    self.drop_link();
                    let socket = self.config.socket.display();
                    self.complain(&format!(
                        "the back-end at {socket} cannot be used: {}",
                        error_chain(&error)
                    ));
                }
            }
        }
        if self.link.is_none() && self.dialler.is_none() {
            match Dialler::start(Arc::clone(&self.shared), Arc::clone(&self.inbox.wake)) {
                Ok(dialler) => self.dialler = Some(dialler),
                Err(error) => {
                    limited!(error, "{}: cannot look for a back-end: {error}", self.name);
                    self.shared.events.need_reset();
                }
            }
        }
    }

    fn welcome(&mut self) {
        self.complaint = None;
        limited!(info, "{}: the back-end at {} is back", self.name, self.config.socket.display());
        self.shared.announce();
    }

    fn lose(&mut self, reason: &str) {
        if self.link.is_some() {
            self.drop_link();
            let socket = self.config.socket.display();
            self.complain(&format!("lost the back-end at {socket} ({reason}); waiting for it to come back"));
        }
    }

    fn drop_link(&mut self) {
        self.link = None;
        self.expected = None;
        if let Some(suspended) = &mut self.suspended {
            suspended.set_up = false;
        }
        self.shared.set_cutter(None);
        self.shared.set_disconnected();
    }

    fn complain(&mut self, complaint: &str) {
        if self.complaint.as_deref() != Some(complaint) {
            limited!(warn, "{}: {complaint}", self.name);
            self.complaint = Some(complaint.to_owned());
        }
    }
}

fn random_mac() -> std::io::Result<Mac> {
    let mut bytes = [0; 6];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(Mac::locally_administered(bytes))
}

#[cfg(test)]
mod tests;
