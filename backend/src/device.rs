//! The network device: its TAP, its workers, and the state of the session that drives it.
//!
//! All state that a front-end sets is in [`SessionState`], plain and movable; the device makes the dataplane follow
//! it. Every change goes through [`Device::change`]: the pairs it concerns are parked, their vrings taken out and
//! their places noted, the state changed, and what is set up whole is put back in and resumed. So no worker ever
//! sees a change, and an answer to the front-end is given after its effect. Changes that come together cost a pair one
//! stop and one start: between [`Device::hold`] and [`Device::release`] the pairs concerned stay parked.
//!
//! The TAP is here while this process owns it. Without it, before it was handed over or while it is offered to another
//! process, everything else is as usual, and the rings wait.

mod freeze;
mod handover;
mod queues;
mod stage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_control::limited;
use baton_protocol::control::Datapath;
use virtio_bindings::virtio_net;

use crate::dataplane::failures::WorkerFailure;
use crate::dataplane::pair::QueuePair;
use crate::dataplane::ring::Side;
use crate::dataplane::rx::RxSettings;
use crate::dataplane::worker::Worker;
use crate::dirty_log::{DirtyLog, LogError};
use crate::event_channel::EventSender;
use crate::features::{Features, LOG_ALL, Offer};
use crate::inflight::InflightRegion;
use crate::memory::GuestMemory;
use crate::metrics::PairCounters;
use crate::net_header::{self, Accepted};
use crate::sigbus::MAX_REGIONS;
use crate::tap::{Offloads, Tap, TapError};
use crate::vhost_net::{self, VhostNet};
use crate::vring::LayoutError;
use crate::vring_setup::{Surroundings, VringSetup};
pub use freeze::Frozen;
use stage::{Staged, Surplus};

/// What the operator decided about the device. It travels with the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The guest's MAC address.
    pub mac: Option<[u8; 6]>,
    /// The guest's MTU.
    pub mtu: Option<u16>,
    /// The TAP's send buffer in bytes.
    pub sndbuf: Option<u32>,
    /// The program that the last owner of the TAP runs at the end, by its absolute path.
    pub downscript: Option<PathBuf>,
    /// How long a worker looks for work before it waits.
    pub poll: Duration,
}

/// Who moves the frames.
#[derive(Debug)]
pub enum Vhost {
    /// The workers.
    None,
    /// The kernel; for each queue pair an instance is opened when it is known how many there are. One is, to see what
    /// it can do.
    Open(VhostNet),
    /// The kernel, with an instance for each queue pair.
    Given(Vec<VhostNet>),
    /// The kernel, with instances that come with a session: this process may open none.
    Coming,
}

/// The whole state of a session, as the front-end set it.
#[derive(Debug, Default)]
pub struct SessionState {
    /// Virtio features (`SET_FEATURES`).
    pub features: Features,
    /// Protocol features (`SET_PROTOCOL_FEATURES`).
    pub protocol_features: u64,
    /// Shared memory.
    pub memory: Arc<GuestMemory>,
    /// `SET_LOG_BASE`: where to note what was written, while [`Self::active_log`] gives it.
    pub log: Option<Arc<DirtyLog>>,
    /// `SET_INFLIGHT_FD`: where to note which chains were taken.
    pub inflight: Option<Arc<InflightRegion>>,
    /// The vrings: 2n receives, 2n + 1 transmits.
    pub vrings: Vec<VringSetup>,
}

impl SessionState {
    /// The log, if the front-end wants to know of what is written now (`LOG_ALL`).
    pub fn active_log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.features.has(LOG_ALL))
    }

    /// Checks that a log covers the memory, if these are to be a session's features, memory and log.
    ///
    /// # Errors
    /// [`LogError::TooSmall`].
    pub fn check_log(
        features: Features,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
    ) -> Result<(), LogError> {
        log.filter(|_| features.has(LOG_ALL)).map_or(Ok(()), |log| log.check_covers(memory))
    }

    fn set_enabled(&mut self, vring: usize, enabled: bool) {
        let pauses = !self.vrings[0].enabled;
        let vring = &mut self.vrings[vring];
        if !enabled {
            vring.paused = pauses && (vring.paused || vring.enabled && vring.is_set_up());
        }
        vring.enabled = enabled;
        vring.was_enabled |= enabled;
    }
}

