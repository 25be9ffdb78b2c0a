//! A working network device for tests: connects, negotiates and sets all rings up. Its frames are in [`super::frame_io`].
//!
//! Everything it is made of is public, so that a test can do one step differently. Vring `2 * pair` receives,
//! `2 * pair + 1` transmits.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::connection::Connection;
use super::dirty_log::DirtyLog;
use super::inflight::Inflight;
use super::memory::GuestMemory;
use super::net::features;
use super::ring::Ring;
use super::wire::protocol;

/// How long the device may take for anything. Only catches one that hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How a [`Device`] is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many queue pairs to set up.
    pub queue_pairs: u16,
    /// How many descriptors each queue has.
    pub queue_size: u16,
    /// The virtio features to acknowledge. All must be offered.
    pub features: u64,
    /// The vhost-user protocol features to acknowledge. All must be offered.
    pub protocol_features: u64,
    /// The lengths of the descriptors of each receive buffer.
    pub receive_pieces: Vec<u32>,
    /// The lengths of the descriptors of each transmit buffer; each frame takes as many as it needs.
    pub transmit_pieces: Vec<u32>,
    /// Put the chains into indirect tables.
    pub indirect: bool,
    /// Check that the device writes nothing behind a frame. Costs a write of the whole buffer a frame.
    pub canaries: bool,
    /// The guest's memory in bytes, where that is more than everything needs.
    pub memory: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            queue_size: 256,
            features: features::VERSION_1 | features::MRG_RXBUF | features::PROTOCOL_FEATURES,
            protocol_features: protocol::MQ | protocol::REPLY_ACK,
            receive_pieces: vec![2048],
            transmit_pieces: vec![2048],
            indirect: false,
            canaries: true,
            memory: 0,
        }
    }
}

impl Options {
    /// Transmit and receive buffers for frames of up to 64 KiB: with mergeable receive buffers of 2 KiB where
    /// these were negotiated, else in one piece.
    pub fn with_large_frames(self) -> Self {
        let whole = vec![65_536 + 64];
        let receive_pieces =
            if self.features & features::MRG_RXBUF != 0 { vec![2048] } else { whole.clone() };
        Self { receive_pieces, transmit_pieces: whole, ..self }
    }
}

/// One queue pair.
#[derive(Debug)]
pub struct Pair {
    /// TAP to guest.
    pub receive: Ring,
    /// Guest to TAP.
    pub transmit: Ring,
}

/// A network device as its driver and front-end see it.
#[derive(Debug)]
pub struct Device {
    /// The vhost-user socket.
    pub connection: Connection,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    /// What was asked for.
    pub options: Options,
    /// The region in which the back-end notes its chains: given to it before the vrings are set up.
    pub inflight: Option<Inflight>,
}

impl Device {
    /// Connects to a listening back-end and brings the device up.
    ///
    /// # Errors
    /// If anything goes wrong on the way.
    pub fn connect(path: &Path, options: Options) -> Result<Self> {
        Self::start(Connection::connect(path)?, options)
    }

    /// Brings the device up on a connected socket.
    ///
    /// # Errors
    /// If anything goes wrong on the way.
    pub fn on_stream(stream: UnixStream, options: Options) -> Result<Self> {
        Self::start(Connection::new(stream)?, options)
    }

    fn start(connection: Connection, options: Options) -> Result<Self> {
        let mut device = Self::new(connection, options)?;
        device.negotiate()?;
        device.set_up()?;
        device.fill_receive_rings()?;
        Ok(device)
    }

    /// Makes the guest's side, and says nothing to the back-end yet.
    ///
    /// # Errors
    /// If memory or descriptors run out.
    pub fn new(connection: Connection, options: Options) -> Result<Self> {
        let buffers = u64::from(options.queue_size) * u64::from(options.queue_pairs);
        let pieces = |pieces: &[u32]| pieces.iter().map(|&length| u64::from(length) + 32).sum::<u64>();
        let slot = pieces(&options.receive_pieces) + pieces(&options.transmit_pieces) + 64;
        // Room for everything in either region.
        let size = (buffers * slot + 0x20_0000).max(options.memory / 2).next_multiple_of(0x1000);
        let mut memory = GuestMemory::new(&[size, size])?;
        let pairs = (0..u32::from(options.queue_pairs))
            .map(|pair| {
                let receive = Ring::new(&mut memory, 2 * pair, &options, &options.receive_pieces)?;
                let transmit = Ring::new(&mut memory, 2 * pair + 1, &options, &options.transmit_pieces)?;
                Ok(Pair { receive, transmit })
            })
            .collect::<Result<_>>()?;
        Ok(Self { connection, memory, pairs, options, inflight: None })
    }

    /// Negotiates the features.
    ///
    /// # Errors
    /// If the back-end does not offer what the options want.
    pub fn negotiate(&mut self) -> Result<()> {
        let wanted = self.options.features;
        let offered = self.connection.get_features()?;
        ensure!(wanted & !offered == 0, "features {:#x} are not offered", wanted & !offered);
        if wanted & features::PROTOCOL_FEATURES != 0 {
            let wanted = self.options.protocol_features;
            let offered = self.connection.get_protocol_features()?;
            ensure!(wanted & !offered == 0, "protocol features {:#x} are not offered", wanted & !offered);
            self.connection.set_protocol_features(wanted)?;
            self.connection.acknowledged = wanted & protocol::REPLY_ACK != 0;
        }
        self.connection.set_owner()?;
        self.connection.set_features(wanted)?;
        let event_idx = wanted & features::EVENT_IDX != 0;
        let in_order = wanted & features::IN_ORDER != 0;
        for pair in &mut self.pairs {
            pair.receive.queue.negotiated(event_idx, in_order);
            pair.transmit.queue.negotiated(event_idx, in_order);
        }
        Ok(())
    }

