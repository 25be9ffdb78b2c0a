//! A working network device for tests: connects, negotiates and sets up all rings. [`super::frame_io`] sends and
//! receives its frames.
//!
//! All parts are public, so that a test can replace a single step. Vring `2 * pair` receives, `2 * pair + 1` transmits.

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

/// How long to wait for the device. Only catches a device that hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The properties of a [`Device`].
#[derive(Clone, Debug)]
pub struct Options {
    /// How many queue pairs to set up.
    pub queue_pairs: u16,
    /// How many descriptors each queue has.
    pub queue_size: u16,
    /// The virtio features to acknowledge. The back-end must offer all of them.
    pub features: u64,
    /// The vhost-user protocol features to acknowledge. The back-end must offer all of them.
    pub protocol_features: u64,
    /// The lengths of the descriptors of each receive buffer.
    pub receive_pieces: Vec<u32>,
    /// The lengths of the descriptors of each transmit buffer. A frame uses as many as it needs.
    pub transmit_pieces: Vec<u32>,
    /// Put the chains into indirect tables.
    pub indirect: bool,
    /// Check that the device writes nothing after a frame. Costs a write of the whole buffer per frame.
    pub canaries: bool,
    /// The minimum size of the guest's memory in bytes.
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
    /// Makes transmit buffers large enough for frames of 64 KiB, in one piece. Receive buffers, too, unless mergeable
    /// buffers are negotiated: then they have 2 KiB.
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

/// A network device, seen from its driver and front-end.
#[derive(Debug)]
pub struct Device {
    /// The vhost-user socket.
    pub connection: Connection,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    /// The requested properties.
    pub options: Options,
    /// The region in which the back-end tracks its chains. Sent before the vrings are set up.
    pub inflight: Option<Inflight>,
}

impl Device {
    /// Connects to a listening back-end and brings the device up.
    ///
    /// # Errors
    /// Returns an error if the back-end does not offer the features, refuses a message, or closes the connection.
    pub fn connect(path: &Path, options: Options) -> Result<Self> {
        Self::start(Connection::connect(path)?, options)
    }

    /// Brings the device up on a connected socket.
    ///
    /// # Errors
    /// Returns an error if the back-end does not offer the features, refuses a message, or closes the connection.
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

    /// Sets up the guest's side without sending anything to the back-end.
    ///
    /// # Errors
    /// Returns an error if there is not enough memory or descriptors.
    pub fn new(connection: Connection, options: Options) -> Result<Self> {
        let buffers = u64::from(options.queue_size) * u64::from(options.queue_pairs);
        let pieces = |pieces: &[u32]| pieces.iter().map(|&length| u64::from(length) + 32).sum::<u64>();
        let slot = pieces(&options.receive_pieces) + pieces(&options.transmit_pieces) + 64;
        // Each region has room for everything.
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
    /// Returns an error if the back-end does not offer the features of the options.
    pub fn negotiate(&mut self) -> Result<()> {
        let wanted = self.options.features;
        let offered = self.connection.get_features()?;
        ensure!(wanted & !offered == 0, "the back-end does not offer features {:#x}", wanted & !offered);
        if wanted & features::PROTOCOL_FEATURES != 0 {
            let wanted = self.options.protocol_features;
            let offered = self.connection.get_protocol_features()?;
            ensure!(
                wanted & !offered == 0,
                "the back-end does not offer protocol features {:#x}",
                wanted & !offered
            );
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

    /// Sends the memory table, then sets up every ring, which starts it, and enables it.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
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

    /// Sends the memory table and the inflight region, if there is one.
    fn share(&self) -> Result<()> {
        self.connection.set_memory_table(&self.memory)?;
        self.inflight.as_ref().map_or(Ok(()), |inflight| self.connection.set_inflight(inflight))
    }

    /// Sets up one ring with the next available index `base`.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn set_up_ring(&self, index: u32, base: u16) -> Result<()> {
        self.set_up_ring_with(index, Some(base))
    }

    /// As [`Self::set_up_ring`]; without a base, sends no `SET_VRING_BASE`.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn set_up_ring_with(&self, index: u32, base: Option<u16>) -> Result<()> {
        let ring = self.ring(index);
        self.connection.set_vring_num(index, ring.queue.size())?;
        base.map_or(Ok(()), |base| self.connection.set_vring_base(index, base))?;
        self.connection.set_vring_addresses(index, &self.memory, ring.queue.addresses())?;
        self.connection.set_vring_kick(index, Some(ring.kick.as_fd()))?;
        self.connection.set_vring_call(index, Some(ring.call.as_fd()))
    }

    /// The ring with this vring index.
    pub fn ring(&self, index: u32) -> &Ring {
        let pair = &self.pairs[index as usize / 2];
        if index.is_multiple_of(2) { &pair.receive } else { &pair.transmit }
    }

    /// The ring with this vring index, mutably.
    pub fn ring_mut(&mut self, index: u32) -> &mut Ring {
        let pair = &mut self.pairs[index as usize / 2];
        if index.is_multiple_of(2) { &mut pair.receive } else { &mut pair.transmit }
    }

    /// Stops a ring. Returns its next available index.
    ///
    /// # Errors
    /// Returns an error if there is no reply, or the index has more than 16 bits.
    pub fn stop_ring(&self, index: u32) -> Result<u16> {
        let base = self.connection.get_vring_base(index)?;
        u16::try_from(base).with_context(|| format!("vring {index} stopped at {base:#x}"))
    }

    /// Starts a stopped ring again, with fresh eventfds.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn restart_ring(&mut self, index: u32, base: u16) -> Result<()> {
        self.ring_mut(index).renew_events()?;
        self.set_up_ring(index, base)?;
        self.ring(index).kick()
    }

    /// Continues on another connection as QEMU does: negotiates and sets up everything again, and starts each ring at
    /// its used index, with the chains that the device has.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn reconnect(&mut self, connection: Connection) -> Result<()> {
        // Closes the old connection first: a back-end serves one front-end at a time.
        self.connection = connection;
        self.begin_again()
    }

    /// As [`Self::reconnect`], but keeps the old connection open and returns it: the device has moved to another
    /// back-end.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
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

    /// Stops all rings but leaves them enabled, as a front-end does when its VM is stopped.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn suspend(&self) -> Result<()> {
        (0..2 * u32::from(self.options.queue_pairs)).try_for_each(|index| self.stop_ring(index).map(drop))
    }

    /// Starts all rings again, each at its used index, with the chains that the device has.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn restart_rings(&mut self) -> Result<()> {
        for index in 0..2 * u32::from(self.options.queue_pairs) {
            let base = self.ring(index).queue.used_index();
            self.connection.set_vring_enable(index, true)?;
            self.restart_ring(index, base)?;
        }
        Ok(())
    }

    /// Makes the back-end log its writes from now on. Sends the messages in QEMU's order: the log, the feature, the
    /// addresses. Writes to a used ring are logged at the guest address that `used` returns for the ring, or not at
    /// all.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
    pub fn start_log(&self, log: &DirtyLog, used: impl Fn(&Ring) -> Option<u64>) -> Result<()> {
        self.connection.set_log_base(log)?;
        self.connection.set_features(self.options.features | features::LOG_ALL)?;
        self.send_addresses(used)
    }

    /// Makes the back-end stop logging its writes.
    ///
    /// # Errors
    /// Returns an error if the back-end refuses.
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
        // Once the back-end replies, it has handled all of these messages.
        self.connection.get_features()?;
        Ok(())
    }
}
