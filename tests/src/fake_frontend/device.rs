//! A working network device for tests: connects, negotiates, sets all rings up, keeps the receive rings filled, and
//! sends and receives frames.
//!
//! Everything it is made of is public, so that a test can do one step differently. Vring `2 * pair` receives,
//! `2 * pair + 1` transmits.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connection::Connection;
use super::dirty_log::DirtyLog;
use super::inflight::Inflight;
use super::memory::{GuestMemory, SharedSlice};
use super::net::{NetHeader, features};
use super::queue::{Buffer, DESCRIPTOR_SIZE, DriverQueue, Used};
use super::wire::protocol;

/// How long the device may take for anything. Only catches one that hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What the bytes behind a received frame must still be.
const CANARY: u8 = 0xa5;

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

/// A buffer of a queue: where a frame of this driver's is, with its header.
#[derive(Debug)]
struct Slot {
    pieces: Vec<(Buffer, SharedSlice)>,
    /// The guest address of its indirect table.
    table: u64,
    capacity: usize,
}

/// One vring and everything that belongs to it.
#[derive(Debug)]
pub struct Ring {
    /// Its vring index.
    pub index: u32,
    /// The driver's side.
    pub queue: DriverQueue,
    /// Notifies the device.
    pub kick: EventFd,
    /// Notifies the driver.
    pub call: EventFd,
    slots: Vec<Slot>,
    free: Vec<u16>,
    slot_of_head: Vec<u16>,
    /// The buffers of the chain being built.
    chain: Vec<Buffer>,
    indirect: bool,
}

impl Ring {
    fn new(memory: &mut GuestMemory, index: u32, options: &Options, pieces: &[u32]) -> Result<Self> {
        let slots = usize::from(options.queue_size) / if options.indirect { 1 } else { pieces.len() };
        ensure!(slots > 0, "the queue is too small for one buffer");
        let queue = DriverQueue::new(memory, 0, options.queue_size);
        let writable = index.is_multiple_of(2);
        let slots: Vec<_> = (0..slots)
            .map(|number| {
                let region = number % memory.regions().len();
                let pieces: Vec<_> = pieces
                    .iter()
                    .map(|&length| {
                        let bytes = length as usize;
                        let address = memory.allocate(region, bytes, 1);
                        (Buffer { address, length, writable }, memory.slice(address, bytes))
                    })
                    .collect();
                let table = memory.allocate(region, DESCRIPTOR_SIZE * pieces.len(), 16);
                let capacity = pieces.iter().map(|(_, slice)| slice.len()).sum();
                Slot { pieces, table, capacity }
            })
            .collect();
        Ok(Self {
            index,
            free: (0..u16::try_from(slots.len())?).rev().collect(),
            slots,
            slot_of_head: vec![0; usize::from(queue.size())],
            chain: Vec::with_capacity(pieces.len()),
            queue,
            kick: event_fd()?,
            call: event_fd()?,
            indirect: options.indirect,
        })
    }

    /// Makes `length` bytes of a slot available.
    fn add(&mut self, memory: &GuestMemory, slot: u16, mut length: usize) -> Option<u16> {
        let Slot { pieces, table, .. } = &self.slots[usize::from(slot)];
        self.chain.clear();
        for (buffer, slice) in pieces {
            let used = length.min(slice.len());
            if used == 0 {
                break;
            }
            self.chain.push(Buffer { length: u32::try_from(used).ok()?, ..*buffer });
            length -= used;
        }
        let head = if self.indirect {
            self.queue.add_indirect(memory, *table, &self.chain)
        } else {
            self.queue.add(&self.chain)
        }?;
        self.slot_of_head[usize::from(head)] = slot;
        Some(head)
    }

    /// Publishes what was added and kicks if the device wants it.
    fn publish(&mut self) -> Result<()> {
        if self.queue.publish() {
            self.kick()?;
        }
        Ok(())
    }

    /// Kicks, whether the device wants it or not.
    ///
    /// # Errors
    /// The system's.
    pub fn kick(&self) -> Result<()> {
        self.kick.write(1).context("kick")?;
        Ok(())
    }

    /// Begins anew with an empty queue, as a driver does that resets its device.
    ///
    /// # Errors
    /// Never, as the number of slots was checked before.
    pub fn reset(&mut self, memory: &GuestMemory, negotiated: u64) -> Result<()> {
        self.queue = DriverQueue::at(memory, self.queue.addresses(), self.queue.size());
        let has = |feature| negotiated & feature != 0;
        self.queue.negotiated(has(features::EVENT_IDX), has(features::IN_ORDER));
        self.free = (0..u16::try_from(self.slots.len())?).rev().collect();
        Ok(())
    }

