//! One split virtqueue as the back-end sees it (virtio 1.2 §2.7): raw pointers into the mapped rings, cached once
//! and valid as long as the [`GuestMemory`] that the vring holds.
//!
//! The guest may write anything to the rings at any time. Every value is read once, checked, and only then used;
//! what cannot be made sense of is a [`RingError`], after which the vring is not touched again until the front-end
//! sets it up anew. Buffers are completed in the order in which they were made available (`VIRTIO_F_IN_ORDER`), so
//! the used index alone says how far the device is.
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

/// Where the used ring has its flags.
const USED_FLAGS: usize = 0;
/// Where it has its index.
const USED_INDEX: usize = 2;
/// A descriptor as it lies in guest memory (virtio 1.2 §2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
    /// The descriptor that continues the chain, with `VIRTQ_DESC_F_NEXT`.
    pub next: u16,
}

/// What the guest wrote to a ring makes no sense; the vring is out of order until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More buffers made available than the ring can hold.
    #[error("available index {available} is {distance} ahead of {next} in a vring of {size}")]
    AvailableIndex {
        /// The guest's index.
        available: u16,
        /// The next one that the device expects.
        next: u16,
        /// The difference, modulo 2^16.
        distance: u16,
        /// The ring's size.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("available ring names descriptor {head} in a vring of {size}")]
    Head {
        /// The index read.
        head: u16,
        /// The ring's size.
        size: u16,
    },
}

/// The rings' pointers and the device's place in them.
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
    /// The published used index at the last decision about a call; `None`: call in any case.
    decided: Option<u16>,
    /// Whether the guest was last asked to notify; `None`: not known.
    kicks_wanted: Option<bool>,
    call: Option<Notifier>,
    /// Where writes are noted, while the front-end keeps a log.
    log: Option<RingLog>,
    /// Where chains are noted, where the front-end keeps a region for that.
    inflight: Option<InflightQueue>,
    /// Chains that a back-end before us took and did not give back. They come in place of the next available ones.
    resubmitted: VecDeque<u16>,
}

// SAFETY: the pointers are into mappings that `memory` keeps; they may be used from any thread, one at a time.
unsafe impl Send for Vring {}

