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
//! from its start.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_protocol::migration::state::{DriverState, NetState, Outline, RingBase};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::control_queue::{self, ControlQueue, Refused};
use super::dialler::{Dialler, dial};
use super::net::{Answer, Command, Identity, Mailbox, Net, NetShared, OfferError, check_offer, for_backend};
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
    /// The thread has ended.
    #[error("the network device's thread has ended")]
    Ended,
    /// The connection was lost before.
    #[error("the back-end is not connected")]
    NoBackend,
    /// A restored state whose parts contradict each other.
    #[error("the state's virtqueues do not fit the device")]
    State,
}

/// A network device's thread, and what it shares.
#[derive(Debug)]
pub struct NetThread {
    /// What the device's thread shares.
    pub shared: Arc<NetShared>,
    mailbox: Mailbox,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NetThread {
    /// Starts the thread and waits until it has greeted the back-end; gives the transport's side, too. Without
    /// `memory` the device is suspended, and its guest has yet to arrive.
    pub fn start(
        name: String,
        config: &NetConfig,
        memory: Option<GuestMemory>,
    ) -> Result<(Self, Net), NetError> {
        let shared = Arc::new(NetShared::new(config).map_err(NetError::Thread)?);
        let (commands, receiver) = channel();
        let wake = event::new().map_err(NetError::Thread)?;
        let clone = || wake.try_clone().map_err(NetError::Thread);
        let mut worker = Worker {
            name: name.clone(),
            config: config.clone(),
            fallback: random_mac().map_err(NetError::Thread)?,
            shared: Arc::clone(&shared),
            suspended: memory.is_none().then(Suspended::default),
            memory: memory.unwrap_or_default(),
            commands: receiver,
            wake: clone()?,
            link: None,
            dialler: None,
            device: None,
            expected: None,
            retired: false,
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
        Ok((Self { shared, mailbox: Mailbox { commands, wake }, thread: Mutex::new(Some(thread)) }, net))
    }

    /// The guest has got its memory, which the back-end is to share.
    pub fn use_memory(&self, memory: GuestMemory) -> Result<(), NetError> {
        self.ask(|answer| Command::UseMemory(memory, answer))
    }

    /// What the driver has started, as far as it usually stays while the driver runs.
    pub fn outline(&self) -> Result<Option<Outline>, NetError> {
        self.ask(Command::Outline)
    }

    /// Tells the back-end of the rings that a guest, which runs elsewhere yet, will most likely bring along.
    pub fn expect(&self, outline: Outline) -> Result<(), NetError> {
        self.ask(|answer| Command::Expect(outline, answer))
    }

    /// Stops the rings; on return nobody touches guest memory. The vCPUs stand still.
    pub fn suspend(&self) -> Result<(), NetError> {
        self.ask(Command::Suspend)
    }

    /// Starts the rings that were stopped, before the vCPUs run.
    pub fn resume(&self) -> Result<(), NetError> {
        self.ask(Command::Resume)
    }

    /// What the driver has started; the device is suspended.
    pub fn save(&self) -> Result<Option<DriverState>, NetError> {
        self.ask(Command::Save)
    }

    /// Takes over what the driver of another device has started; the device is suspended.
    pub fn restore(&self, state: NetState) -> Result<(), NetError> {
        self.ask(|answer| Command::Restore(Box::new(state), answer))
    }

    /// Has the back-end begin to write its state to `channel`, or to read it there; the device is suspended.
    pub fn begin_transfer(
        &self,
        direction: VhostTransferStateDirection,
        channel: OwnedFd,
    ) -> Result<(), NetError> {
        self.ask(|answer| Command::BeginTransfer(direction, channel, answer))
    }

    /// Waits until it has.
    pub fn finish_transfer(&self) -> Result<(), NetError> {
        self.ask(Command::FinishTransfer)
    }

    /// The guest has moved away: a back-end that is lost is not looked for.
    pub fn retire(&self) {
        self.mailbox.send(Command::Retire);
    }

    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, NetError> {
        let (sender, answer) = sync_channel(1);
        self.mailbox.send(command(sender));
        answer.recv().unwrap_or(Err(NetError::Ended))
    }

    /// Ends the thread and with it the connection.
    pub fn stop(&self) {
        self.mailbox.send(Command::Quit);
        self.shared.cut();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
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

impl Started {
    /// Whether a back-end that was told of this needs no other word for `other` than where its rings are.
    fn is_like(&self, other: &Self) -> bool {
        let Self { features, queues, control: _, pairs, inflight: _ } = self;
        for_backend(*features) == for_backend(other.features)
            && *pairs == other.pairs
            && queues.len() == other.queues.len()
            && self.ready().eq(other.ready())
    }

    /// The data virtqueues that the driver uses.
    fn ready(&self) -> impl Iterator<Item = (usize, QueueSetup)> + '_ {
        self.queues.iter().copied().enumerate().filter(|(_, queue)| queue.ready)
    }
}

/// The driver's rings as the back-end is to run them, each at its base or at 0.
fn rings<'a>(device: &Started, shared: &'a NetShared, bases: &[RingBase]) -> Vec<RingStart<'a>> {
    let base = |index| bases.iter().find(|base| usize::from(base.index) == index).map_or(0, |base| base.base);
    let ring = |(index, setup)| RingStart {
        index,
        setup,
        base: base(index),
        enabled: index / 2 < usize::from(device.pairs),
        kick: &shared.kicks[index],
        call: &shared.calls[index],
    };
    device.ready().map(ring).collect()
}

#[derive(Debug)]
struct Control {
    queue: ControlQueue,
    index: usize,
}

/// How far the rings of a suspended device are.
#[derive(Debug, Default)]
struct Suspended {
    bases: Vec<RingBase>,
    /// The back-end knows all but what starts them.
    set_up: bool,
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
    /// What the back-end was told of a driver that has yet to come.
    expected: Option<Started>,
    suspended: Option<Suspended>,
    /// The guest has moved away.
    retired: bool,
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
            if self.link.is_none() && !self.retired {
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
        if self.suspended.is_some() {
            return None;
        }
        let control = self.device.as_ref()?.control.as_ref()?;
        self.shared.kicks.get(control.index)
    }

