//! The driver's side of a split virtqueue (virtio 1.3, §2.7).
//!
//! [`DriverQueue`] follows the specification; its raw writers can break every rule of it. The used ring is checked: the
//! device may use only heads that it was given, each once, and in order if `IN_ORDER` is negotiated.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::memory::{GuestMemory, SharedSlice};

/// Descriptor flag: the chain continues at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// The size of a descriptor.
pub const DESCRIPTOR_SIZE: usize = 16;

/// Flag in the available ring: the driver wants no calls.
const NO_INTERRUPT: u16 = 1;
/// Flag in the used ring: the device wants no kicks.
const NO_NOTIFY: u16 = 1;

/// The guest addresses of the three parts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The guest address.
    pub address: u64,
    /// The length in bytes.
    pub length: u32,
    /// Whether the device may write, rather than read, the buffer.
    pub writable: bool,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the used chain.
    pub head: u16,
    /// How many bytes the device wrote.
    pub length: u32,
}

/// The driver's side of one virtqueue.
#[derive(Debug)]
pub struct DriverQueue {
    size: u16,
    addresses: RingAddresses,
    descriptors: SharedSlice,
    available: SharedSlice,
    used: SharedSlice,
    event_idx: bool,
    in_order: bool,
    /// Descriptors that are in no chain.
    free: Vec<u16>,
    /// The successor of each descriptor in its chain. A private copy, because the table may be overwritten.
    next: Vec<Option<u16>>,
    /// Whether each descriptor is the head of a chain that the device has.
    is_head: Vec<bool>,
    /// The heads that the device has, oldest first.
    outstanding: VecDeque<u16>,
    /// The available index, including the chains that are not published yet.
    next_available: u16,
    /// The published available index.
    published: u16,
    /// The available index at the last decision on a kick.
    kicked: u16,
    next_used: u16,
}

impl DriverQueue {
    /// Creates a queue of `size` descriptors, with new rings in region `region` of `memory`.
    pub fn new(memory: &mut GuestMemory, region: usize, size: u16) -> Self {
        let entries = usize::from(size);
        let addresses = RingAddresses {
            descriptors: memory.allocate(region, DESCRIPTOR_SIZE * entries, 16),
            available: memory.allocate(region, 6 + 2 * entries, 2),
            used: memory.allocate(region, 6 + 8 * entries, 4),
        };
        Self::at(memory, addresses, size)
    }

    /// Creates a queue at these addresses and zeroes its rings.
    pub fn at(memory: &GuestMemory, addresses: RingAddresses, size: u16) -> Self {
        let entries = usize::from(size);
        let queue = Self {
            size,
            addresses,
            descriptors: memory.slice(addresses.descriptors, DESCRIPTOR_SIZE * entries),
            available: memory.slice(addresses.available, 6 + 2 * entries),
            used: memory.slice(addresses.used, 6 + 8 * entries),
            event_idx: false,
            in_order: false,
            free: (0..size).rev().collect(),
            next: vec![None; entries],
            is_head: vec![false; entries],
            outstanding: VecDeque::with_capacity(entries),
            next_available: 0,
            published: 0,
            kicked: 0,
            next_used: 0,
        };
        queue.descriptors.fill(0);
        queue.available.fill(0);
        queue.used.fill(0);
        queue
    }

    /// Sets whether `EVENT_IDX` and `IN_ORDER` are negotiated.
    pub fn negotiated(&mut self, event_idx: bool, in_order: bool) {
        self.event_idx = event_idx;
        self.in_order = in_order;
    }

    /// Sets all indices to `index`, as if that many chains had been used.
    ///
    /// # Panics
    /// Panics if the device has chains.
    pub fn start_at(&mut self, index: u16) {
        self.start_apart(index, index);
    }

    /// Sets the available index and the used index to different values.
    ///
    /// # Panics
    /// Panics if the device has chains.
    pub fn start_apart(&mut self, available: u16, used: u16) {
        assert!(self.outstanding.is_empty(), "the device has chains");
        (self.next_available, self.published, self.kicked) = (available, available, available);
        self.next_used = used;
        self.set_available_index(available);
        self.used.store_u16(2, used, Ordering::Release);
    }