impl Vring {
    /// Maps a vring. Its place is the used index found in memory until [`Self::set_next_available`] says otherwise.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(
        layout: VringLayout,
        memory: Arc<GuestMemory>,
        call: Option<Notifier>,
    ) -> Result<Self, LayoutError> {
        let VringLayout { size, addresses, event_idx, indirect } = layout;
        check_size(u32::from(size))?;
        let count = usize::from(size);
        // Each with the event index that follows the ring.
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

    /// Begins anew where another process has worked on the ring since: its place is the used index found in memory until
    /// [`Self::set_next_available`] says otherwise.
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

    /// Has the rings' pages there before they are used.
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

    /// Whether the driver can have made available all that lies between `index` and its available index.
    pub fn fits(&self, index: u16) -> bool {
        self.available_word(1).load(Ordering::Acquire).wrapping_sub(index) <= self.size
    }

    /// Has all writes noted in a log from now on, or no longer.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Has all chains noted in `inflight` from now on. What that says to have been in flight is taken first, from the
    /// used index on; otherwise the next available index stays as it is.
    pub fn set_inflight(&mut self, mut inflight: InflightQueue) {
        let available = self.available_word(1).load(Ordering::Acquire);
        self.resubmitted = inflight.recover(self.published, available).into();
        if !self.resubmitted.is_empty() {
            self.set_next_available(self.published);
        }
        self.inflight = Some(inflight);
    }

    /// The available index from which on the driver's chains have not been taken. Behind [`Self::next_available`]
    /// there may be resubmitted ones; where these are the ring's own next ones, they are still available.
    pub fn base(&self) -> u16 {
        let in_order = (0..).zip(&self.resubmitted).all(|(nth, head)| self.available_head(nth) == *head);
        let resubmitted = if in_order { 0 } else { self.resubmitted.len() };
        // At most the ring's size.
        self.next_available.wrapping_add(u16::try_from(resubmitted).unwrap_or_default())
    }

    /// Where writes are noted. Those to buffers are the caller's to note, before they are published.
    #[inline]
    pub fn log(&self) -> Option<&RingLog> {
        self.log.as_ref()
    }

    /// The available index of the next buffer to take.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The used index that the guest sees.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Whether something was completed that the guest does not see.
    #[inline]
    pub fn is_ahead(&self) -> bool {
        self.published != self.used_index
    }

    /// Length of the used ring in bytes, with the event index.
    pub fn used_length(&self) -> usize {
        used_length(usize::from(self.size))
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub fn indirect(&self) -> bool {
        self.indirect
    }

    /// The memory that the rings lie in and the descriptors point to.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The same, to be kept.
    pub fn shared_memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Where descriptor table, available and used ring lie in this program's memory.
    pub fn host_addresses(&self) -> [u64; 3] {
        [self.descriptors as usize, self.available as usize, self.used as usize].map(|address| address as u64)
    }

    /// The front-end's call descriptor.
    pub fn call(&self) -> Option<&Notifier> {
        self.call.as_ref()
    }

    /// The driver's available index now. Not checked: [`Self::available`] does that.
    pub fn available_index(&self) -> u16 {
        self.available_word(1).load(Ordering::Acquire)
    }

    /// How many buffers are available from `next_available` + `taken` on.
    ///
    /// # Errors
    /// [`RingError::AvailableIndex`].
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

    /// The head of the `nth` buffer from `next_available` on, which [`Self::available`] has said to be there.
    ///
    /// # Errors
    /// [`RingError::Head`].
    #[inline]
    pub fn head(&self, nth: u16) -> Result<u16, RingError> {
        let resubmitted = self.resubmitted.get(usize::from(nth));
        let head = resubmitted.copied().unwrap_or_else(|| self.available_head(nth));
        if head < self.size { Ok(head) } else { Err(RingError::Head { head, size: self.size }) }
    }

    /// What the available ring has at its `nth` place from `next_available` on.
    #[inline]
    fn available_head(&self, nth: u16) -> u16 {
        let slot = self.next_available.wrapping_add(nth) & self.mask;
        self.available_word(2 + usize::from(slot)).load(Ordering::Relaxed)
    }

    /// Descriptor `index` of the table; `None` beyond it.
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

    /// Takes the next buffer and gives it back as used, `length` bytes written. The guest sees it after
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

    /// Lets the guest see all that was completed, and calls it if it wants that. Gives whether it was called.
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
        // The guest's wish must be read after it can see the index (virtio 1.2 §2.7.10).
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

    /// Notes the elements that were written since the last publication.
    #[cold]
    fn log_elements(&self) {
        let count = self.used_index.wrapping_sub(self.published);
        for nth in 0..count {
            let slot = self.published.wrapping_add(nth) & self.mask;
            self.log_used(USED_ELEMENTS + 8 * usize::from(slot), 8);
        }
    }

    /// Notes a write of `length` bytes at `offset` in the used ring.
    #[inline]
    fn log_used(&self, offset: usize, length: usize) {
        if let Some(log) = &self.log {
            log.used_ring(offset, length);
        }
    }

    /// Calls the guest whatever it wishes. Gives whether there is a call descriptor.
    pub fn call_guest(&self) -> bool {
        self.call.as_ref().is_some_and(|call| {
            call.notify();
            true
        })
    }

    /// Asks the guest not to notify of new buffers. With `EVENT_IDX` the event index is left behind, which does it.
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

    /// Asks the guest to notify of the next buffer, and looks once more: gives how many are available from
    /// `next_available` + `taken` on after that.
    ///
    /// # Errors
    /// [`RingError::AvailableIndex`].
    pub fn enable_kicks(&mut self, taken: u16) -> Result<u16, RingError> {
        self.kicks_wanted = Some(true);
        if self.event_idx {
            let event = self.next_available.wrapping_add(taken);
            let offset = USED_ELEMENTS + 8 * usize::from(self.size);
            // SAFETY: the used ring ends with 2 bytes of event index after `size` elements of 8 bytes.
            let pointer = unsafe { self.used.byte_add(offset) };
            // SAFETY: within the mapping and 2-byte aligned; shared with the guest, hence atomic.
            unsafe { AtomicU16::from_ptr(pointer) }.store(event, Ordering::Relaxed);
            self.log_used(offset, 2);
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
            self.log_used(USED_FLAGS, 2);
        }
        // The wish must be visible before the index is read again (virtio 1.2 §2.7.10).
        fence(Ordering::SeqCst);
        self.available(taken)
    }

    /// Flags (0), index (1), ring (2…) and event index (2 + size) of the available ring.
    #[inline]
    fn available_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word <= 2 + usize::from(self.size));
        // SAFETY: the available ring has `size` + 3 words.
        let pointer = unsafe { self.available.add(word) };
        // SAFETY: within the mapping that `memory` keeps, and aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(pointer) }
    }

    /// Flags (0) and index (1) of the used ring.
    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 2);
        // SAFETY: the used ring begins with two words.
        let pointer = unsafe { self.used.add(word) };
        // SAFETY: within the mapping that `memory` keeps, and aligned; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(pointer) }
    }
}