    /// Makes fresh eventfds, in which no notification is left.
    ///
    /// # Errors
    /// The system's.
    pub fn renew_events(&mut self) -> Result<()> {
        (self.kick, self.call) = (event_fd()?, event_fd()?);
        Ok(())
    }

    /// Takes the calls so far: how many there were.
    ///
    /// # Errors
    /// The system's.
    pub fn take_calls(&self) -> Result<u64> {
        match self.call.read() {
            Ok(calls) => Ok(calls),
            Err(nix::errno::Errno::EAGAIN) => Ok(0),
            Err(errno) => Err(errno).context("read the call eventfd"),
        }
    }

    /// Waits for a call, and takes it. False if none came until `deadline`.
    ///
    /// # Errors
    /// The system's.
    pub fn wait_call(&self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left)?)?;
        Ok(self.take_calls()? > 0)
    }

    /// Waits until the device has used something, the way a driver does: asks for a call, and sleeps until it comes.
    ///
    /// # Errors
    /// The system's.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<bool> {
        while self.queue.enable_calls() {
            if !self.wait_call(deadline)? && Instant::now() >= deadline {
                return Ok(self.queue.has_used());
            }
        }
        Ok(true)
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

    /// Makes all receive buffers available, and kicks.
    ///
    /// # Errors
    /// The system's.
    pub fn fill_receive_rings(&mut self) -> Result<()> {
        for pair in 0..self.pairs.len() {
            self.post_receive_buffers(pair, usize::MAX)?;
            self.pairs[pair].receive.kick()?;
        }
        Ok(())
    }

    /// All receive buffers' pieces: guest addresses and lengths.
    pub fn receive_buffers(&self) -> impl Iterator<Item = (u64, usize)> {
        let slots = self.pairs.iter().flat_map(|pair| &pair.receive.slots);
        slots.flat_map(|slot| &slot.pieces).map(|(buffer, slice)| (buffer.address, slice.len()))
    }

    /// All used rings: guest addresses and lengths, with the event index.
    pub fn used_rings(&self) -> impl Iterator<Item = (u64, usize)> {
        let rings = self.pairs.iter().flat_map(|pair| [&pair.receive.queue, &pair.transmit.queue]);
        rings.map(|queue| (queue.addresses().used, queue.raw()[2].len()))
    }

    /// Makes up to `count` receive buffers available that are not yet, and shows them to the device without a kick.
    /// Gives how many there were.
    ///
    /// # Errors
    /// If the queue has no descriptors for them.
    pub fn post_receive_buffers(&mut self, pair: usize, count: usize) -> Result<usize> {
        let ring = &mut self.pairs[pair].receive;
        let mut posted = 0;
        while posted < count
            && let Some(slot) = ring.free.pop()
        {
            post(ring, &self.memory, slot, self.options.canaries)?;
            posted += 1;
        }
        ring.queue.publish();
        Ok(posted)
    }

    /// The length of the header in front of frames.
    pub fn header_length(&self) -> usize {
        NetHeader::length(self.options.features)
    }

    /// Puts a frame into a transmit queue without telling the device. False if the queue is full.
    ///
    /// # Errors
    /// If the frame is larger than a buffer.
    pub fn enqueue(&mut self, pair: usize, header: &NetHeader, frame: &[u8]) -> Result<bool> {
        let header_length = self.header_length();
        let ring = &mut self.pairs[pair].transmit;
        while let Some(used) = ring.queue.pop() {
            ring.free.push(ring.slot_of_head[usize::from(used.head)]);
        }
        let Some(slot) = ring.free.pop() else { return Ok(false) };
        let header = header.encode();
        let parts = [&header[..header_length], frame];
        let length = header_length + frame.len();
        ensure!(length <= ring.slots[usize::from(slot)].capacity, "a frame of {} bytes", frame.len());
        scatter(&ring.slots[usize::from(slot)], parts);
        ring.add(&self.memory, slot, length).context("the queue has no descriptor for its buffer")?;
        Ok(true)
    }

    /// Shows the device the frames put into a transmit queue, and kicks if it wants that.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&mut self, pair: usize) -> Result<()> {
        self.pairs[pair].transmit.publish()
    }

    /// Sends a frame; waits for room where there is none.
    ///
    /// # Errors
    /// If there is no room after [`PATIENCE`].
    pub fn send(&mut self, pair: usize, header: &NetHeader, frame: &[u8]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.enqueue(pair, header, frame)? {
            ensure!(self.pairs[pair].transmit.wait_used(deadline)?, "the transmit queue stays full");
        }
        self.flush(pair)
    }

    /// Waits until the device has used every chain of a transmit queue.
    ///
    /// # Errors
    /// If it has not after [`PATIENCE`].
    pub fn wait_transmitted(&mut self, pair: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let ring = &mut self.pairs[pair].transmit;
        loop {
            while let Some(used) = ring.queue.pop() {
                ring.free.push(ring.slot_of_head[usize::from(used.head)]);
            }
            if ring.queue.outstanding() == 0 {
                return Ok(());
            }
            ensure!(
                ring.wait_used(deadline)?,
                "{} transmit chains of pair {pair} were not used",
                ring.queue.outstanding()
            );
        }
    }

    /// Takes a received frame, if there is one: replaces the contents of `frame`. Its buffers are given back at once.
    ///
    /// # Errors
    /// If the device broke a rule: an impossible length, a part of a frame, bytes written behind it.
    pub fn try_receive(&mut self, pair: usize, frame: &mut Vec<u8>) -> Result<Option<NetHeader>> {
        let header_length = self.header_length();
        let ring = &mut self.pairs[pair].receive;
        frame.clear();
        let Some(used) = ring.queue.pop() else { return Ok(None) };
        let slot = gather(ring, used, frame, self.options.canaries)?;
        ensure!(frame.len() >= header_length, "a buffer of {} bytes: less than a header", frame.len());
        let header = NetHeader::decode(&frame[..header_length]);
        post(ring, &self.memory, slot, self.options.canaries)?;
        // Without mergeable buffers a driver does not look at the number, which older kernels' vhost-net leaves unset.
        let mergeable = self.options.features & features::MRG_RXBUF != 0;
        let buffers = if mergeable { header.num_buffers } else { 1 };
        ensure!(buffers >= 1, "a frame in no buffers");
        for number in 1..buffers {
            let used = ring.queue.pop();
            let Some(used) = used else { bail!("buffer {number} of a frame's {buffers} is not there") };
            let slot = gather(ring, used, frame, self.options.canaries)?;
            post(ring, &self.memory, slot, self.options.canaries)?;
        }
        frame.drain(..header_length);
        ring.publish()?;
        Ok(Some(header))
    }

    /// Waits for a frame.
    ///
    /// # Errors
    /// Those of [`Self::try_receive`], and if none came until `deadline`.
    pub fn receive_until(
        &mut self,
        pair: usize,
        frame: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<NetHeader> {
        loop {
            if let Some(header) = self.try_receive(pair, frame)? {
                return Ok(header);
            }
            ensure!(self.pairs[pair].receive.wait_used(deadline)?, "no frame on pair {pair}");
        }
    }

    /// Waits for a frame for as long as a device may take.
    ///
    /// # Errors
    /// Those of [`Self::receive_until`].
    pub fn receive(&mut self, pair: usize) -> Result<(NetHeader, Vec<u8>)> {
        let mut frame = Vec::new();
        let header = self.receive_until(pair, &mut frame, Instant::now() + PATIENCE)?;
        Ok((header, frame))
    }
}

