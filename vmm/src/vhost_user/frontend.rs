//! One connection to a back-end, from `SET_OWNER` to its end (vhost-user specification, "Starting and stopping
//! rings" and "Multiple queue support").
//!
//! A [`Link`] knows what the back-end offers and which rings it has started, and nothing of the guest. Any error
//! leaves the connection in an unknown state: whoever gets one drops the link and connects anew.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use thiserror::Error;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
    VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::inflight::Inflight;
use super::pipeline::Pipeline;
use super::watchdog::Watchdog;
use crate::event;
use crate::memory::GuestMemory;
use crate::virtio::{QueueSetup, feature};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = feature(30);
/// The rings that a back-end without the MQ protocol feature has.
const RINGS_WITHOUT_MULTI_QUEUE: u16 = 2;
/// The part of virtio-net's configuration space that a VMM asks for: MAC, status, queue pairs, MTU.
pub const CONFIG_SIZE: usize = 12;

/// How long a back-end may take to answer before the connection is given up.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What can go wrong between the VMM and its back-end.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Nobody listens.
    #[error("cannot connect: start baton-backend there first")]
    Connect(#[source] io::Error),
    /// The connection cannot be set up on this side.
    #[error("cannot prepare the connection")]
    Socket(#[source] io::Error),
    /// No answer for too long.
    #[error("no answer within {} s: is it stuck, or does it serve another front-end?", PATIENCE.as_secs())]
    Silent,
    /// A message was refused, or the connection broke.
    #[error("{message} failed")]
    Message {
        /// Its name in the specification.
        message: &'static str,
        /// What the protocol's crate said.
        #[source]
        source: vhost::Error,
    },
    /// A back-end for legacy virtio only.
    #[error("it does not offer virtio 1 (VIRTIO_F_VERSION_1)")]
    Legacy,
    /// Too few rings.
    #[error("it serves {offered} vrings, and {needed} are needed: start it with --queue-pairs={}", needed / 2)]
    TooFewRings {
        /// What it serves.
        offered: u64,
        /// Two for each queue pair.
        needed: u16,
    },
    /// A ring that is further than a split ring can be.
    #[error("it stopped vring {index} at {base}, which is no index of a split ring")]
    Base {
        /// The ring.
        index: usize,
        /// What it said.
        base: u32,
    },
    /// A back-end that wants its state to go another way.
    #[error("it answered SET_DEVICE_STATE_FD with a channel of its own, which is not supported")]
    OtherChannel,
    /// Guest memory that has no file, or a ring that is not in guest memory.
    #[error("guest memory cannot be shared")]
    Memory(#[source] vhost::Error),
    /// A ring that is not in guest memory.
    #[error("a virtqueue is not in guest memory")]
    Ring(#[source] vm_memory::GuestMemoryError),
}

fn failed(message: &'static str) -> impl FnOnce(vhost::Error) -> LinkError {
    move |source| LinkError::Message { message, source }
}

/// What a back-end offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its virtio features.
    pub features: u64,
    /// The start of its configuration space, if it has one.
    pub config: Option<[u8; CONFIG_SIZE]>,
}

/// A ring that shall be started.
#[derive(Debug)]
pub struct RingStart<'a> {
    /// Its index.
    pub index: usize,
    /// Where it is.
    pub setup: QueueSetup,
    /// The next available index to be processed.
    pub base: u16,
    /// Whether its queue pair is in use.
    pub enabled: bool,
    /// The driver's notifications.
    pub kick: &'a EventFd,
    /// The device's interrupts.
    pub call: &'a EventFd,
}

/// Connects without waiting: a listener whose backlog is full counts as none.
pub fn connect_to(path: &Path) -> Result<UnixStream, LinkError> {
    let connected = || -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(socket)
    };
    let stream = connected().map(UnixStream::from).map_err(|error| LinkError::Connect(error.into()))?;
    stream.set_nonblocking(false).map_err(LinkError::Socket)?;
    Ok(stream)
}

/// Ends a connection from another thread, so that nobody waits for an answer any longer.
#[derive(Debug)]
pub struct Cutter(UnixStream);

