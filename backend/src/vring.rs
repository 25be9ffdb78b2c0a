//! The device side of a split virtqueue (virtio 1.2 §2.7). A [`Vring`] caches raw pointers into the mapped rings, which
//! are valid as long as the [`GuestMemory`] that it holds.
//!
//! The guest may write anything to the rings at any time. Every value is read once, checked, and only then used. An
//! invalid value is a [`RingError`], after which the vring is not used until the front-end sets it up again. Buffers
//! are completed in the order in which they were made available (`VIRTIO_F_IN_ORDER`), so the used index alone gives
//! the position of the device.
#![expect(unsafe_code, reason = "reads and writes rings in memory that is shared with the guest")]

mod layout;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::dirty_log::RingLog;
use crate::inflight::{self, InflightQueue};
use crate::memory::GuestMemory;
use crate::notify::Notifier;
pub use layout::{LayoutError, MAX_SIZE, RingAddresses, VringLayout, check_size};
use layout::{USED_ELEMENTS, available_length, locate, used_length};

/// `VRING_AVAIL_F_NO_INTERRUPT`.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VRING_USED_F_NO_NOTIFY`.
const USED_NO_NOTIFY: u16 = 1;

/// Offset of the flags in the used ring.
const USED_FLAGS: usize = 0;
/// Offset of the index in the used ring.
const USED_INDEX: usize = 2;

/// A descriptor as laid out in guest memory (virtio 1.2 §2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub address: u64,
    /// Length of the buffer in bytes.
    pub length: u32,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
    /// The descriptor that continues the chain, with `VIRTQ_DESC_F_NEXT`.
    pub next: u16,
}

/// An invalid value in a ring. The vring must not be used until the front-end sets it up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available index is more than the ring's size ahead.
    #[error("available index {available} is {distance} ahead of {next} in a vring of {size}")]
    AvailableIndex {
        /// The guest's index.
        available: u16,
        /// The device's next available index.
        next: u16,
        /// The difference, modulo 2^16.
        distance: u16,
        /// The ring's size.
        size: u16,
    },
    /// The available ring has the index of a descriptor that does not exist.
    #[error("available ring names descriptor {head} in a vring of {size}")]
    Head {
        /// The index read.
        head: u16,
        /// The ring's size.
        size: u16,
    },
}

/// A mapped vring and the device's position in it.
#[derive(Debug)]
pub struct Vring {
    memory: Arc<GuestMemory>,
    descriptors: *const Descriptor,
    available: *mut u16,
    used: *mut u16,
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: bool,
    /// The available index of the next buffer to take.
    next_available: u16,
    /// The guest's available index when last read.
    seen_available: u16,
    /// The used index up to which elements are written.
    used_index: u16,
    /// The used index that the guest can see.
    published: u16,
    /// The published used index at the last decision about a call. With `None` the next decision is to call.
    decided: Option<u16>,
    /// Whether the driver was last asked to kick; `None` if unknown.
    kicks_wanted: Option<bool>,
    call: Option<Notifier>,
    /// The log of changed pages, while the front-end keeps one.
    log: Option<RingLog>,
    /// The vring's part of the inflight region, if there is one.
    inflight: Option<InflightQueue>,
    /// Chains that a previous back-end took and did not complete. They are taken in place of the next available ones.
    resubmitted: VecDeque<u16>,
}

// SAFETY: the pointers are into mappings that `memory` keeps; any thread may use them, one at a time.
unsafe impl Send for Vring {}