fn event_fd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("an eventfd")
}

/// Copies header and frame into a slot's pieces.
fn scatter(slot: &Slot, parts: [&[u8]; 2]) {
    let mut pieces = slot.pieces.iter();
    let mut target = pieces.next();
    let mut offset = 0;
    for mut part in parts {
        while let Some((_, slice)) = target
            && !part.is_empty()
        {
            let count = part.len().min(slice.len() - offset);
            slice.write(offset, &part[..count]);
            part = &part[count..];
            offset += count;
            if offset == slice.len() {
                target = pieces.next();
                offset = 0;
            }
        }
    }
}

/// Makes a receive slot available, without publishing it.
fn post(ring: &mut Ring, memory: &GuestMemory, slot: u16, canaries: bool) -> Result<()> {
    if canaries {
        for (_, slice) in &ring.slots[usize::from(slot)].pieces {
            slice.fill(CANARY);
        }
    }
    let capacity = ring.slots[usize::from(slot)].capacity;
    ring.add(memory, slot, capacity).context("the queue has no descriptor for its buffer")?;
    Ok(())
}

/// Appends what the device wrote into a receive buffer; gives its slot.
fn gather(ring: &Ring, used: Used, frame: &mut Vec<u8>, canaries: bool) -> Result<u16> {
    let number = ring.slot_of_head[usize::from(used.head)];
    let slot = &ring.slots[usize::from(number)];
    let mut left = used.length as usize;
    ensure!(left <= slot.capacity, "{left} bytes in a buffer of {}", slot.capacity);
    for (_, slice) in &slot.pieces {
        let count = left.min(slice.len());
        slice.append_to(0, count, frame);
        left -= count;
        if canaries && count < slice.len() {
            let start = frame.len();
            slice.append_to(count, slice.len() - count, frame);
            let untouched = frame[start..].iter().all(|&byte| byte == CANARY);
            frame.truncate(start);
            ensure!(untouched, "the device wrote behind the {} bytes it reported", used.length);
        }
    }
    Ok(number)
}
