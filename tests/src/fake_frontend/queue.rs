//! The driver's side of a split virtqueue (virtio 1.3, §2.7).
//!
//! [`DriverQueue`] keeps the rules — and its raw writers break any of them. What the device puts into the used ring
//! is checked: only heads that it has been given, each once, and in order where that was negotiated.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::memory::{GuestMemory, SharedSlice};

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// The size of a descriptor.
pub const DESCRIPTOR_SIZE: usize = 16;

/// Flag in the available ring: no calls, please.
const NO_INTERRUPT: u16 = 1;
/// Flag in the used ring: no kicks, please.
const NO_NOTIFY: u16 = 1;

/// Where a queue's three parts are, in guest addresses.
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
    /// Its guest address.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// Whether the device writes it (and does not read it).
    pub writable: bool,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain that was used.
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
    /// Descriptors in no chain.
    free: Vec<u16>,
    /// The descriptors behind each one in its chain: our own knowledge, as the table may be written by others.
    next: Vec<Option<u16>>,
    /// Whether each descriptor is the head of a chain that the device has.
    is_head: Vec<bool>,
    /// The heads that the device has, oldest first.
    outstanding: VecDeque<u16>,
    /// The available index with the chains that are not published yet.
    next_available: u16,
    /// The available index that the device can see.
    published: u16,
    /// The available index at the last kick that was decided on.
    kicked: u16,
    next_used: u16,
}

impl DriverQueue {
    /// A queue of `size` descriptors with fresh rings in region `region` of `memory`.
    pub fn new(memory: &mut GuestMemory, region: usize, size: u16) -> Self {
        let entries = usize::from(size);
        let addresses = RingAddresses {
            descriptors: memory.allocate(region, DESCRIPTOR_SIZE * entries, 16),
            available: memory.allocate(region, 6 + 2 * entries, 2),
            used: memory.allocate(region, 6 + 8 * entries, 4),
        };
        Self::at(memory, addresses, size)
    }

    /// A queue at these addresses, whose rings are zeroed.
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

    /// Says what was negotiated: `EVENT_IDX` and `IN_ORDER`.
    pub fn negotiated(&mut self, event_idx: bool, in_order: bool) {
        self.event_idx = event_idx;
        self.in_order = in_order;
    }

    /// Puts all indices to `index`, as if that many chains had been used. Only while the device has none.
    ///
    /// # Panics
    /// If it has some.
    pub fn start_at(&mut self, index: u16) {
        self.start_apart(index, index);
    }

    /// Puts the available index and the used index to different places. Only while the device has no chains.
    ///
    /// # Panics
    /// If it has some.
    pub fn start_apart(&mut self, available: u16, used: u16) {
        assert!(self.outstanding.is_empty(), "the device has chains");
        (self.next_available, self.published, self.kicked) = (available, available, available);
        self.next_used = used;
        self.set_available_index(available);
        self.used.store_u16(2, used, Ordering::Release);
    }

    /// Where it is.
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// How many descriptors it has.
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

    /// The index of the next chain to be published: what `GET_VRING_BASE` gives once all have been used.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Makes a chain of these buffers available, once [`Self::publish`] is called. `None` if there are too few
    /// descriptors; else the chain's head.
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

    /// The same with the chain in a table of its own at guest address `table`, which takes one descriptor.
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