/// Why a change was refused.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A vring does not fit the memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The TAP would not.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A thread, an epoll instance or the like could not be had.
    #[error("the dataplane of queue pair {pair} cannot go on")]
    Dataplane {
        /// The pair.
        pair: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A worker thread died.
    #[error("the worker of queue pair {0} is dead")]
    Dead(usize),
}

/// The device.
#[derive(Debug)]
pub struct Device {
    // Declared first: the workers end before the TAP is closed.
    workers: Vec<Worker>,
    counters: Vec<Arc<PairCounters>>,
    datapath: Datapath,
    tap: Option<Tap>,
    /// How many queue pairs it has, or could have.
    pairs: usize,
    /// What the datapath can do of what is offered.
    mask: Features,
    offer: Features,
    config: DeviceConfig,
    offers_device_state: bool,
    session: SessionState,
    /// Whether pairs stay parked after a change.
    held: bool,
    /// When to detach the queues of pairs that are enabled and were not set up.
    queues_settle: Option<Instant>,
    /// Ready for a session that comes from another process; its state is in `session` already.
    staged: Option<Staged>,
    /// Of no more use.
    surplus: Surplus,
}

impl Device {
    /// A device on `tap`, or without one for now, with `pairs` queue pairs or up to as many. `failures` hears of its
    /// workers.
    ///
    /// # Errors
    /// [`DeviceError::Dataplane`].
    pub fn new(
        tap: Option<Tap>,
        pairs: usize,
        vhost: Vhost,
        config: DeviceConfig,
        failures: &EventSender<WorkerFailure>,
    ) -> Result<Self, DeviceError> {
        let everything = Features(u64::MAX);
        let (datapath, given) = match vhost {
            Vhost::None => (Datapath::Userspace, Vec::new()),
            Vhost::Open(first) => (Datapath::VhostNet, vec![first]),
            Vhost::Given(all) => (Datapath::VhostNet, all),
            Vhost::Coming => (Datapath::VhostNet, Vec::new()),
        };
        let mask = given.iter().fold(everything, |mask, vhost| vhost.masked(mask));
        let mut given = given.into_iter();
        let mut workers = Vec::new();
        let mut counters = Vec::new();
        for (pair, index) in (0..pairs).zip(0u16..) {
            let failed = |source| DeviceError::Dataplane { pair, source };
            let own = Arc::new(PairCounters::default());
            let queue_pair =
                QueuePair::new(index, given.next(), Arc::clone(&own), config.poll).map_err(failed)?;
            workers.push(Worker::new(index, queue_pair, failures.clone()).map_err(failed)?);
            counters.push(own);
        }
        let session = SessionState::default();
        let offer = Features::default();
        let mut device = Self {
            workers,
            counters,
            datapath,
            tap: None,
            pairs,
            mask,
            offer,
            config,
            offers_device_state: true,
            session,
            held: false,
            queues_settle: None,
            staged: None,
            surplus: Surplus::default(),
        };
        device.session = device.new_session();
        // Before there is a TAP everything is offered that one could do; what is negotiated arrives with it.
        let superset = Offer { mac: true, mtu: true, ufo: true, uso: true };
        device.offer = Features(superset.features().0 & mask.0);
        if let Some(tap) = tap {
            device.offer = device.offer_with(&device.config, tap.has_ufo(), tap.has_uso());
            device.use_tap(tap)?;
            // Nobody has begun anything that goes on.
            device.session = device.new_session();
        }
        Ok(device)
    }

    /// What the device offers.
    pub fn offer(&self) -> Features {
        self.offer
    }

    /// Whether front-ends are offered to move device state (`--device-state`).
    pub fn offers_device_state(&self) -> bool {
        self.offers_device_state
    }

    /// Has front-ends offered to move device state, or not.
    pub fn set_offers_device_state(&mut self, offers: bool) {
        self.offers_device_state = offers;
    }

    /// What the operator decided.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// How many queue pairs it has, 1 to 128; how many it could have, as long as that is not known.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Who moves the frames.
    pub fn datapath(&self) -> Datapath {
        self.datapath
    }

    /// How many memory regions it can use.
    pub fn max_regions(&self) -> usize {
        match self.datapath {
            Datapath::Userspace => MAX_REGIONS,
            Datapath::VhostNet => vhost_net::max_regions(),
        }
    }