    /// The guest addresses of the rings.
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors are in no chain.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// How many chains the device has.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// The available index of the next chain: the base that `GET_VRING_BASE` returns once the device has used all
    /// chains.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Adds a chain of these buffers to the available ring. The device sees it after [`Self::publish`]. Returns the
    /// head of the chain, or `None` if there are too few free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let (last, others) = buffers.split_last()?;
        if self.free.len() < buffers.len() {
            return None;
        }
        let head = self.free[self.free.len() - 1];
        for buffer in others {
            let index = self.free.pop()?;
            let next = self.free[self.free.len() - 1];
            self.set_descriptor(index, buffer.address, buffer.length, flags(buffer) | NEXT, next);
            self.next[usize::from(index)] = Some(next);
        }
        let index = self.free.pop()?;
        self.set_descriptor(index, last.address, last.length, flags(last), 0);
        self.next[usize::from(index)] = None;
        self.give(head);
        Some(head)
    }

    /// As [`Self::add`], with the chain in an indirect table at guest address `table`. Takes one descriptor.
    pub fn add_indirect(&mut self, memory: &GuestMemory, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let slice = memory.slice(table, DESCRIPTOR_SIZE * buffers.len());
        for (number, buffer) in (0u16..).zip(buffers) {
            let more = usize::from(number) + 1 < buffers.len();
            let flags = flags(buffer) | if more { NEXT } else { 0 };
            let next = if more { number + 1 } else { 0 };
            write_descriptor(&slice, number, buffer.address, buffer.length, flags, next);
        }
        let head = self.free.pop()?;
        let length = u32::try_from(slice.len()).ok()?;
        self.set_descriptor(head, table, length, INDIRECT, 0);
        self.next[usize::from(head)] = None;
        self.give(head);
        Some(head)
    }

    /// Adds a complete chain to the available ring.
    fn give(&mut self, head: u16) {
        self.is_head[usize::from(head)] = true;
        self.outstanding.push_back(head);
        self.set_available(self.next_available, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Publishes the chains added so far. Returns whether the device wants a kick for them.
    pub fn publish(&mut self) -> bool {
        self.published = self.next_available;
        self.set_available_index(self.published);
        // The device may enable kicks and read the index meanwhile: at least one side must see the other's write.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.kicked, self.published);
        if self.event_idx {
            let event = self.used.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
            needs_event(event, self.published, before)
        } else {
            self.wants_kicks()
        }
    }

    /// Whether the device wants kicks according to its flag (without `EVENT_IDX`).
    pub fn wants_kicks(&self) -> bool {
        self.used.load_u16(0, Ordering::Relaxed) & NO_NOTIFY == 0
    }

    /// Takes the next used entry and frees the descriptors of its chain.
    ///
    /// # Panics
    /// Panics if the device used a head that it does not have, or used one out of order despite `IN_ORDER`.
    pub fn pop(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        let used = self.used_entry(self.next_used);
        let place = usize::from(used.head);
        assert!(
            self.is_head.get(place).copied().unwrap_or(false),
            "the device used head {} twice, or was never given it",
            used.head
        );
        self.is_head[place] = false;
        if self.outstanding.front() == Some(&used.head) {
            self.outstanding.pop_front();
        } else {
            assert!(!self.in_order, "the device used head {} out of order", used.head);
            self.outstanding.retain(|&head| head != used.head);
        }
        let mut next = Some(used.head);
        while let Some(index) = next {
            self.free.push(index);
            next = self.next[usize::from(index)];
        }
        self.next_used = self.next_used.wrapping_add(1);
        Some(used)
    }

    /// Whether there is a used entry to take.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire)
    }

    /// The entry of the used ring at a free-running index.
    pub fn used_entry(&self, index: u16) -> Used {
        let offset = 4 + 8 * usize::from(index % self.size);
        let head = u16::try_from(self.used.read_u32(offset)).expect("a used id of at most 16 bits");
        Used { head, length: self.used.read_u32(offset + 4) }
    }

    /// Disables calls.
    pub fn disable_calls(&mut self) {
        if self.event_idx {
            // The used index reaches this value only after all other values.
            self.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.available.store_u16(0, NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// Enables a call for the next used entry. Returns false if there already is one, in which case no call may arrive.
    pub fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.next_used);
        } else {
            self.available.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    /// Writes `used_event`: the device calls when the used index passes it (`EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.available.store_u16(4 + 2 * usize::from(self.size), index, Ordering::Relaxed);
    }

    /// Reads `avail_event`: the device wants a kick when the available index passes it (`EVENT_IDX`).
    pub fn available_event(&self) -> u16 {
        self.used.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed)
    }

    /// Writes a descriptor without checking it.
    pub fn set_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(&self.descriptors, index, address, length, flags, next);
    }

    /// Writes the entry of the available ring at a free-running index without checking it.
    pub fn set_available(&self, index: u16, head: u16) {
        self.available.store_u16(4 + 2 * usize::from(index % self.size), head, Ordering::Relaxed);
    }

    /// Writes the available index without checking it.
    pub fn set_available_index(&self, index: u16) {
        self.available.store_u16(2, index, Ordering::Release);
    }

    /// The bytes of the descriptor table, the available ring and the used ring, for tests that write arbitrary values.
    pub fn raw(&self) -> [&SharedSlice; 3] {
        [&self.descriptors, &self.available, &self.used]
    }
}

/// Writes a descriptor into a table.
pub fn write_descriptor(table: &SharedSlice, index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = [0; DESCRIPTOR_SIZE];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    table.write(DESCRIPTOR_SIZE * usize::from(index), &bytes);
}

fn flags(buffer: &Buffer) -> u16 {
    if buffer.writable { WRITE } else { 0 }
}