    /// Sends the memory table, and sets every ring up, which starts it, and enables it.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn set_up(&mut self) -> Result<()> {
        self.share()?;
        for index in 0..2 * u32::from(self.options.queue_pairs) {
            self.set_up_ring(index, 0)?;
            if self.options.features & features::PROTOCOL_FEATURES != 0 {
                self.connection.set_vring_enable(index, true)?;
            }
        }
        Ok(())
    }

    /// Sends the memory table, and the inflight region if there is one.
    fn share(&self) -> Result<()> {
        self.connection.set_memory_table(&self.memory)?;
        self.inflight.as_ref().map_or(Ok(()), |inflight| self.connection.set_inflight(inflight))
    }

    /// Sets one ring up, with the next available index `base`.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn set_up_ring(&self, index: u32, base: u16) -> Result<()> {
        self.set_up_ring_with(index, Some(base))
    }

    /// The same, with a base or without.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn set_up_ring_with(&self, index: u32, base: Option<u16>) -> Result<()> {
        let ring = self.ring(index);
        self.connection.set_vring_num(index, ring.queue.size())?;
        base.map_or(Ok(()), |base| self.connection.set_vring_base(index, base))?;
        self.connection.set_vring_addresses(index, &self.memory, ring.queue.addresses())?;
        self.connection.set_vring_kick(index, Some(ring.kick.as_fd()))?;
        self.connection.set_vring_call(index, Some(ring.call.as_fd()))
    }

    /// A ring by its vring index.
    pub fn ring(&self, index: u32) -> &Ring {
        let pair = &self.pairs[index as usize / 2];
        if index.is_multiple_of(2) { &pair.receive } else { &pair.transmit }
    }

    /// A ring by its vring index, to be changed.
    pub fn ring_mut(&mut self, index: u32) -> &mut Ring {
        let pair = &mut self.pairs[index as usize / 2];
        if index.is_multiple_of(2) { &mut pair.receive } else { &mut pair.transmit }
    }

    /// Stops a ring: gives its next available index.
    ///
    /// # Errors
    /// If there is no answer, or an index that is none.
    pub fn stop_ring(&self, index: u32) -> Result<u16> {
        let base = self.connection.get_vring_base(index)?;
        u16::try_from(base).with_context(|| format!("vring {index} stopped at {base:#x}"))
    }

    /// Starts a stopped ring again, with fresh eventfds.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn restart_ring(&mut self, index: u32, base: u16) -> Result<()> {
        self.ring_mut(index).renew_events()?;
        self.set_up_ring(index, base)?;
        self.ring(index).kick()
    }

    /// Goes on with another connection, the way QEMU does: everything is negotiated and set up again, each ring at
    /// its used index, with the chains that the device has.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn reconnect(&mut self, connection: Connection) -> Result<()> {
        // First the old one: a back-end has one front-end at a time.
        self.connection = connection;
        self.begin_again()
    }

    /// The same, with the old connection still open: the device has moved to another back-end. Gives the old one.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn move_to(&mut self, connection: Connection) -> Result<Connection> {
        let old = std::mem::replace(&mut self.connection, connection);
        self.begin_again()?;
        Ok(old)
    }

    fn begin_again(&mut self) -> Result<()> {
        self.negotiate()?;
        self.share()?;
        self.restart_rings()
    }

    /// Stops all rings, as a front-end does whose VM is stopped, and leaves them enabled.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn suspend(&self) -> Result<()> {
        (0..2 * u32::from(self.options.queue_pairs)).try_for_each(|index| self.stop_ring(index).map(drop))
    }

    /// Starts all rings again, each at its used index, with the chains that the device has.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn restart_rings(&mut self) -> Result<()> {
        for index in 0..2 * u32::from(self.options.queue_pairs) {
            let base = self.ring(index).queue.used_index();
            self.connection.set_vring_enable(index, true)?;
            self.restart_ring(index, base)?;
        }
        Ok(())
    }

    /// Has the back-end note what it writes from now on, in the order of QEMU's messages: the log, the feature, the
    /// addresses. Writes to a ring's used ring are noted at the guest address that `used` gives for it, or not at all.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn start_log(&self, log: &DirtyLog, used: impl Fn(&Ring) -> Option<u64>) -> Result<()> {
        self.connection.set_log_base(log)?;
        self.connection.set_features(self.options.features | features::LOG_ALL)?;
        self.send_addresses(used)
    }

    /// Has it note nothing any more.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn stop_log(&self) -> Result<()> {
        self.connection.set_features(self.options.features)?;
        self.send_addresses(|_| None)
    }

    fn send_addresses(&self, used: impl Fn(&Ring) -> Option<u64>) -> Result<()> {
        for index in 0..2 * u32::from(self.options.queue_pairs) {
            let ring = self.ring(index);
            let addresses = ring.queue.addresses();
            self.connection.set_logged_vring_addresses(index, &self.memory, addresses, used(ring))?;
        }
        // When this is answered, all of it has been done.
        self.connection.get_features()?;
        Ok(())
    }
}