    /// The TAP, while this process owns it.
    pub fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    /// The counters of each pair.
    pub fn counters(&self) -> &[Arc<PairCounters>] {
        &self.counters
    }

    /// The session's state. Of a ring that runs, `base` is not up to date.
    pub fn session(&self) -> &SessionState {
        &self.session
    }

    fn new_session(&self) -> SessionState {
        let vrings = (0..2 * self.workers.len()).map(|_| VringSetup::default()).collect();
        SessionState { vrings, ..SessionState::default() }
    }

    /// Ends the session: every ring stops, the memory is unmapped, the descriptors are closed.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], and [`DeviceError::Tap`] if its settings cannot be put back.
    pub fn end_session(&mut self) -> Result<(), DeviceError> {
        let empty = self.new_session();
        self.queues_settle = None;
        self.change(.., |session| *session = empty)?;
        self.park_each(|parked| match &mut parked.kernel {
            Some(kernel) => kernel.vhost.release(),
            None => Ok(()),
        })?;
        self.set_tap_features(Features::default())
    }

    /// Changes the session's state with the pairs in `pairs` parked.
    ///
    /// A vring that the change makes impossible to map does not run until it is set up anew.
    ///
    /// # Errors
    /// [`DeviceError::Dataplane`] and [`DeviceError::Dead`], after which the session cannot go on.
    pub fn change<T>(
        &mut self,
        pairs: impl std::ops::RangeBounds<usize>,
        action: impl FnOnce(&mut SessionState) -> T,
    ) -> Result<T, DeviceError> {
        let all = 0..self.workers.len();
        let concerned: Vec<usize> = all.filter(|pair| pairs.contains(pair)).collect();
        // All stop at the same time.
        for &pair in &concerned {
            self.workers[pair].close();
        }
        for &pair in &concerned {
            let worker = self.workers[pair].park().ok_or(DeviceError::Dead(pair))?;
            for (side, vring) in sides(pair) {
                if let Some(ring) = worker.take_ring(side) {
                    self.session.vrings[vring].deactivate(&ring);
                }
            }
        }
        let result = action(&mut self.session);
        for pair in concerned {
            self.put_back(pair)?;
        }
        Ok(result)
    }

