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

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::control_queue::{self, ControlQueue, Refused};
use super::dialler::{Dialler, dial};
use super::net::{Command, Identity, Mailbox, Net, NetShared, OfferError, check_offer, for_backend};
use super::{Activation, CannotActivate, InvalidQueue, QueueSetup, feature};
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::memory::GuestMemory;
use crate::vhost_user::frontend::{Link, LinkError, RingStart};
use crate::vhost_user::inflight::Inflight;

/// Why a device has no back-end.
#[derive(Debug, Error)]
pub enum NetError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The back-end is of the wrong kind.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// The driver's virtqueues.
    #[error(transparent)]
    Queue(#[from] InvalidQueue),
    /// A virtqueue's used index cannot be read.
    #[error("cannot read a virtqueue's used index")]
    UsedIndex(#[source] virtio_queue::Error),
    /// No thread, no events.
    #[error("cannot start a network device's thread")]
    Thread(#[source] std::io::Error),
}

/// A network device's thread, and what it shares.
#[derive(Debug)]
pub struct NetThread {
    /// What the device's thread shares.
    pub shared: Arc<NetShared>,
    mailbox: Mailbox,
    thread: JoinHandle<()>,
}

impl NetThread {
    /// Starts the thread and waits until it has greeted the back-end; gives the transport's side, too.
    pub fn start(name: String, config: &NetConfig, memory: GuestMemory) -> Result<(Self, Net), NetError> {
        let shared = Arc::new(NetShared::new(config).map_err(NetError::Thread)?);
        let (commands, receiver) = channel();
        let wake = event::new().map_err(NetError::Thread)?;
        let clone = || wake.try_clone().map_err(NetError::Thread);
        let mut worker = Worker {
            name: name.clone(),
            config: config.clone(),
            fallback: random_mac().map_err(NetError::Thread)?,
            shared: Arc::clone(&shared),
            memory,
            commands: receiver,
            wake: clone()?,
            link: None,
            dialler: None,
            device: None,
            complaint: None,
        };
        let (greeted, greeting) = channel();
        let run =
            move || match dial(&worker.shared).map_err(NetError::from).and_then(|link| worker.adopt(link)) {
                Ok(()) => {
                    if greeted.send(Ok(())).is_ok() {
                        worker.run();
                    }
                }
                // Nobody waits any longer: the VMM is ending.
                Err(error) => {
                    let _ = greeted.send(Err(error));
                }
            };
        let thread = Builder::new().name(name).spawn(run).map_err(NetError::Thread)?;
        greeting.recv().unwrap_or_else(|_| {
            Err(NetError::Thread(std::io::Error::other("it ended before it had greeted its back-end")))
        })?;
        let net = Net::new(Arc::clone(&shared), Mailbox { commands: commands.clone(), wake: clone()? });
        Ok((Self { shared, mailbox: Mailbox { commands, wake }, thread }, net))
    }

    /// Ends the thread and with it the connection.
    pub fn stop(self) {
        self.mailbox.send(Command::Quit);
        self.shared.cut();
        if self.thread.join().is_err() {
            tracing::error!("a network device's thread panicked");
        }
    }
}

fn random_mac() -> std::io::Result<Mac> {
    let mut bytes = [0; 6];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(Mac::locally_administered(bytes))
}

/// What a driver has started.
#[derive(Debug)]
struct Started {
    features: u64,
    /// The data virtqueues.
    queues: Vec<QueueSetup>,
    control: Option<Control>,
    /// How many queue pairs the driver uses.
    pairs: u16,
    /// Where back-ends note which chains they have, for as long as these virtqueues live.
    inflight: Option<Inflight>,
}

#[derive(Debug)]
struct Control {
    queue: ControlQueue,
    index: usize,
}

struct Worker {
    name: String,
    config: NetConfig,
    fallback: Mac,
    shared: Arc<NetShared>,
    memory: GuestMemory,
    commands: Receiver<Command>,
    wake: EventFd,
    link: Option<Link>,
    /// The search for a back-end, while there is none.
    dialler: Option<Dialler>,
    device: Option<Started>,
    /// What was last said about the missing back-end, so that it is said once.
    complaint: Option<String>,
}

/// What a wait has brought.
struct Woken {
    command: bool,
    control: bool,
    backend: bool,
}

impl Worker {
    fn run(&mut self) {
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
            if woken.command && !self.obey() {
                return;
            }
            if woken.control {
                self.serve_control();
            }
            if woken.backend {
                self.lose("it closed the connection");
            }
            if self.link.is_none() {
                self.reconnect();
            }
        }
    }

    fn wait(&self) -> nix::Result<Woken> {
        let mut watched = vec![event::descriptor(&self.wake)];
        let mut watch = |fd| {
            watched.push(fd);
            watched.len() - 1
        };
        let control = self.control_kick().map(event::descriptor).map(&mut watch);
        let backend = self.link.as_ref().map(Link::socket).map(&mut watch);
        let mut events: Vec<_> = watched.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        poll(&mut events, PollTimeout::NONE)?;
        let ready = |index: Option<usize>| index.is_some_and(|index| events[index].any().unwrap_or(true));
        Ok(Woken { command: ready(Some(0)), control: ready(control), backend: ready(backend) })
    }

    fn control_kick(&self) -> Option<&EventFd> {
        let control = self.device.as_ref()?.control.as_ref()?;
        self.shared.kicks.get(control.index)
    }

    /// Carries out the commands that have come; false when the thread shall end.
    fn obey(&mut self) -> bool {
        event::take(&self.wake);
        loop {
            // Whoever waits for an answer and has gone needs none.
            match self.commands.try_recv() {
                Ok(Command::Start(activation, answer)) => {
                    let _ = answer.send(self.start(&activation));
                }
                Ok(Command::Reset(answer)) => {
                    self.reset();
                    let _ = answer.send(());
                }
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Quit) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn start(&mut self, activation: &Activation) -> Result<(), CannotActivate> {
        let device = self.accept(activation).map_err(|error| {
            tracing::warn!("{}: {error}", self.name);
            CannotActivate
        })?;
        self.shared.set_driver(device.features, device.pairs);
        self.device = Some(device);
        if let Err(error) = self.start_rings(false) {
            self.lose(&one_line(&error));
        }
        Ok(())
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

    /// Hands the driver's rings to the back-end, if there are both. `resume`: the rings were running before.
    fn start_rings(&mut self, resume: bool) -> Result<(), NetError> {
        let (Some(link), Some(device)) = (&mut self.link, &mut self.device) else { return Ok(()) };
        check_offer(device.features, link.offer())?;
        let mut rings = Vec::new();
        for (index, setup) in device.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            let queue = setup.check(index, &self.memory)?;
            let base = if resume {
                queue.used_idx(&self.memory, Ordering::Acquire).map_err(NetError::UsedIndex)?.0
            } else {
                0
            };
            let enabled = index / 2 < usize::from(device.pairs);
            let (kick, call) = (&self.shared.kicks[index], &self.shared.calls[index]);
            rings.push(RingStart { index, setup: *setup, base, enabled, kick, call });
        }
        link.start(for_backend(device.features), &self.memory, &mut device.inflight, &rings)?;
        if resume {
            for ring in rings {
                event::signal(ring.kick);
                event::signal(ring.call);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.device = None;
        self.shared.set_driver(0, 1);
        self.shared.set_announce(false);
        let stopped = self.link.as_mut().map_or(Ok(()), Link::stop);
        if let Err(error) = stopped {
            // A back-end without a connection has no session, and so no guest memory.
            self.lose(&one_line(&error.into()));
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
                tracing::warn!("{}: {error}; waiting for the driver to reset the device", self.name);
                if let Some(device) = &mut self.device {
                    device.control = None;
                }
                self.shared.events.need_reset();
            }
        }
        if let Some(error) = broken_link {
            self.lose(&one_line(&error.into()));
        }
    }

    /// Takes a greeted back-end on; the driver's rings are not touched.
    fn adopt(&mut self, link: Link) -> Result<(), NetError> {
        let identity = Identity::new(link.offer(), self.config.queue_pairs, self.config.mac, self.fallback)?;
        if self.device.is_none() {
            self.shared.offer(identity);
        }
        self.link = Some(link);
        self.shared.set_connected(true);
        Ok(())
    }

    /// Looks for a back-end, and takes it on when it is found.
    fn reconnect(&mut self) {
        if let Some(outcome) = self.dialler.as_mut().and_then(Dialler::found) {
            self.dialler = None;
            match outcome
                .map_err(NetError::from)
                .and_then(|link| self.adopt(link))
                .and_then(|()| self.start_rings(true))
            {
                Ok(()) => self.welcome(),
                Err(error) => {
                    self.drop_link();
                    let socket = self.config.socket.display();
                    self.complain(&format!("the back-end at {socket} cannot be used: {}", one_line(&error)));
                }
            }
        }
        if self.link.is_none() && self.dialler.is_none() {
            let dialler =
                self.wake.try_clone().and_then(|wake| Dialler::start(Arc::clone(&self.shared), wake));
            match dialler {
                Ok(dialler) => self.dialler = Some(dialler),
                Err(error) => {
                    tracing::error!("{}: cannot look for a back-end: {error}", self.name);
                    self.shared.events.need_reset();
                }
            }
        }
    }

    fn welcome(&mut self) {
        self.complaint = None;
        tracing::info!("{}: the back-end at {} is back", self.name, self.config.socket.display());
        let announces = |device: &Started| device.features & feature(VIRTIO_NET_F_GUEST_ANNOUNCE) != 0;
        if self.device.as_ref().is_some_and(announces) {
            self.shared.set_announce(true);
        }
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
        self.shared.set_cutter(None);
        self.shared.set_connected(false);
    }

    fn complain(&mut self, complaint: &str) {
        if self.complaint.as_deref() != Some(complaint) {
            tracing::warn!("{}: {complaint}", self.name);
            self.complaint = Some(complaint.to_owned());
        }
    }
}

/// An error with its causes.
fn one_line(error: &NetError) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests;