impl Vring {
    /// Maps a vring. It continues at the used index in memory, unless [`Self::set_next_available`] sets another one.
    ///
    /// # Errors
    /// Returns a [`LayoutError`] if the size is invalid, or a ring is misaligned or not in shared memory.
    pub fn new(
        layout: VringLayout,
        memory: Arc<GuestMemory>,
        call: Option<Notifier>,
    ) -> Result<Self, LayoutError> {
        let VringLayout { size, addresses, event_idx, indirect } = layout;
        check_size(u32::from(size))?;
        let count = usize::from(size);
        // The lengths include the event index after each ring.
        let descriptors = locate(&memory, "descriptor", addresses.descriptors, 16, 16 * count)?;
        let available: *mut u16 =
            locate(&memory, "available", addresses.available, 2, available_length(count))?.cast();
        let used: *mut u16 = locate(&memory, "used", addresses.used, 4, used_length(count))?.cast();
        let mut vring = Self {
            memory,
            descriptors: descriptors.cast(),
            available,
            used,
            size,
            mask: size - 1,
            event_idx,
            indirect,
            next_available: 0,
            seen_available: 0,
            used_index: 0,
            published: 0,
            decided: None,
            kicks_wanted: None,
            call,
            log: None,
            inflight: None,
            resubmitted: VecDeque::new(),
        };
        vring.reread();
        Ok(vring)
    }

    /// Resets the vring after another process has worked on it. It continues at the used index in memory, unless
    /// [`Self::set_next_available`] sets another one.
    pub fn reread(&mut self) {
        let used_index = self.used_word(1).load(Ordering::Acquire);
        self.used_index = used_index;
        self.published = used_index;
        self.decided = None;
        self.kicks_wanted = None;
        self.inflight = None;
        self.resubmitted.clear();
        self.set_next_available(used_index);
    }

    /// Prefaults the pages of the rings.
    pub fn prefault(&self) {
        let count = usize::from(self.size);
        self.memory.prefault(self.descriptors.cast_mut().cast(), 16 * count);
        self.memory.prefault(self.available.cast(), available_length(count));
        self.memory.prefault(self.used.cast(), used_length(count));
    }

    /// Sets the available index of the next buffer to take.
    pub fn set_next_available(&mut self, index: u16) {
        self.next_available = index;
        self.seen_available = index;
    }

    /// Returns whether `index` fits: at most the ring's size lies between it and the driver's available index.
    pub fn fits(&self, index: u16) -> bool {
        self.available_word(1).load(Ordering::Acquire).wrapping_sub(index) <= self.size
    }

    /// Sets or clears the log in which writes are marked from now on.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Records all chains in `inflight` from now on. If it has chains in flight, they are taken first, and the vring
    /// continues at the used index. Otherwise the next available index does not change.
    pub fn set_inflight(&mut self, mut inflight: InflightQueue) {
        let available = self.available_word(1).load(Ordering::Acquire);
        self.resubmitted = inflight.recover(self.published, available).into();
        if !self.resubmitted.is_empty() {
            self.set_next_available(self.published);
        }
        self.inflight = Some(inflight);
    }

    /// Returns the available index of the first chain that was not taken. Resubmitted chains count as taken, unless
    /// they are the next chains of the available ring.
    pub fn base(&self) -> u16 {
        let in_order = (0..).zip(&self.resubmitted).all(|(nth, head)| self.available_head(nth) == *head);
        let resubmitted = if in_order { 0 } else { self.resubmitted.len() };
        // At most the ring's size.
        self.next_available.wrapping_add(u16::try_from(resubmitted).unwrap_or_default())
    }

    /// Returns the log. The caller must mark writes to buffers before it publishes them.
    #[inline]
    pub fn log(&self) -> Option<&RingLog> {
        self.log.as_ref()
    }

    /// Returns the available index of the next buffer to take.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Returns the used index that the guest can see.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Returns whether completed buffers have not been published yet.
    #[inline]
    pub fn is_ahead(&self) -> bool {
        self.published != self.used_index
    }

    /// Returns the length of the used ring in bytes, event index included.
    pub fn used_length(&self) -> usize {
        used_length(usize::from(self.size))
    }