    /// Makes a parked pair follow the session's state and resumes it.
    fn put_back(&mut self, pair: usize) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Dataplane { pair, source };
        self.settle_pair(pair)?;
        let log = self.session.active_log().cloned();
        let SessionState { features, memory, vrings, inflight, .. } = &mut self.session;
        let surroundings =
            Surroundings { memory, features: *features, log: log.as_ref(), inflight: inflight.as_ref() };
        let worker = self.workers[pair].park().ok_or(DeviceError::Dead(pair))?;
        for (side, vring) in sides(pair) {
            match vrings[vring].activate(vring, surroundings) {
                Ok(Some(mut ring)) => {
                    // Without the TAP nothing was completed; when there is one, all are called.
                    ring.call_due &= self.tap.is_some();
                    worker.put_ring(side, ring).map_err(failed)?;
                }
                Ok(None) => {}
                Err(error) => {
                    vrings[vring].unmapped();
                    limited!(warn, vring, %error, "vring cannot run");
                }
            }
        }
        if self.held { Ok(()) } else { self.workers[pair].resume().map_err(failed) }
    }

    /// Stops a ring (`GET_VRING_BASE`), and gives the index from which on its chains have not been taken.
    ///
    /// # Errors
    /// As for [`Self::change`].
    pub fn stop_ring(&mut self, vring: usize) -> Result<u16, DeviceError> {
        let ran = self.tap.is_some();
        self.change(vring / 2..=vring / 2, |session| {
            session.vrings[vring].stop(ran);
            session.vrings[vring].base
        })
    }

    /// Enables or disables a ring (`SET_VRING_ENABLE`). What the driver has made available in a transmit ring by then is
    /// sent first, so that a front-end that pauses its VM like this (Cloud Hypervisor does) loses nothing.
    ///
    /// # Errors
    /// As for [`Self::change`], and [`DeviceError::Tap`].
    pub fn set_enabled(&mut self, vring: usize, enabled: bool) -> Result<(), DeviceError> {
        let pair = vring / 2;
        if !enabled && vring == 2 * pair + 1 {
            self.workers[pair].park().ok_or(DeviceError::Dead(pair))?.drain();
        }
        self.change(pair..=pair, |session| session.set_enabled(vring, enabled))?;
        self.follow_pairs()
    }

    /// From now on pairs stay parked after a change.
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Lets all pairs go that are parked, and from now on each after its change.
    ///
    /// # Errors
    /// [`DeviceError::Dataplane`].
    pub fn release(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.held) {
            self.resume_all()?;
        }
        Ok(())
    }

    /// Makes a parked pair follow what was negotiated.
    fn settle_pair(&mut self, pair: usize) -> Result<(), DeviceError> {
        let header = self.header_size();
        let features = self.session.features;
        let worker = self.workers[pair].park().ok_or(DeviceError::Dead(pair))?;
        worker.rx.settings = RxSettings {
            header,
            mergeable: features.has(virtio_net::VIRTIO_NET_F_MRG_RXBUF),
            accepted: Accepted::from(features),
        };
        worker.tx.header = header;
        if let Some(kernel) = &mut worker.kernel {
            kernel.features = features;
        }
        Ok(())
    }

    /// Length of the virtio-net header that was negotiated.
    fn header_size(&self) -> usize {
        header_size(self.session.features)
    }

    /// Takes the features that the front-end accepted; the TAP follows.
    ///
    /// # Errors
    /// [`DeviceError::Tap`], and all is as before; the others as for [`Self::change`].
    pub fn set_features(&mut self, features: Features) -> Result<(), DeviceError> {
        // The workers are parked from before the TAP changes until after.
        let before = self.session.features;
        self.park_all()?;
        let mut result = self.set_tap_features(features);
        let features = if result.is_ok() { features } else { before };
        if result.is_err() {
            // Part of it may have been done.
            result = self.set_tap_features(before).and(result);
        }
        self.change(.., |session| session.features = features)?;
        result
    }

    fn park_all(&mut self) -> Result<(), DeviceError> {
        self.park_each(|_| Ok(()))
    }

    /// Parks all workers, which stop at the same time, and does something with each pair.
    fn park_each(
        &mut self,
        mut action: impl FnMut(&mut QueuePair) -> std::io::Result<()>,
    ) -> Result<(), DeviceError> {
        self.workers.iter().for_each(Worker::close);
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            let parked = worker.park().ok_or(DeviceError::Dead(pair))?;
            action(parked).map_err(|source| DeviceError::Dataplane { pair, source })?;
        }
        Ok(())
    }

    fn set_tap_features(&mut self, features: Features) -> Result<(), DeviceError> {
        let Some(tap) = &mut self.tap else { return Ok(()) };
        tap.set_header_size(header_size(features))?;
        tap.set_offloads(offloads(features))?;
        Ok(())
    }
}

/// The vrings of a pair.
fn sides(pair: usize) -> [(Side, usize); 2] {
    [(Side::Rx, 2 * pair), (Side::Tx, 2 * pair + 1)]
}

/// Length of the virtio-net header that goes with these features.
fn header_size(features: Features) -> usize {
    if features.long_header() { net_header::LONG } else { net_header::SHORT }
}

/// What the guest can take, from the features that it accepted.
fn offloads(features: Features) -> Offloads {
    if !features.has(virtio_net::VIRTIO_NET_F_GUEST_CSUM) {
        return Offloads::default();
    }
    let tso4 = features.has(virtio_net::VIRTIO_NET_F_GUEST_TSO4);
    let tso6 = features.has(virtio_net::VIRTIO_NET_F_GUEST_TSO6);
    let uso = features.has(virtio_net::VIRTIO_NET_F_GUEST_USO4)
        && features.has(virtio_net::VIRTIO_NET_F_GUEST_USO6);
    let ecn = features.has(virtio_net::VIRTIO_NET_F_GUEST_ECN) && (tso4 || tso6);
    let ufo = features.has(virtio_net::VIRTIO_NET_F_GUEST_UFO);
    [
        (tso4, Offloads::TSO4),
        (tso6, Offloads::TSO6),
        (ecn, Offloads::ECN),
        (ufo, Offloads::UFO),
        (uso, Offloads::USO),
    ]
    .into_iter()
    .filter(|(on, _)| *on)
    .fold(Offloads::CSUM, |offloads, (_, more)| offloads.and(more))
}
