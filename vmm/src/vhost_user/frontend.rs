//! One connection to a back-end, from `SET_OWNER` to its end (vhost-user specification, "Starting and stopping
//! rings" and "Multiple queue support").
//!
//! A [`Connection`] knows what the back-end offers and which rings it has started, and nothing about the guest. An
//! error leaves the connection in an unknown state: the caller drops it and connects again.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use baton_channel::connect::connect;
use nix::sys::socket::SockType;
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
/// The number of rings of a back-end without the MQ protocol feature.
const RINGS_WITHOUT_MULTI_QUEUE: u16 = 2;
/// The size of the part of virtio-net's configuration space that the VMM reads: MAC, status, queue pairs, MTU.
pub const CONFIG_SIZE: usize = 12;

/// How long a back-end may take to reply.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an exchange with a back-end fails.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// No back-end listens.
    #[error("cannot connect; start baton-backend there first")]
    Connect(#[source] io::Error),
    /// The connection cannot be set up on this side.
    #[error("cannot set up the connection")]
    Socket(#[source] io::Error),
    /// No reply in time.
    #[error("no reply within {} s; check if the back-end hangs or serves another front-end", REPLY_TIMEOUT.as_secs())]
    Timeout,
    /// A message was refused, or the connection broke.
    #[error("{message} failed")]
    Message {
        /// Its name in the specification.
        message: &'static str,
        /// The error of the `vhost` crate.
        #[source]
        source: vhost::Error,
    },
    /// A back-end for legacy virtio only.
    #[error("the back-end does not offer virtio 1 (VIRTIO_F_VERSION_1)")]
    Legacy,
    /// Too few rings.
    #[error("the back-end serves {offered} vrings instead of {needed}; start it with --queue-pairs={}", needed / 2)]
    TooFewRings {
        /// The number that the back-end serves.
        offered: u64,
        /// The number needed: two for each queue pair.
        needed: u16,
    },
    /// An index that a split ring cannot have.
    #[error("the back-end stopped vring {index} at {base}, which is not an index of a split ring")]
    Base {
        /// The ring.
        index: usize,
        /// The index.
        base: u32,
    },
    /// A back-end that sent its own descriptor for its state.
    #[error("the back-end answered SET_DEVICE_STATE_FD with its own channel, which is not supported")]
    UnexpectedChannel,
    /// Guest memory that has no file.
    #[error("guest memory cannot be shared")]
    Memory(#[source] vhost::Error),
    /// A ring that is not in guest memory.
    #[error("a virtqueue is not in guest memory")]
    Ring(#[source] vm_memory::GuestMemoryError),
}

fn failed(message: &'static str) -> impl FnOnce(vhost::Error) -> ConnectionError {
    move |source| ConnectionError::Message { message, source }
}

/// What a back-end offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its virtio features.
    pub features: u64,
    /// The start of its configuration space, if it has one.
    pub config: Option<[u8; CONFIG_SIZE]>,
}

/// A ring to start.
#[derive(Debug)]
pub struct RingStart<'a> {
    /// Its index.
    pub index: usize,
    /// Its size and its addresses.
    pub setup: QueueSetup,
    /// The next available index to process.
    pub base: u16,
    /// Whether its queue pair is in use.
    pub enabled: bool,
    /// The driver's notifications.
    pub kick: &'a EventFd,
    /// The device's interrupts.
    pub call: &'a EventFd,
}

/// Connects without waiting. A listener whose backlog is full counts as missing.
pub fn connect_to(path: &Path) -> Result<UnixStream, ConnectionError> {
    connect(path, SockType::Stream).map(UnixStream::from).map_err(ConnectionError::Connect)
}

/// A connection to a back-end, after the handshake.
pub struct Connection {
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

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offer, protocol, started, .. } = self;
        formatter
            .debug_struct("Connection")
            .field("offer", offer)
            .field("protocol", protocol)
            .field("started", started)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Performs the handshake with the back-end at the other end of `stream`, which must serve at least `rings` vrings.
    pub fn establish(stream: UnixStream, rings: u16) -> Result<Self, ConnectionError> {
        let socket = stream.try_clone().map_err(ConnectionError::Socket)?;
        let watched = stream.try_clone().map_err(ConnectionError::Socket)?;
        let mut connection = Self {
            frontend: Frontend::from_stream(stream, u64::from(RINGS_WITHOUT_MULTI_QUEUE)),
            socket,
            offer: Offer { features: 0, config: None },
            protocol: VhostUserProtocolFeatures::empty(),
            has_protocol_features: false,
            has_memory: false,
            started: Vec::new(),
            watchdog: Watchdog::start(watched, baton_faults::patience(REPLY_TIMEOUT))
                .map_err(ConnectionError::Socket)?,
        };
        connection.with_timeout(|connection| connection.handshake(rings))?;
        Ok(connection)
    }

    /// Carries out an exchange, and shuts down the connection if that takes too long.
    fn with_timeout<F>(&mut self, exchange: F) -> Result<(), ConnectionError>
    where
        F: FnOnce(&mut Self) -> Result<(), ConnectionError>,
    {
        let watch = self.watchdog.watch();
        let outcome = exchange(self);
        drop(watch);
        outcome.map_err(|error| if self.watchdog.timed_out() { ConnectionError::Timeout } else { error })
    }

    fn handshake(&mut self, rings: u16) -> Result<(), ConnectionError> {
        let frontend = &mut self.frontend;
        frontend.set_owner().map_err(failed("SET_OWNER"))?;
        let features = frontend.get_features().map_err(failed("GET_FEATURES"))?;
        if features & feature(VIRTIO_F_VERSION_1) == 0 {
            return Err(ConnectionError::Legacy);
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
            return Err(ConnectionError::TooFewRings { offered, needed: rings });
        }
        let has_config = self.protocol.contains(VhostUserProtocolFeatures::CONFIG);
        let config = if has_config { Some(read_config(frontend)?) } else { None };
        self.offer = Offer { features, config };
        Ok(())
    }

    /// Returns what the back-end offers.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Returns the socket, for `poll`. If it is readable between exchanges, the back-end has closed it or violated the
    /// protocol.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Shares guest memory ahead of [`Self::set_up`], because it takes long.
    pub fn share_memory(&mut self, memory: &GuestMemory) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| connection.set_memory(memory))
    }

    fn set_memory(&mut self, memory: &GuestMemory) -> Result<(), ConnectionError> {
        let regions: Result<Vec<_>, _> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        self.frontend
            .set_mem_table(&regions.map_err(ConnectionError::Memory)?)
            .map_err(failed("SET_MEM_TABLE"))?;
        self.has_memory = true;
        Ok(())
    }

    /// Acknowledges `features`, shares `memory` unless it is shared already, and sets up `rings` except for their bases
    /// and kicks. `inflight` passes from one back-end of these rings to the next. A back-end that does not track it
    /// makes it out of date, so it is dropped.
    pub fn set_up(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        inflight: &mut Option<Inflight>,
        rings: &[RingStart<'_>],
    ) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            let protocol = if connection.has_protocol_features { PROTOCOL_FEATURES } else { 0 };
            connection.frontend.set_features(features | protocol).map_err(failed("SET_FEATURES"))?;
            if !connection.has_memory {
                connection.set_memory(memory)?;
            }
            connection.track_inflight(inflight, rings)?;
            rings.iter().try_for_each(|ring| connection.set_up_ring(ring, memory))
        })
    }

    /// Sets the bases of `rings`, which must be set up. They can then be started.
    pub fn set_bases(&mut self, rings: &[RingStart<'_>]) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            let mut pipeline = connection.pipeline();
            rings.iter().try_for_each(|ring| pipeline.set_base(ring.index, ring.base))?;
            pipeline.finish().map(drop)
        })
    }

    /// Starts `rings`, which must be set up and have their bases.
    pub fn start_rings(&mut self, rings: &[RingStart<'_>]) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            connection.started.extend(rings.iter().map(|ring| ring.index));
            let mut pipeline = connection.pipeline();
            rings.iter().try_for_each(|ring| pipeline.set_kick(ring.index, event::descriptor(ring.kick)))?;
            pipeline.finish().map(drop)
        })
    }

    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline::new(&self.socket, self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK))
    }

    /// Sends the back-end the inflight region; requests one first if there is none yet.
    fn track_inflight(
        &mut self,
        inflight: &mut Option<Inflight>,
        rings: &[RingStart<'_>],
    ) -> Result<(), ConnectionError> {
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
                inflight.insert(Inflight::get(frontend, vrings, entries).map_err(failed("GET_INFLIGHT_FD"))?)
            }
        };
        region.set(frontend).map_err(failed("SET_INFLIGHT_FD"))
    }

    fn set_up_ring(&mut self, ring: &RingStart<'_>, memory: &GuestMemory) -> Result<(), ConnectionError> {
        let address = |guest: u64| {
            let pointer = memory.get_host_address(GuestAddress(guest)).map_err(ConnectionError::Ring)?;
            Ok::<u64, ConnectionError>(pointer.addr() as u64)
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
        // Safe before the start: a ring that is enabled but not started does nothing.
        self.enable_ring(index, ring.enabled)
    }

    /// Disables rings that are set up but not started.
    pub fn disable(&mut self, rings: &[usize]) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            rings.iter().try_for_each(|&index| connection.enable_ring(index, false))
        })
    }

    fn enable_ring(&mut self, index: usize, enabled: bool) -> Result<(), ConnectionError> {
        if !self.has_protocol_features {
            return Ok(());
        }
        self.frontend.set_vring_enable(index, enabled).map_err(failed("SET_VRING_ENABLE"))
    }

    /// Enables the rings of the first `pairs` queue pairs that are started, and disables the others. Without protocol
    /// features all rings are always enabled.
    pub fn enable_pairs(&mut self, pairs: u16) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            let started = connection.started.clone();
            started
                .iter()
                .try_for_each(|&index| connection.enable_ring(index, index / 2 < usize::from(pairs)))
        })
    }

    /// Stops the started rings, and returns the base of each. On return, the back-end does not touch guest memory. It
    /// keeps everything else that is set up.
    pub fn suspend(&mut self) -> Result<Vec<(usize, u16)>, ConnectionError> {
        let mut bases = Vec::new();
        self.with_timeout(|connection| {
            bases = connection.stop_rings()?;
            Ok(())
        })?;
        Ok(bases)
    }

    fn stop_rings(&mut self) -> Result<Vec<(usize, u16)>, ConnectionError> {
        let started = std::mem::take(&mut self.started);
        let mut pipeline = self.pipeline();
        started.iter().try_for_each(|&index| pipeline.get_base(index))?;
        let split = |(index, base)| {
            Ok((index, u16::try_from(base).map_err(|_| ConnectionError::Base { index, base })?))
        };
        pipeline.finish()?.into_iter().map(split).collect()
    }

    /// Returns whether the back-end can save and load device state.
    pub fn has_device_state(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE)
    }

    /// Tells the back-end to save its state to `channel`, or to load it from there. Its rings must be stopped.
    pub fn begin_transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        channel: OwnedFd,
    ) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            let stopped = VhostTransferStatePhase::STOPPED;
            let other = connection
                .frontend
                .set_device_state_fd(direction, stopped, channel)
                .map_err(failed("SET_DEVICE_STATE_FD"))?;
            if other.is_some() { Err(ConnectionError::UnexpectedChannel) } else { Ok(()) }
        })
    }

    /// Waits until the back-end has saved or loaded its state.
    pub fn finish_transfer(&mut self) -> Result<(), ConnectionError> {
        self.with_timeout(|connection| {
            connection.frontend.check_device_state().map_err(failed("CHECK_DEVICE_STATE"))
        })
    }

    /// Stops the device: on return, the back-end does not touch guest memory.
    pub fn stop(&mut self) -> Result<(), ConnectionError> {
        self.with_timeout(Self::stop_device)
    }

    fn stop_device(&mut self) -> Result<(), ConnectionError> {
        let started = self.started.clone();
        self.stop_rings()?;
        // A reset may drop the memory table.
        self.has_memory = false;
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            return self.frontend.reset_device().map_err(failed("RESET_DEVICE"));
        }
        started.iter().try_for_each(|&index| self.enable_ring(index, false))
    }
}

fn negotiate(frontend: &mut Frontend) -> Result<VhostUserProtocolFeatures, ConnectionError> {
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

fn read_config(frontend: &mut Frontend) -> Result<[u8; CONFIG_SIZE], ConnectionError> {
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