/// Whether an index that moved from `before` to `after` has passed `event` (virtio 1.3, §2.7.10).
pub fn needs_event(event: u16, after: u16, before: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn queue() -> (GuestMemory, DriverQueue) {
        let mut memory = GuestMemory::new(&[0x10000]).unwrap();
        let queue = DriverQueue::new(&mut memory, 0, SIZE);
        (memory, queue)
    }

    fn buffer(address: u64, writable: bool) -> Buffer {
        Buffer { address, length: 100, writable }
    }

    /// Writes a used entry and the used index, as a device does.
    fn device_uses(queue: &DriverQueue, index: u16, head: u16, length: u32) {
        let used = queue.raw()[2];
        let offset = 4 + 8 * usize::from(index % SIZE);
        used.write_u32(offset, head.into());
        used.write_u32(offset + 4, length);
        used.store_u16(2, index.wrapping_add(1), Ordering::Release);
    }

    #[test]
    fn a_chain_has_the_layout_of_the_specification() {
        let (_memory, mut queue) = queue();
        let head = queue.add(&[buffer(0x1000, false), buffer(0x2000, true)]).unwrap();
        assert_eq!(head, 0);
        let [descriptors, available, _] = queue.raw();
        assert_eq!(available.load_u16(2, Ordering::Relaxed), 0, "the chain is published too early");
        let table = descriptors.to_vec();
        assert_eq!(table[..16], [0, 0x10, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(table[16..32], [0, 0x20, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 2, 0, 0, 0]);
        assert!(queue.publish());
        let [_, available, _] = queue.raw();
        assert_eq!(available.to_vec()[..6], [0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn an_indirect_chain_takes_one_descriptor() {
        let (mut memory, mut queue) = queue();
        let table = memory.allocate(0, 64, 16);
        let head = queue.add_indirect(&memory, table, &[buffer(1, false), buffer(2, false)]).unwrap();
        assert_eq!(queue.free_descriptors(), 7);
        let descriptor = queue.raw()[0].to_vec()[16 * usize::from(head)..][..16].to_vec();
        assert_eq!(descriptor[..8], table.to_le_bytes());
        assert_eq!(descriptor[8..], [32, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(memory.slice(table, 32).to_vec()[12..16], [1, 0, 1, 0]);
    }

    #[test]
    fn used_descriptors_are_reused() {
        let (_memory, mut queue) = queue();
        for round in 0..100u16 {
            let head = queue.add(&[buffer(1, true), buffer(2, true), buffer(3, true)]).unwrap();
            queue.publish();
            assert_eq!(queue.pop(), None);
            device_uses(&queue, round, head, 7);
            assert_eq!(queue.pop(), Some(Used { head, length: 7 }));
            assert_eq!(queue.free_descriptors(), 8);
        }
        assert_eq!(queue.next_available(), 100);
    }

    #[test]
    fn a_full_queue_accepts_no_chain() {
        let (_memory, mut queue) = queue();
        for _ in 0..4 {
            queue.add(&[buffer(1, true), buffer(2, true)]).unwrap();
        }
        assert_eq!(queue.add(&[buffer(1, true)]), None);
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn a_head_used_twice_panics() {
        let (_memory, mut queue) = queue();
        let head = queue.add(&[buffer(1, true)]).unwrap();
        queue.publish();
        device_uses(&queue, 0, head, 0);
        device_uses(&queue, 1, head, 0);
        queue.pop();
        queue.pop();
    }

    #[test]
    #[should_panic(expected = "out of order")]
    fn a_head_used_out_of_order_panics_with_in_order() {
        let (_memory, mut queue) = queue();
        queue.negotiated(false, true);
        queue.add(&[buffer(1, true)]).unwrap();
        let second = queue.add(&[buffer(1, true)]).unwrap();
        queue.publish();
        device_uses(&queue, 0, second, 0);
        queue.pop();
    }

    #[test]
    fn kicks_are_suppressed_as_the_device_requests() {
        let (_memory, mut queue) = queue();
        queue.add(&[buffer(1, true)]).unwrap();
        queue.raw()[2].store_u16(0, NO_NOTIFY, Ordering::Relaxed);
        assert!(!queue.publish());

        queue.negotiated(true, false);
        queue.add(&[buffer(1, true)]).unwrap();
        // The device wants a kick for the chain at index 1, which is this one.
        queue.raw()[2].store_u16(4 + 64, 1, Ordering::Relaxed);
        assert!(queue.publish());
        queue.add(&[buffer(1, true)]).unwrap();
        assert!(!queue.publish());
    }

    #[test]
    fn an_event_is_needed_when_its_index_is_passed() {
        assert!(needs_event(0, 1, 0));
        assert!(!needs_event(1, 1, 0));
        assert!(needs_event(u16::MAX, 0, u16::MAX));
        assert!(!needs_event(5, 3, 1));
        assert!(needs_event(2, 10, 1));
    }
}