impl Cutter {
    /// For the connection `stream`.
    pub fn new(stream: &UnixStream) -> Result<Self, LinkError> {
        stream.try_clone().map(Self).map_err(LinkError::Socket)
    }

    /// Cuts it.
    pub fn cut(&self) {
        // A connection that is closed already needs no cut.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A connection to a back-end, after the handshake.
pub struct Link {
    frontend: Frontend,
    /// The same socket, to watch.
    socket: UnixStream,
    offer: Offer,
    protocol: VhostUserProtocolFeatures,
    has_protocol_features: bool,
    has_memory: bool,
    started: Vec<usize>,
    watchdog: Watchdog,
}

impl fmt::Debug for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offer, protocol, started, .. } = self;
        formatter
            .debug_struct("Link")
            .field("offer", offer)
            .field("protocol", protocol)
            .field("started", started)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Greets the back-end at the other end of `stream`, which is to serve at least `rings` vrings.
    pub fn establish(stream: UnixStream, rings: u16) -> Result<Self, LinkError> {
        let socket = stream.try_clone().map_err(LinkError::Socket)?;
        let watched = stream.try_clone().map_err(LinkError::Socket)?;
        let mut link = Self {
            frontend: Frontend::from_stream(stream, u64::from(RINGS_WITHOUT_MULTI_QUEUE)),
            socket,
            offer: Offer { features: 0, config: None },
            protocol: VhostUserProtocolFeatures::empty(),
            has_protocol_features: false,
            has_memory: false,
            started: Vec::new(),
            watchdog: Watchdog::start(watched, baton_faults::patience(PATIENCE))
                .map_err(LinkError::Socket)?,
        };
        link.in_time(|link| link.greet(rings))?;
        Ok(link)
    }

    /// Carries an exchange out, unless it takes too long.
    fn in_time<F>(&mut self, exchange: F) -> Result<(), LinkError>
    where
        F: FnOnce(&mut Self) -> Result<(), LinkError>,
    {
        let watch = self.watchdog.watch();
        let outcome = exchange(self);
        drop(watch);
        outcome.map_err(|error| if self.watchdog.has_cut() { LinkError::Silent } else { error })
    }

