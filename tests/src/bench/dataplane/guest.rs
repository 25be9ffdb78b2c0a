//! A guest that costs as little as possible: a virtio driver that lays out its chains once.
//!
//! Each queue has as many chains as fit, all of the same shape. The driver makes a chain available again as soon as the
//! device has used it. It does not check the device, which other tests do.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::load::PATIENCE;
use super::scenario::{Scenario, Traffic};
use crate::fake_frontend::queue::{RingAddresses, needs_event, write_descriptor};
use crate::fake_frontend::wire::protocol;
use crate::fake_frontend::{Connection, GuestMemory, SharedSlice, features};

/// The length of the virtio-net header with `VERSION_1`.
pub const HEADER: usize = 12;
/// The length of a receive buffer.
const BUFFER: u32 = 2048;
/// The length of a receive buffer that holds a frame of 64 KiB.
const LARGE_BUFFER: u32 = 65_536 + 128;
/// The maximum length of a transmit descriptor: a driver uses one for each page of a frame.
const PAGE: usize = 4096;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Flag of the available ring: no calls. Flag of the used ring: no kicks.
const SUPPRESSED: u16 = 1;

/// The driver's side of a virtqueue.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    available: SharedSlice,
    used: SharedSlice,
    addresses: RingAddresses,
    /// The buffer of each chain, by its head.
    buffers: Vec<Option<SharedSlice>>,
    /// Chains that the device does not have.
    free: Vec<u16>,
    next: u16,
    published: u16,
    seen: u16,
    event_idx: bool,
    kick: EventFd,
    /// The device signals it.
    pub call: EventFd,
    /// Number of kicks so far.
    pub kicks: u64,
}

impl Ring {
    /// Creates a queue with chains of `length` bytes, in descriptors of at most `piece` bytes.
    fn new(memory: &mut GuestMemory, size: u16, length: usize, piece: usize, writable: bool) -> Result<Self> {
        let entries = usize::from(size);
        let addresses = RingAddresses {
            descriptors: memory.allocate(0, 16 * entries, 64),
            available: memory.allocate(0, 6 + 2 * entries, 64),
            used: memory.allocate(0, 6 + 8 * entries, 64),
        };
        let table = memory.slice(addresses.descriptors, 16 * entries);
        let pieces = u16::try_from(length.div_ceil(piece))?;
        let (mut buffers, mut free) = (vec![None; entries], Vec::new());
        for head in (0..size).step_by(pieces.into()).take(usize::from(size / pieces)) {
            let buffer = memory.allocate(0, length, 64);
            let mut rest = length;
            for nth in 0..pieces {
                let start = buffer + u64::try_from(length - rest)?;
                let bytes = rest.min(piece);
                rest -= bytes;
                let flags = if writable { WRITE } else { 0 } | if rest > 0 { NEXT } else { 0 };
                write_descriptor(&table, head + nth, start, u32::try_from(bytes)?, flags, head + nth + 1);
            }
            buffers[usize::from(head)] = Some(memory.slice(buffer, length));
            free.push(head);
        }
        free.reverse();
        Ok(Self {
            size,
            available: memory.slice(addresses.available, 6 + 2 * entries),
            used: memory.slice(addresses.used, 6 + 8 * entries),
            addresses,
            buffers,
            free,
            next: 0,
            published: 0,
            seen: 0,
            event_idx: false,
            kick: event_fd()?,
            call: event_fd()?,
            kicks: 0,
        })
    }

    /// Takes a chain that the device does not have, if there is one.
    pub fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Returns the buffer of a chain.
    ///
    /// # Panics
    /// Panics if `head` is not the head of a chain, because the device reported a wrong one.
    pub fn buffer(&self, head: u16) -> &SharedSlice {
        self.buffers[usize::from(head)].as_ref().expect("not the head of a chain")
    }

