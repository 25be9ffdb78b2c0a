//! The network device: its TAP, its workers, and the state of the session that drives it.
//!
//! [`SessionState`] has everything that a front-end sets, as plain, movable data, and the device makes the dataplane
//! follow it. The front-end's messages change it by [`Device::change`], which parks the pairs concerned, takes their
//! vrings out and records their positions, changes the state, puts the vrings that are set up completely back in, and
//! resumes the pairs. So no worker ever sees a change. Between [`Device::hold`] and [`Device::release`] the pairs stay
//! parked: messages that arrive together stop and start a pair once, and the answer to a message follows what it stops
//! or changes and precedes what it starts.
//!
//! A hand-over of a session does not use it: [`Device::freeze`] stops the pairs with their rings in place, and
//! [`Device::stage`] sets up rings that another process still serves. [`Device::follow_pairs`] attaches and detaches
//! queues of the TAP, and parks no pair.
//!
//! The device has the TAP while this process owns it. Without the TAP, before a hand-over or while it is offered to
//! another process, everything else works as usual, and the rings wait.

mod freeze;
mod handover;
mod queues;
mod stage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use baton_control::limited;
use baton_protocol::control::Datapath;
use virtio_bindings::virtio_net;

use crate::args::IoUring;
use crate::dataplane::failures::WorkerFailure;
use crate::dataplane::pair::QueuePair;
use crate::dataplane::polling::PollTime;
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
use crate::tap::{Tap, TapError};
use crate::vhost_net::{self, VhostNet};
use crate::vring::LayoutError;
use crate::vring_setup::{Surroundings, VringSetup};
pub use freeze::Frozen;
pub use stage::SavedCounters;
use stage::{Staged, Surplus};

/// The operator's configuration of the device. It is handed over with the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The guest's MAC address.
    pub mac: Option<[u8; 6]>,
    /// The guest's MTU.
    pub mtu: Option<u16>,
    /// The TAP's send buffer in bytes.
    pub sndbuf: Option<u32>,
    /// Absolute path of the program that the last owner of the TAP runs when it ends.
    pub downscript: Option<PathBuf>,
    /// How long a worker polls before it sleeps.
    pub poll: PollTime,
}

/// Whether the workers or the kernel's vhost-net move the frames, and where its instances come from.
#[derive(Debug)]
pub enum Vhost {
    /// The workers move the frames.
    None,
    /// vhost-net, with one instance opened to learn its features. The others are opened when the number of queue pairs
    /// is known.
    Open(VhostNet),
    /// vhost-net, with an instance for each queue pair.
    Given(Vec<VhostNet>),
    /// vhost-net, with instances that arrive with a session. This process may not open any.
    Coming,
}

/// The whole state of a session, as set by the front-end.
#[derive(Debug, Default)]
pub struct SessionState {
    /// Virtio features (`SET_FEATURES`).
    pub features: Features,
    /// Protocol features (`SET_PROTOCOL_FEATURES`).
    pub protocol_features: u64,
    /// Shared memory.
    pub memory: Arc<GuestMemory>,
    /// The log of changed pages (`SET_LOG_BASE`), used while [`Self::active_log`] returns it.
    pub log: Option<Arc<DirtyLog>>,
    /// The inflight region (`SET_INFLIGHT_FD`).
    pub inflight: Option<Arc<InflightRegion>>,
    /// The vrings: vring 2n receives, vring 2n + 1 transmits.
    pub vrings: Vec<VringSetup>,
}

impl SessionState {
    /// Returns the log, if the front-end has enabled logging (`LOG_ALL`).
    pub fn active_log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.features.has(LOG_ALL))
    }

    /// Checks that `log` covers `memory`, if `features` enable logging.
    ///
    /// # Errors
    /// Returns [`LogError::TooSmall`] if the log does not cover all memory.
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