    /// Returns the number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub fn indirect(&self) -> bool {
        self.indirect
    }

    /// Returns the memory that contains the rings and the buffers.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Returns the same memory as a reference that can be cloned.
    pub fn shared_memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Returns the addresses of descriptor table, available ring and used ring in this process.
    pub fn host_addresses(&self) -> [u64; 3] {
        [self.descriptors as usize, self.available as usize, self.used as usize].map(|address| address as u64)
    }

    /// Returns the front-end's call descriptor.
    pub fn call(&self) -> Option<&Notifier> {
        self.call.as_ref()
    }

    /// Reads the driver's available index, unchecked. [`Self::available`] checks it.
    pub fn available_index(&self) -> u16 {
        self.available_word(1).load(Ordering::Acquire)
    }

    /// Returns how many buffers are available from `next_available` + `taken` on.
    ///
    /// # Errors
    /// Returns [`RingError::AvailableIndex`] if the driver's index is invalid.
    #[inline]
    pub fn available(&mut self, taken: u16) -> Result<u16, RingError> {
        let known = self.seen_available.wrapping_sub(self.next_available);
        if known > taken {
            return Ok(known - taken);
        }
        let available = self.available_word(1).load(Ordering::Acquire);
        let distance = available.wrapping_sub(self.next_available);
        if distance > self.size || distance < taken {
            let (next, size) = (self.next_available, self.size);
            return Err(RingError::AvailableIndex { available, next, distance, size });
        }
        self.seen_available = available;
        Ok(distance - taken)
    }

    /// Returns the head of the `nth` buffer from `next_available` on. [`Self::available`] must have counted it.
    ///
    /// # Errors
    /// Returns [`RingError::Head`] if there is no such descriptor.
    #[inline]
    pub fn head(&self, nth: u16) -> Result<u16, RingError> {
        let resubmitted = self.resubmitted.get(usize::from(nth));
        let head = resubmitted.copied().unwrap_or_else(|| self.available_head(nth));
        if head < self.size { Ok(head) } else { Err(RingError::Head { head, size: self.size }) }
    }

    /// Reads the `nth` entry of the available ring from `next_available` on.
    #[inline]
    fn available_head(&self, nth: u16) -> u16 {
        let slot = self.next_available.wrapping_add(nth) & self.mask;
        self.available_word(2 + usize::from(slot)).load(Ordering::Relaxed)
    }

    /// Reads descriptor `index` of the table. Returns `None` if `index` is beyond its end.
    #[inline]
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: the table has `size` descriptors.
        let pointer = unsafe { self.descriptors.add(usize::from(index)) };
        // SAFETY: within the mapping that `memory` keeps, and aligned.
        Some(unsafe { pointer.read_volatile() })
    }

    /// Takes the next buffer and puts it into the used ring, with `length` bytes written. The guest sees it after
    /// [`Self::publish`].
    #[inline]
    pub fn complete(&mut self, head: u16, length: u32) {
        let slot = usize::from(self.used_index & self.mask);
        // SAFETY: the used ring has `size` elements of 8 bytes after its 4 bytes of flags and index.
        let element = unsafe { self.used.cast::<u64>().byte_add(USED_ELEMENTS + 8 * slot) };
        // SAFETY: as above; the element is only 4-byte aligned.
        unsafe { element.write_unaligned(u64::from(head) | u64::from(length) << 32) };
        inflight::step();
        let resubmitted = self.resubmitted.pop_front().is_some();
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head, resubmitted);
        }
        self.used_index = self.used_index.wrapping_add(1);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Publishes all completed buffers, and calls the driver if it wants that. Returns whether it was called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if !self.is_ahead() {
            return false;
        }
        if self.log.is_some() {
            self.log_elements();
        }
        self.published = self.used_index;
        self.used_word(1).store(self.used_index, Ordering::Release);
        inflight::step();
        self.log_used(USED_INDEX, 2);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.published);
        }
        // Read whether the driver wants a call only after it can see the index (virtio 1.2 §2.7.10).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.available_word(2 + usize::from(self.size)).load(Ordering::Relaxed);
            let before = self.decided.replace(self.published);
            before.is_none_or(|before| {
                self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(before)
            })
        } else {
            self.available_word(0).load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        };
        wanted && self.call_guest()
    }

    /// Marks the used elements written since the last publication.
    #[cold]
    fn log_elements(&self) {
        let count = self.used_index.wrapping_sub(self.published);
        for nth in 0..count {
            let slot = self.published.wrapping_add(nth) & self.mask;
            self.log_used(USED_ELEMENTS + 8 * usize::from(slot), 8);
        }
    }

    /// Marks a write of `length` bytes at `offset` in the used ring.
    #[inline]
    fn log_used(&self, offset: usize, length: usize) {
        if let Some(log) = &self.log {
            log.used_ring(offset, length);
        }
    }

    /// Calls the driver, whether or not it wants that. Returns whether there is a call descriptor.
    pub fn call_guest(&self) -> bool {
        self.call.as_ref().is_some_and(|call| {
            call.notify();
            true
        })
    }

    /// Asks the driver not to kick. With `EVENT_IDX` it is enough not to advance the event index.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if self.kicks_wanted != Some(false) {
            self.kicks_wanted = Some(false);
            if !self.event_idx {
                self.used_word(0).store(USED_NO_NOTIFY, Ordering::Relaxed);
                self.log_used(USED_FLAGS, 2);
            }
        }
    }

    /// Asks the driver not to kick even for the next buffer, after [`Self::enable_kicks`]. With `EVENT_IDX` the event
    /// index moves behind that buffer.
    pub fn suppress_kicks(&mut self) {
        if self.event_idx && self.kicks_wanted == Some(true) {
            self.set_event_index(self.next_available.wrapping_sub(1));
        }
        self.disable_kicks();
    }

    /// Returns whether the driver was last asked to kick.
    #[inline]
    pub fn wants_kicks(&self) -> bool {
        self.kicks_wanted == Some(true)
    }

    /// Asks the driver to kick for the next buffer, checks again, and returns how many buffers are available from
    /// `next_available` + `taken` on.
    ///
    /// # Errors
    /// Returns [`RingError::AvailableIndex`] if the driver's index is invalid.
    pub fn enable_kicks(&mut self, taken: u16) -> Result<u16, RingError> {
        self.kicks_wanted = Some(true);
        if self.event_idx {
            self.set_event_index(self.next_available.wrapping_add(taken));
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
            self.log_used(USED_FLAGS, 2);
        }
        // The request must be visible before the index is read again (virtio 1.2 §2.7.10).
        fence(Ordering::SeqCst);
        self.available(taken)
    }

    /// Sets the event index: the driver kicks when it makes the buffer with this available index available.
    fn set_event_index(&self, index: u16) {
        let offset = USED_ELEMENTS + 8 * usize::from(self.size);
        // SAFETY: the used ring ends with 2 bytes of event index after `size` elements of 8 bytes.
        let pointer = unsafe { self.used.byte_add(offset) };
        // SAFETY: within the mapping and 2-byte aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(pointer) }.store(index, Ordering::Relaxed);
        self.log_used(offset, 2);
    }

    /// Returns a word of the available ring: flags (0), index (1), entries (2…) or event index (2 + size).
    #[inline]
    fn available_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word <= 2 + usize::from(self.size));
        // SAFETY: the available ring has `size` + 3 words.
        let pointer = unsafe { self.available.add(word) };
        // SAFETY: within the mapping that `memory` keeps, and aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(pointer) }
    }

    /// Returns a word of the used ring: flags (0) or index (1).
    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 2);
        // SAFETY: the used ring begins with two words.
        let pointer = unsafe { self.used.add(word) };
        // SAFETY: within the mapping that `memory` keeps, and aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(pointer) }
    }
}