    /// Makes a chain available. The device sees it with [`Self::publish`].
    pub fn add(&mut self, head: u16) {
        let place = 4 + 2 * usize::from(self.next % self.size);
        self.available.store_u16(place, head, Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
    }

    /// Publishes the chains that were added, and kicks if the device asks for it.
    ///
    /// # Errors
    /// Returns an error if the kick cannot be written.
    pub fn publish(&mut self) -> Result<()> {
        if self.next == self.published {
            return Ok(());
        }
        self.available.store_u16(2, self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.used.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
            needs_event(event, self.next, self.published)
        } else {
            self.used.load_u16(0, Ordering::Relaxed) & SUPPRESSED == 0
        };
        self.published = self.next;
        if wanted {
            self.kicks += 1;
            self.kick.write(1).context("cannot kick")?;
        }
        Ok(())
    }

    /// Returns the next chain that the device has used, and how many bytes it wrote. The caller owns the chain.
    pub fn pop(&mut self) -> Option<(u16, usize)> {
        if self.used.load_u16(2, Ordering::Acquire) == self.seen {
            return None;
        }
        let place = 4 + 8 * usize::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(self.used.read_u32(place)).unwrap_or(u16::MAX);
        Some((head, usize::try_from(self.used.read_u32(place + 4)).unwrap_or(usize::MAX)))
    }

    /// Puts a used chain back among those that the device does not have.
    pub fn release(&mut self, head: u16) {
        self.free.push(head);
    }

    /// Asks the device not to call.
    pub fn disable_calls(&self) {
        if self.event_idx {
            // The device has passed this index.
            let event = self.seen.wrapping_sub(1);
            self.available.store_u16(4 + 2 * usize::from(self.size), event, Ordering::Relaxed);
        } else {
            self.available.store_u16(0, SUPPRESSED, Ordering::Relaxed);
        }
    }

    /// Asks for a call with the next used chain. Returns true if the device has used one meanwhile.
    pub fn enable_calls(&self) -> bool {
        if self.event_idx {
            self.available.store_u16(4 + 2 * usize::from(self.size), self.seen, Ordering::Relaxed);
        } else {
            self.available.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used.load_u16(2, Ordering::Acquire) != self.seen
    }

    /// Reads the call eventfd and returns the number of calls.
    ///
    /// # Errors
    /// Returns an error if the read fails.
    pub fn take_calls(&self) -> Result<u64> {
        match self.call.read() {
            Ok(calls) => Ok(calls),
            Err(Errno::EAGAIN) => Ok(0),
            Err(errno) => Err(errno).context("cannot read the call eventfd"),
        }
    }
}

/// A queue pair.
#[derive(Debug)]
pub struct Pair {
    /// TAP to guest.
    pub receive: Ring,
    /// Guest to TAP.
    pub transmit: Ring,
}

/// A guest with its network device.
#[derive(Debug)]
pub struct Guest {
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    /// Whether `MRG_RXBUF` is negotiated.
    pub mergeable: bool,
    _connection: Connection,
    _memory: GuestMemory,
}

impl Guest {
    /// Connects to a back-end and sets up the device. Returns `None` if the back-end does not offer the features that
    /// the scenario needs.
    ///
    /// # Errors
    /// Returns an error if the back-end does not offer `VERSION_1`, or refuses a message.
    pub fn connect(socket: &Path, scenario: &Scenario) -> Result<Option<Self>> {
        let mut connection = Connection::new(connect(socket)?)?;
        let offered = connection.get_features()?;
        let negotiated = scenario.features() & offered;
        if scenario.needed_features() & !offered != 0 {
            return Ok(None);
        }
        ensure!(negotiated & features::VERSION_1 != 0, "the back-end does not offer VERSION_1");
        if negotiated & features::PROTOCOL_FEATURES != 0 {
            let wanted = protocol::MQ | protocol::REPLY_ACK;
            let wanted = connection.get_protocol_features()? & wanted;
            connection.set_protocol_features(wanted)?;
            connection.acknowledged = wanted & protocol::REPLY_ACK != 0;
        }
        connection.set_owner()?;
        connection.set_features(negotiated)?;

        let size = scenario.queue_size();
        let large_buffers =
            scenario.is_large() && !scenario.mergeable && scenario.traffic == Traffic::Receive;
        let buffer = if large_buffers { LARGE_BUFFER } else { BUFFER };
        let sent = HEADER + scenario.frame;
        let bytes = u64::from(size) * (u64::from(buffer) + 256 + 64) + 64 * u64::try_from(sent + 64)?;
        let transmit = u64::from(size) * u64::try_from(sent.min(PAGE) + 64)?;
        let all = (u64::from(scenario.pairs) * (bytes + transmit) + 0x10_0000).next_multiple_of(0x20_0000);
        let mut memory = GuestMemory::new(&[all])?;
        let mut pairs = Vec::new();
        for _ in 0..scenario.pairs {
            let whole = usize::try_from(buffer)?;
            let receive = Ring::new(&mut memory, size, whole, whole, true)?;
            let transmit = Ring::new(&mut memory, size, sent, PAGE, false)?;
            pairs.push(Pair { receive, transmit });
        }
        connection.set_memory_table(&memory)?;
        let mut index = 0;
        for pair in &mut pairs {
            for ring in [&mut pair.receive, &mut pair.transmit] {
                ring.event_idx = negotiated & features::EVENT_IDX != 0;
                connection.set_vring_num(index, size)?;
                connection.set_vring_base(index, 0)?;
                connection.set_vring_addresses(index, &memory, ring.addresses)?;
                connection.set_vring_kick(index, Some(ring.kick.as_fd()))?;
                connection.set_vring_call(index, Some(ring.call.as_fd()))?;
                if negotiated & features::PROTOCOL_FEATURES != 0 {
                    connection.set_vring_enable(index, true)?;
                }
                ring.disable_calls();
                index += 1;
            }
            while let Some(head) = pair.receive.take() {
                pair.receive.add(head);
            }
            pair.receive.publish()?;
            // Kick even if the device did not ask for it: some back-ends start a ring only with a kick.
            pair.receive.kick.write(1)?;
        }
        let mergeable = negotiated & features::MRG_RXBUF != 0;
        Ok(Some(Self { pairs, mergeable, _connection: connection, _memory: memory }))
    }
}

/// Connects to a back-end. Between binding its socket and listening on it, it refuses.
fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result.with_context(|| format!("cannot connect to {}", socket.display())),
        }
    }
}

fn event_fd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("cannot create an eventfd")
}