/// Why a change failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A vring cannot be mapped.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A TAP setting failed.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A system call for the dataplane of a pair failed, for example to create a thread or an epoll instance.
    #[error("the dataplane of queue pair {pair} failed")]
    Dataplane {
        /// The pair.
        pair: usize,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A worker thread died or does not park.
    #[error("the worker of queue pair {0} died or does not stop")]
    Dead(usize),
}

/// The device.
#[derive(Debug)]
pub struct Device {
    // Declared first, so that the workers end before the TAP is closed.
    workers: Vec<Worker>,
    counters: Vec<Arc<PairCounters>>,
    datapath: Datapath,
    tap: Option<Tap>,
    /// The number of queue pairs, or the maximum while the number is unknown.
    pairs: usize,
    /// The features that the datapath supports.
    mask: Features,
    offer: Features,
    config: DeviceConfig,
    offers_device_state: bool,
    session: SessionState,
    /// Whether pairs stay parked after a change.
    held: bool,
    /// When to detach the queues of pairs that are enabled but not set up.
    queues_settle: Option<Instant>,
    /// A session of another process, staged here. `session` already has its state.
    staged: Option<Staged>,
    /// Workers that the device no longer needs.
    surplus: Surplus,
}

impl Device {
    /// Creates a device with `pairs` queue pairs on `tap`. Without a TAP, `pairs` is the maximum. Workers report to
    /// `failures`.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dataplane`] if a worker cannot be created, or an error of [`Self::use_tap`].
    pub fn new(
        tap: Option<Tap>,
        pairs: usize,
        vhost: Vhost,
        config: DeviceConfig,
        io_uring: IoUring,
        failures: &EventSender<WorkerFailure>,
    ) -> Result<Self, DeviceError> {
        let everything = Features(u64::MAX);
        // With vhost-net, the workers write no frames.
        let io_uring = if matches!(vhost, Vhost::None) { io_uring } else { IoUring::Off };
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
            workers.push(Worker::new(index, queue_pair, io_uring, failures.clone()).map_err(failed)?);
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
        // Without a TAP, offer everything that a TAP may support. The negotiated features arrive with the TAP.
        let superset = Offer { mac: true, mtu: true, ufo: true, uso: true };
        device.offer = Features(superset.features().0 & mask.0);
        if let Some(tap) = tap {
            device.offer = device.offer_with(&device.config, tap.has_ufo(), tap.has_uso());
            device.use_tap(tap)?;
            // Discard what `use_tap` set up; no session exists yet.
            device.session = device.new_session();
        }
        Ok(device)
    }

    /// Returns the features that the device offers.
    pub fn offer(&self) -> Features {
        self.offer
    }

    /// Returns whether the device offers front-ends the transfer of device state (`--device-state`).
    pub fn offers_device_state(&self) -> bool {
        self.offers_device_state
    }

    /// Sets whether the device offers front-ends the transfer of device state.
    pub fn set_offers_device_state(&mut self, offers: bool) {
        self.offers_device_state = offers;
    }

    /// Returns the operator's configuration.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Returns the number of queue pairs, 1 to 128, or the maximum while the number is unknown.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Returns the datapath.
    pub fn datapath(&self) -> Datapath {
        self.datapath
    }

    /// Returns how many memory regions the datapath supports.
    pub fn max_regions(&self) -> usize {
        match self.datapath {
            Datapath::Userspace => MAX_REGIONS,
            Datapath::VhostNet => vhost_net::max_regions(),
        }
    }

    /// Returns the TAP, while this process owns it.
    pub fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    /// Returns the counters of each pair.
    pub fn counters(&self) -> &[Arc<PairCounters>] {
        &self.counters
    }

    /// Returns the session's state. The `base` of a running ring is not up to date.
    pub fn session(&self) -> &SessionState {
        &self.session
    }

    fn new_session(&self) -> SessionState {
        let vrings = (0..2 * self.workers.len()).map(|_| VringSetup::default()).collect();
        SessionState { vrings, ..SessionState::default() }
    }