    /// Puts a chain that has been built already into the available ring.
    fn give(&mut self, head: u16) {
        self.is_head[usize::from(head)] = true;
        self.outstanding.push_back(head);
        self.set_available(self.next_available, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device the chains added so far. True if it wants a kick for them.
    pub fn publish(&mut self) -> bool {
        self.published = self.next_available;
        self.set_available_index(self.published);
        // The device may turn kicks on and look at the index: one of us must see the other's write.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.kicked, self.published);
        if self.event_idx {
            let event = self.used.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
            needs_event(event, self.published, before)
        } else {
            self.wants_kicks()
        }
    }

    /// Whether the device wants kicks at all, as its flag says (without `EVENT_IDX`).
    pub fn wants_kicks(&self) -> bool {
        self.used.load_u16(0, Ordering::Relaxed) & NO_NOTIFY == 0
    }

    /// Takes the next used entry, and its chain's descriptors back.
    ///
    /// # Panics
    /// If the device returns what it was not given, or out of order.
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

    /// Whether there is something to pop.
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
        let head = u16::try_from(self.used.read_u32(offset)).expect("a used id beyond 16 bits");
        Used { head, length: self.used.read_u32(offset + 4) }
    }

    /// Asks the device not to call.
    pub fn disable_calls(&mut self) {
        if self.event_idx {
            // Half the ring away from where it can get to.
            self.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.available.store_u16(0, NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// Asks the device to call for the next used entry. False if there is one already: then no call may come.
    pub fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.next_used);
        } else {
            self.available.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    /// Writes `used_event`: a call is wanted when the used index passes it (`EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.available.store_u16(4 + 2 * usize::from(self.size), index, Ordering::Relaxed);
    }

    /// Reads `avail_event`: a kick is wanted when the available index passes it (`EVENT_IDX`).
    pub fn available_event(&self) -> u16 {
        self.used.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed)
    }

    /// Writes a descriptor, whatever it says.
    pub fn set_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(&self.descriptors, index, address, length, flags, next);
    }

    /// Writes an entry of the available ring at a free-running index, whatever it says.
    pub fn set_available(&self, index: u16, head: u16) {
        self.available.store_u16(4 + 2 * usize::from(index % self.size), head, Ordering::Relaxed);
    }

    /// Writes the available index, whatever it says.
    pub fn set_available_index(&self, index: u16) {
        self.available.store_u16(2, index, Ordering::Release);
    }

    /// The raw bytes of the rings, for tests that write anything anywhere: descriptors, available, used.
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

/// Whether an index that went from `before` to `after` has passed `event` (virtio 1.3, §2.7.10).
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

    /// Does what a device does when it has used a chain.
    fn device_uses(queue: &DriverQueue, index: u16, head: u16, length: u32) {
        let used = queue.raw()[2];
        let offset = 4 + 8 * usize::from(index % SIZE);
        used.write_u32(offset, head.into());
        used.write_u32(offset + 4, length);
        used.store_u16(2, index.wrapping_add(1), Ordering::Release);
    }

    #[test]
    fn a_chain_is_laid_out_as_the_specification_says() {
        let (_memory, mut queue) = queue();
        let head = queue.add(&[buffer(0x1000, false), buffer(0x2000, true)]).unwrap();
        assert_eq!(head, 0);
        let [descriptors, available, _] = queue.raw();
        assert_eq!(available.load_u16(2, Ordering::Relaxed), 0, "published too early");
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
    fn descriptors_come_back_and_go_round() {
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
    fn a_full_queue_says_so() {
        let (_memory, mut queue) = queue();
        for _ in 0..4 {
            queue.add(&[buffer(1, true), buffer(2, true)]).unwrap();
        }
        assert_eq!(queue.add(&[buffer(1, true)]), None);
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn a_head_used_twice_is_noticed() {
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
    fn disorder_is_noticed_where_order_was_negotiated() {
        let (_memory, mut queue) = queue();
        queue.negotiated(false, true);
        queue.add(&[buffer(1, true)]).unwrap();
        let second = queue.add(&[buffer(1, true)]).unwrap();
        queue.publish();
        device_uses(&queue, 0, second, 0);
        queue.pop();
    }

    #[test]
    fn kicks_are_suppressed_as_the_device_asks() {
        let (_memory, mut queue) = queue();
        queue.add(&[buffer(1, true)]).unwrap();
        queue.raw()[2].store_u16(0, NO_NOTIFY, Ordering::Relaxed);
        assert!(!queue.publish());

        queue.negotiated(true, false);
        queue.add(&[buffer(1, true)]).unwrap();
        // It waits for index 1, which this one has.
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