    fn greet(&mut self, rings: u16) -> Result<(), LinkError> {
        let frontend = &mut self.frontend;
        frontend.set_owner().map_err(failed("SET_OWNER"))?;
        let features = frontend.get_features().map_err(failed("GET_FEATURES"))?;
        if features & feature(VIRTIO_F_VERSION_1) == 0 {
            return Err(LinkError::Legacy);
        }
        self.has_protocol_features = features & PROTOCOL_FEATURES != 0;
        if self.has_protocol_features {
            self.protocol = negotiate(frontend)?;
        }
        let offered = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            frontend.get_queue_num().map_err(failed("GET_QUEUE_NUM"))?
        } else {
            u64::from(RINGS_WITHOUT_MULTI_QUEUE)
        };
        if offered < u64::from(rings) {
            return Err(LinkError::TooFewRings { offered, needed: rings });
        }
        let has_config = self.protocol.contains(VhostUserProtocolFeatures::CONFIG);
        let config = if has_config { Some(read_config(frontend)?) } else { None };
        self.offer = Offer { features, config };
        Ok(())
    }

    /// What the back-end offers.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The connection, to be watched: a back-end that says anything unasked has ended it or broken the protocol.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Shares guest memory: what takes long is done before a guest waits for it.
    pub fn share_memory(&mut self, memory: &GuestMemory) -> Result<(), LinkError> {
        self.in_time(|link| link.set_memory(memory))
    }

    fn set_memory(&mut self, memory: &GuestMemory) -> Result<(), LinkError> {
        let regions: Result<Vec<_>, _> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        self.frontend.set_mem_table(&regions.map_err(LinkError::Memory)?).map_err(failed("SET_MEM_TABLE"))?;
        self.has_memory = true;
        Ok(())
    }

    /// Acknowledges `features`, shares `memory` if that was not done, and tells all about `rings` that stays the same
    /// while a guest runs. `inflight` is kept from one back-end of these rings to the next; one that does without it
    /// makes it worthless.
    pub fn set_up(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        inflight: &mut Option<Inflight>,
        rings: &[RingStart<'_>],
    ) -> Result<(), LinkError> {
        self.in_time(|link| {
            let protocol = if link.has_protocol_features { PROTOCOL_FEATURES } else { 0 };
            link.frontend.set_features(features | protocol).map_err(failed("SET_FEATURES"))?;
            if !link.has_memory {
                link.set_memory(memory)?;
            }
            link.track_inflight(inflight, rings)?;
            rings.iter().try_for_each(|ring| link.set_up_ring(ring, memory))
        })
    }

    /// Tells where `rings`, which were set up, are. From then on each can be started.
    pub fn place(&mut self, rings: &[RingStart<'_>]) -> Result<(), LinkError> {
        self.in_time(|link| {
            let mut pipeline = link.pipeline();
            rings.iter().try_for_each(|ring| pipeline.set_base(ring.index, ring.base))?;
            pipeline.finish().map(drop)
        })
    }

    /// Starts `rings`, which were set up and placed.
    pub fn run(&mut self, rings: &[RingStart<'_>]) -> Result<(), LinkError> {
        self.in_time(|link| {
            link.started.extend(rings.iter().map(|ring| ring.index));
            let mut pipeline = link.pipeline();
            rings.iter().try_for_each(|ring| pipeline.set_kick(ring.index, event::descriptor(ring.kick)))?;
            pipeline.finish().map(drop)
        })
    }

    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline::new(&self.socket, self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK))
    }

    /// Gives the back-end the inflight region; asks it for one if there is none yet.
    fn track_inflight(
        &mut self,
        inflight: &mut Option<Inflight>,
        rings: &[RingStart<'_>],
    ) -> Result<(), LinkError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            *inflight = None;
            return Ok(());
        }
        let vrings = rings.iter().filter_map(|ring| u16::try_from(ring.index + 1).ok()).max();
        let entries = rings.iter().map(|ring| ring.setup.size).max();
        let (Some(vrings), Some(entries)) = (vrings, entries) else { return Ok(()) };
        let frontend = &mut self.frontend;
        let region = match inflight {
            Some(region) => region,
            None => {
                inflight.insert(Inflight::ask(frontend, vrings, entries).map_err(failed("GET_INFLIGHT_FD"))?)
            }
        };
        region.give(frontend).map_err(failed("SET_INFLIGHT_FD"))
    }

    fn set_up_ring(&mut self, ring: &RingStart<'_>, memory: &GuestMemory) -> Result<(), LinkError> {
        let address = |guest: u64| {
            let pointer = memory.get_host_address(GuestAddress(guest)).map_err(LinkError::Ring)?;
            Ok::<u64, LinkError>(pointer.addr() as u64)
        };
        let place = VringConfigData {
            queue_max_size: ring.setup.size,
            queue_size: ring.setup.size,
            flags: 0,
            desc_table_addr: address(ring.setup.descriptor_table)?,
            used_ring_addr: address(ring.setup.used_ring)?,
            avail_ring_addr: address(ring.setup.available_ring)?,
            log_addr: None,
        };
        let (frontend, index) = (&self.frontend, ring.index);
        frontend.set_vring_num(index, ring.setup.size).map_err(failed("SET_VRING_NUM"))?;
        frontend.set_vring_addr(index, &place).map_err(failed("SET_VRING_ADDR"))?;
        frontend.set_vring_call(index, ring.call).map_err(failed("SET_VRING_CALL"))?;
        // A ring that is enabled and not started does nothing; it starts as what it is to be.
        self.enable_ring(index, ring.enabled)
    }

    /// Disables rings that were set up for nothing.
    pub fn disable(&mut self, rings: &[usize]) -> Result<(), LinkError> {
        self.in_time(|link| rings.iter().try_for_each(|&index| link.enable_ring(index, false)))
    }

    fn enable_ring(&mut self, index: usize, enabled: bool) -> Result<(), LinkError> {
        if !self.has_protocol_features {
            return Ok(());
        }
        self.frontend.set_vring_enable(index, enabled).map_err(failed("SET_VRING_ENABLE"))
    }

    /// Enables the rings of the first `pairs` queue pairs that are started, and disables the others. Without protocol
    /// features all rings are always enabled.
    pub fn enable_pairs(&mut self, pairs: u16) -> Result<(), LinkError> {
        self.in_time(|link| {
            let started = link.started.clone();
            started.iter().try_for_each(|&index| link.enable_ring(index, index / 2 < usize::from(pairs)))
        })
    }

    /// Stops the rings that were started: on return, the back-end has left every one and touches no guest memory. It
    /// keeps all the rest. Gives how far each ring is.
    pub fn suspend(&mut self) -> Result<Vec<(usize, u16)>, LinkError> {
        let mut bases = Vec::new();
        self.in_time(|link| {
            bases = link.stop_rings()?;
            Ok(())
        })?;
        Ok(bases)
    }

    fn stop_rings(&mut self) -> Result<Vec<(usize, u16)>, LinkError> {
        let started = std::mem::take(&mut self.started);
        let mut pipeline = self.pipeline();
        started.iter().try_for_each(|&index| pipeline.get_base(index))?;
        let split =
            |(index, base)| Ok((index, u16::try_from(base).map_err(|_| LinkError::Base { index, base })?));
        pipeline.finish()?.into_iter().map(split).collect()
    }

    /// Whether the back-end can give its state away, or take another's.
    pub fn has_device_state(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE)
    }

    /// Has the back-end, whose rings are stopped, begin to write its state to `channel` or to read it there.
    pub fn begin_transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        channel: OwnedFd,
    ) -> Result<(), LinkError> {
        self.in_time(|link| {
            let stopped = VhostTransferStatePhase::STOPPED;
            let other = link
                .frontend
                .set_device_state_fd(direction, stopped, channel)
                .map_err(failed("SET_DEVICE_STATE_FD"))?;
            if other.is_some() { Err(LinkError::OtherChannel) } else { Ok(()) }
        })
    }

    /// Waits until the back-end has written or read its state.
    pub fn finish_transfer(&mut self) -> Result<(), LinkError> {
        self.in_time(|link| link.frontend.check_device_state().map_err(failed("CHECK_DEVICE_STATE")))
    }

    /// Stops the device: on return, the back-end has left every ring and touches no guest memory.
    pub fn stop(&mut self) -> Result<(), LinkError> {
        self.in_time(Self::stop_device)
    }

    fn stop_device(&mut self) -> Result<(), LinkError> {
        let started = self.started.clone();
        self.stop_rings()?;
        // A device that was reset may have forgotten it.
        self.has_memory = false;
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            return self.frontend.reset_device().map_err(failed("RESET_DEVICE"));
        }
        started.iter().try_for_each(|&index| self.enable_ring(index, false))
    }
}

fn negotiate(frontend: &mut Frontend) -> Result<VhostUserProtocolFeatures, LinkError> {
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::DEVICE_STATE;
    let offered = frontend.get_protocol_features().map_err(failed("GET_PROTOCOL_FEATURES"))?;
    let protocol = offered & wanted;
    frontend.set_protocol_features(protocol).map_err(failed("SET_PROTOCOL_FEATURES"))?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    Ok(protocol)
}

fn read_config(frontend: &mut Frontend) -> Result<[u8; CONFIG_SIZE], LinkError> {
    let size = u32::try_from(CONFIG_SIZE).unwrap_or(u32::MAX);
    let (_, bytes) = frontend
        .get_config(0, size, VhostUserConfigFlags::empty(), &[0; CONFIG_SIZE])
        .map_err(failed("GET_CONFIG"))?;
    let mut config = [0; CONFIG_SIZE];
    config.copy_from_slice(&bytes);
    Ok(config)
}

#[cfg(test)]
mod tests;