    /// Carries out the commands that have come; false when the thread shall end.
    fn obey(&mut self) -> bool {
        event::take(&self.wake);
        loop {
            // Whoever waits for an answer and has gone needs none.
            match self.commands.try_recv() {
                Ok(Command::UseMemory(memory, answer)) => {
                    let _ = answer.send(self.use_memory(memory));
                }
                Ok(Command::Outline(answer)) => {
                    let _ = answer.send(Ok(self.outline()));
                }
                Ok(Command::Expect(outline, answer)) => {
                    let _ = answer.send(self.expect(outline));
                }
                Ok(Command::Suspend(answer)) => {
                    self.suspend();
                    let _ = answer.send(Ok(()));
                }
                Ok(Command::Resume(answer)) => {
                    self.resume();
                    let _ = answer.send(Ok(()));
                }
                Ok(Command::Save(answer)) => {
                    let _ = answer.send(Ok(self.save()));
                }
                Ok(Command::Restore(state, answer)) => {
                    let _ = answer.send(self.restore(&state));
                }
                Ok(Command::BeginTransfer(direction, channel, answer)) => {
                    let _ = answer.send(self.transfer(|link| link.begin_transfer(direction, channel)));
                }
                Ok(Command::FinishTransfer(answer)) => {
                    let _ = answer.send(self.transfer(Link::finish_transfer));
                }
                Ok(Command::Retire) => self.retired = true,
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
        if let Err(error) = self.start_rings(&[], false, false) {
            self.lose(&one_line(&error));
        }
        Ok(())
    }

    fn use_memory(&mut self, memory: GuestMemory) -> Result<(), NetError> {
        self.memory = memory;
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        Ok(link.share_memory(&self.memory)?)
    }

    fn outline(&self) -> Option<Outline> {
        let device = self.device.as_ref()?;
        Some(Outline {
            features: device.features,
            active_queue_pairs: device.pairs,
            queues: device.queues.iter().copied().map(Into::into).collect(),
        })
    }

    /// All that can be told before the guest is here, so that it does not stand still meanwhile. Nothing is lost if the
    /// driver changes it until then: [`Self::restore`] compares.
    fn expect(&mut self, outline: Outline) -> Result<(), NetError> {
        let Outline { features, active_queue_pairs, queues } = outline;
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        check_offer(features, link.offer())?;
        let pairs = self.config.queue_pairs;
        if queues.len() > usize::from(pairs) * 2 || !(1..=pairs).contains(&active_queue_pairs) {
            return Err(NetError::State);
        }
        let queues: Vec<QueueSetup> = queues.into_iter().map(Into::into).collect();
        let mut device =
            Started { features, queues, control: None, pairs: active_queue_pairs, inflight: None };
        device.ready().try_for_each(|(index, queue)| queue.check(index, &self.memory).map(drop))?;
        let rings = rings(&device, &self.shared, &[]);
        link.set_up(for_backend(features), &self.memory, &mut device.inflight, &rings)?;
        self.expected = Some(device);
        Ok(())
    }

    /// Stops the rings. A back-end that fails here is lost, and where it was is read from guest memory.
    fn suspend(&mut self) {
        if self.suspended.is_some() {
            return;
        }
        let mut bases = match self.link.as_mut().map_or(Ok(Vec::new()), Link::suspend) {
            Ok(bases) => bases,
            Err(error) => {
                self.lose(&one_line(&error.into()));
                Vec::new()
            }
        };
        if bases.is_empty() {
            bases = self.used_indices();
        }
        let base = |(index, base)| Some(RingBase { index: u16::try_from(index).ok()?, base });
        let bases = bases.into_iter().filter_map(base).collect();
        self.suspended = Some(Suspended { bases, set_up: false });
    }

    /// The index up to which each ring of the driver's was used.
    fn used_indices(&self) -> Vec<(usize, u16)> {
        let ready = self.device.iter().flat_map(Started::ready);
        ready.filter_map(|(index, setup)| Some((index, self.used_index(index, &setup).ok()?))).collect()
    }

    fn used_index(&self, index: usize, setup: &QueueSetup) -> Result<u16, NetError> {
        let queue = setup.check(index, &self.memory)?;
        Ok(queue.used_idx(&self.memory, Ordering::Acquire).map_err(NetError::UsedIndex)?.0)
    }

    fn resume(&mut self) {
        let Some(suspended) = self.suspended.take() else { return };
        if let Err(error) = self.start_rings(&suspended.bases, suspended.set_up, true) {
            self.lose(&one_line(&error));
        }
        if let Some(kick) = self.control_kick() {
            event::signal(kick);
        }
    }

    /// A back-end that fails here is asked for its rings all the same: it keeps its device, or is lost then.
    fn transfer(&mut self, step: impl FnOnce(&mut Link) -> Result<(), LinkError>) -> Result<(), NetError> {
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        Ok(step(link)?)
    }

    fn save(&self) -> Option<DriverState> {
        let device = self.device.as_ref()?;
        Some(DriverState {
            active_queue_pairs: device.pairs,
            bases: self.suspended.as_ref().map(|suspended| suspended.bases.clone()).unwrap_or_default(),
            control: device.control.as_ref().map(|control| control.queue.save()),
        })
    }

    /// Takes on what another device's driver has started. The same checks as of a driver's own start, and all that can
    /// fail before the rings are started.
    fn restore(&mut self, state: &NetState) -> Result<(), NetError> {
        let identity = Identity::from(state.identity);
        let link = self.link.as_ref().ok_or(NetError::NoBackend)?;
        check_offer(state.transport.driver_features, link.offer())?;
        // After a reset the driver is offered no more than it was, and no more than there is now.
        let now = Identity::new(link.offer(), self.config.queue_pairs, Some(identity.mac), self.fallback)?;
        self.shared.offer(Identity { features: identity.features & now.features, ..identity });
        // Another back-end that comes does not change it.
        self.config.mac = Some(identity.mac);
        self.shared.set_announce(state.announce);
        let expected = self.expected.take();
        let Some(driver) = &state.driver else { return self.disappoint(expected) };
        let queues = state.transport.queues.iter().copied().map(Into::into).collect();
        let mut device = self.accept(&Activation { features: state.transport.driver_features, queues })?;
        device.pairs = driver.active_queue_pairs;
        device.control = match (device.control, driver.control) {
            (Some(mut control), Some(state)) => {
                control.queue.restore(state);
                Some(control)
            }
            // It is out of order until the driver resets the device.
            (_, None) => None,
            (None, Some(_)) => return Err(NetError::State),
        };
        let known = |index: usize| driver.bases.iter().any(|base| usize::from(base.index) == index);
        if !device.ready().all(|(index, _)| known(index)) {
            return Err(NetError::State);
        }
        self.shared.set_driver(device.features, device.pairs);
        match expected {
            Some(expected) if expected.is_like(&device) => device.inflight = expected.inflight,
            other => {
                self.disappoint(other)?;
                let rings = rings(&device, &self.shared, &driver.bases);
                let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
                link.set_up(for_backend(device.features), &self.memory, &mut device.inflight, &rings)?;
            }
        }
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        link.place(&rings(&device, &self.shared, &driver.bases))?;
        self.device = Some(device);
        self.suspended = Some(Suspended { bases: driver.bases.clone(), set_up: true });
        Ok(())
    }

    /// What the back-end was told of a driver is not so.
    fn disappoint(&mut self, expected: Option<Started>) -> Result<(), NetError> {
        let (Some(link), Some(expected)) = (&mut self.link, expected) else { return Ok(()) };
        tracing::debug!("{}: the driver has changed its rings meanwhile", self.name);
        let rings: Vec<_> = expected.ready().map(|(index, _)| index).collect();
        Ok(link.disable(&rings)?)
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