    /// Ends the session: stops every ring, unmaps the memory and closes the descriptors.
    ///
    /// # Errors
    /// Returns an error of [`Self::change`], or [`DeviceError::Tap`] if the TAP's settings cannot be reset.
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

    /// Changes the session's state while the pairs in `pairs` are parked.
    ///
    /// A vring that cannot be mapped after the change does not run until it can be mapped after a later change, for
    /// example because its memory has returned.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dataplane`] if a pair cannot be set up again, or [`DeviceError::Dead`] if a worker does
    /// not park. The session cannot continue after either.
    pub fn change<T>(
        &mut self,
        pairs: impl std::ops::RangeBounds<usize>,
        action: impl FnOnce(&mut SessionState) -> T,
    ) -> Result<T, DeviceError> {
        let all = 0..self.workers.len();
        let concerned: Vec<usize> = all.filter(|pair| pairs.contains(pair)).collect();
        // Close all gates first, so that the workers stop at the same time.
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

    /// Sets up a parked pair according to the session's state and resumes it.
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
                    // Without a TAP nothing was completed, and `use_tap` makes all calls due.
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

    /// Stops a ring (`GET_VRING_BASE`), and returns the available index of the first chain that was not taken.
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

    /// Enables or disables a ring (`SET_VRING_ENABLE`). Before it disables a transmit ring, it sends the chains that
    /// the driver has made available: a front-end that pauses its VM this way (Cloud Hypervisor) must lose no frame.
    ///
    /// # Errors
    /// As for [`Self::change`], and [`DeviceError::Tap`] if a queue cannot be attached or detached.
    pub fn set_enabled(&mut self, vring: usize, enabled: bool) -> Result<(), DeviceError> {
        let pair = vring / 2;
        if !enabled && vring == 2 * pair + 1 {
            self.workers[pair].park().ok_or(DeviceError::Dead(pair))?.drain();
        }
        self.change(pair..=pair, |session| session.set_enabled(vring, enabled))?;
        self.follow_pairs()
    }

    /// Keeps pairs parked after a change, until [`Self::release`].
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Resumes all parked pairs. From now on each pair resumes after a change.
    ///
    /// # Errors
    /// Returns [`DeviceError::Dataplane`] if a pair cannot be resumed.
    pub fn release(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.held) {
            self.resume_all()?;
        }
        Ok(())
    }

    /// Applies the negotiated features to a pair.
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

    /// Returns the negotiated length of the virtio-net header.
    fn header_size(&self) -> usize {
        header_size(self.session.features)
    }

    /// Sets the features that the front-end acknowledged, and adjusts the TAP.
    ///
    /// # Errors
    /// Returns [`DeviceError::Tap`] if the TAP refuses a setting, and keeps the previous features. Otherwise as for
    /// [`Self::change`].
    pub fn set_features(&mut self, features: Features) -> Result<(), DeviceError> {
        // The workers stay parked while the TAP changes.
        let before = self.session.features;
        self.park_all()?;
        let mut result = self.set_tap_features(features);
        let features = if result.is_ok() { features } else { before };
        if result.is_err() {
            // Undo a partial change.
            result = self.set_tap_features(before).and(result);
        }
        self.change(.., |session| session.features = features)?;
        result
    }

    fn park_all(&mut self) -> Result<(), DeviceError> {
        self.park_each(|_| Ok(()))
    }

    /// Parks all workers, which stop at the same time, and calls `action` with each pair.
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
        tap.set_offloads(features.into())?;
        Ok(())
    }
}

/// Returns the vrings of a pair.
fn sides(pair: usize) -> [(Side, usize); 2] {
    [(Side::Rx, 2 * pair), (Side::Tx, 2 * pair + 1)]
}

/// Returns the length of the virtio-net header with these features.
fn header_size(features: Features) -> usize {
    if features.long_header() { net_header::LONG } else { net_header::SHORT }
}
