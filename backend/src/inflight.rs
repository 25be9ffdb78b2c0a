//! The inflight region, in which a back-end records the descriptor chains that it has taken, for the next back-end
//! after a crash (vhost-user: "Inflight I/O tracking", split virtqueues). The front-end keeps the region and may write
//! anything to it.
//!
//! Completion is in order, and Baton holds chains only within a batch. So the chains that it leaves in flight are
//! always the next available ones, which the used index tells as well. Another back-end may leave chains out of order:
//! they are *resubmitted*, that is, taken before the other available chains. An invalid region is reset.
//!
//! ```text
//!   for each chain:    counter, inflight = 1, next = last_batch_head, last_batch_head = head
//!   for a whole batch: used ring's idx; then inflight = 0 for each chain; then used_idx = idx
//! ```
//! [`InflightQueue::recover`] repairs the region after a crash between any two of these stores.
#![expect(unsafe_code, reason = "records chains in memory that the front-end shares")]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use baton_channel::sealed_memfd;
use baton_control::limited;

use crate::shared_mapping::{MappingError, SharedMapping};

/// The only version of the layout.
const VERSION: u16 = 1;
/// Bytes before the first chain: `features`, `version`, `desc_num`, `last_batch_head`, `used_idx`.
const HEADER: usize = 16;
/// Bytes of a chain's state: `inflight`, padding, `next`, `counter`.
const STATE: usize = 16;
/// Each queue's part begins at a multiple of this.
const ALIGNMENT: u64 = 64;

/// Why a region cannot be created or was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// The region is too small for its queues.
    #[error("inflight region has {size} bytes, but {queues} queues of {entries} descriptors need {needed}")]
    TooSmall {
        /// The size of the region.
        size: u64,
        /// The number of queues.
        queues: u16,
        /// The number of descriptors of each queue.
        entries: u16,
        /// The size that they need.
        needed: u64,
    },
    /// The region cannot be mapped.
    #[error("cannot map the inflight region")]
    Mapping(#[from] MappingError),
    /// The region cannot be created.
    #[error("cannot create an inflight region")]
    Create(#[source] io::Error),
}

/// Returns the size of one queue's part in bytes.
fn part(entries: u16) -> u64 {
    ((HEADER + STATE * usize::from(entries)) as u64).next_multiple_of(ALIGNMENT)
}

/// Returns the size of a whole region in bytes.
fn whole(queues: u16, entries: u16) -> u64 {
    // At most 2^16 times 2^20 bytes.
    u64::from(queues) * part(entries)
}

/// Creates a region for a front-end to keep (`GET_INFLIGHT_FD`). Returns a file of fixed size, and that size.
///
/// # Errors
/// Returns [`InflightError::Create`] if the file cannot be created.
pub fn create(queues: u16, entries: u16) -> Result<(File, u64), InflightError> {
    let size = whole(queues, entries);
    let file = sealed_memfd::create("inflight", size).map_err(InflightError::Create)?;
    Ok((file, size))
}

/// A region from the front-end (`SET_INFLIGHT_FD`).
#[derive(Debug)]
pub struct InflightRegion {
    mapping: SharedMapping,
    queues: u16,
    entries: u16,
}

impl InflightRegion {
    /// Maps a region of `size` bytes at `offset` of `file`, for `queues` queues of `entries` descriptors.
    ///
    /// # Errors
    /// Returns [`InflightError::TooSmall`] if the queues do not fit, or [`InflightError::Mapping`] if the region cannot
    /// be mapped.
    pub fn new(file: File, offset: u64, size: u64, queues: u16, entries: u16) -> Result<Self, InflightError> {
        let needed = whole(queues, entries);
        if size < needed {
            return Err(InflightError::TooSmall { size, queues, entries, needed });
        }
        Ok(Self { mapping: SharedMapping::new(file, offset, needed)?, queues, entries })
    }

    /// Returns the file that contains the region.
    pub fn file(&self) -> &File {
        self.mapping.file()
    }

    /// Returns offset and size of the region in the file, in bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.mapping.offset(), self.mapping.length() as u64)
    }

    /// Returns the number of queues, and of descriptors per queue.
    pub fn shape(&self) -> (u16, u16) {
        (self.queues, self.entries)
    }
}

/// Why a queue's part of a region is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Nonsense {
    #[error("unknown version {0}")]
    Version(u16),
    #[error("recorded used index {noted} does not match the ring's used index {used}")]
    UsedIndex { noted: u16, used: u16 },
    #[error("last batch is not a list of {0} chains")]
    Batch(u16),
    #[error("{inflight} chains in flight, but only {available} are available")]
    TooMany { inflight: usize, available: u16 },
}

/// One vring's part of a region.
#[derive(Debug)]
pub struct InflightQueue {
    _region: Arc<InflightRegion>,
    start: *mut u8,
    /// Number of descriptors of the vring.
    entries: u16,
    /// Number of descriptors of the part, for the field `desc_num`.
    desc_num: u16,
    /// The counter of the next chain.
    counter: u64,
    /// Chains that are completed but not published.
    batch: Vec<u16>,
}

// SAFETY: the pointer is into the mapping that `_region` keeps; all access is atomic.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    /// Returns the part of vring `index`, which has `size` descriptors, or `None` if the region has no room for it.
    /// Then the front-end did not ask for tracking, and completion in order works without.
    pub fn new(region: &Arc<InflightRegion>, index: usize, size: u16) -> Option<Self> {
        if index >= usize::from(region.queues) || size > region.entries {
            return None;
        }
        let offset = index * usize::try_from(part(region.entries)).ok()?;
        // SAFETY: the region has `queues` parts, of which this is one.
        let start = unsafe { region.mapping.start().add(offset) };
        Some(Self {
            _region: Arc::clone(region),
            start,
            entries: size,
            desc_num: region.entries,
            counter: 0,
            batch: Vec::new(),
        })
    }

    /// Brings the part up to date with the ring, whose used and available indices are `used` and `available`. Returns
    /// the heads of the chains that were taken and not completed, in the order in which they were taken. Resets an
    /// invalid part.
    pub fn recover(&mut self, used: u16, available: u16) -> Vec<u16> {
        self.batch.clear();
        self.counter = 0;
        let result = match self.version().load(Ordering::Acquire) {
            0 => Ok(None),
            VERSION => self.leftovers(used, available).map(Some),
            version => Err(Nonsense::Version(version)),
        };
        match result {
            Ok(Some(leftovers)) => return leftovers,
            Ok(None) => {}
            Err(nonsense) => {
                limited!(warn, %nonsense, "invalid inflight region ignored and reset");
            }
        }
        self.begin(used);
        Vec::new()
    }

    /// Repairs the last batch, and returns the chains in flight.
    fn leftovers(&mut self, used: u16, available: u16) -> Result<Vec<u16>, Nonsense> {
        let noted = self.used_idx().load(Ordering::Relaxed);
        // The chains of the last batch, if it was published but not yet recorded as such.
        let count = used.wrapping_sub(noted);
        if count > self.entries {
            return Err(Nonsense::UsedIndex { noted, used });
        }
        let mut in_flight: Vec<bool> =
            (0..self.entries).map(|head| self.inflight(head).load(Ordering::Relaxed) == 1).collect();
        let mut batch = Vec::with_capacity(usize::from(count));
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        let mut listed = vec![false; in_flight.len()];
        for _ in 0..count {
            let place = listed.get_mut(usize::from(head)).ok_or(Nonsense::Batch(count))?;
            if std::mem::replace(place, true) {
                return Err(Nonsense::Batch(count));
            }
            in_flight[usize::from(head)] = false;
            batch.push(head);
            head = self.next(head).load(Ordering::Relaxed);
        }
        let heads = (0..self.entries).zip(in_flight).filter(|(_, in_flight)| *in_flight);
        let mut leftovers: Vec<_> =
            heads.map(|(head, _)| (self.counter_of(head).load(Ordering::Relaxed), head)).collect();
        let available = available.wrapping_sub(used);
        if leftovers.len() > usize::from(available) {
            return Err(Nonsense::TooMany { inflight: leftovers.len(), available });
        }
        for head in batch {
            self.inflight(head).store(0, Ordering::Relaxed);
        }
        self.used_idx().store(used, Ordering::Release);
        leftovers.sort_unstable();
        self.counter = leftovers.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(leftovers.into_iter().map(|(_, head)| head).collect())
    }

    /// Resets the part, with nothing in flight.
    fn begin(&self, used: u16) {
        for head in 0..self.desc_num {
            self.inflight(head).store(0, Ordering::Relaxed);
        }
        self.field::<AtomicU64>(0).store(0, Ordering::Relaxed);
        self.field::<AtomicU16>(10).store(self.desc_num, Ordering::Relaxed);
        self.last_batch_head().store(0, Ordering::Relaxed);
        self.used_idx().store(used, Ordering::Relaxed);
        self.version().store(VERSION, Ordering::Release);
    }

    /// Records that the chain at `head`, which is less than the vring's size, is in the used ring and part of the next
    /// batch. A resubmitted chain is in flight already and keeps its counter.
    #[inline]
    pub fn complete(&mut self, head: u16, resubmitted: bool) {
        if head >= self.entries {
            return;
        }
        if !resubmitted {
            self.counter_of(head).store(self.counter, Ordering::Relaxed);
            step();
            self.counter = self.counter.wrapping_add(1);
            self.inflight(head).store(1, Ordering::Release);
            step();
        }
        self.next(head).store(self.last_batch_head().load(Ordering::Relaxed), Ordering::Release);
        step();
        self.last_batch_head().store(head, Ordering::Release);
        step();
        self.batch.push(head);
    }

    /// Records that the batch was published: the guest can see the used index `used`.
    #[inline]
    pub fn published(&mut self, used: u16) {
        for &head in &self.batch {
            self.inflight(head).store(0, Ordering::Release);
            step();
        }
        self.batch.clear();
        self.used_idx().store(used, Ordering::Release);
        step();
    }

    /// Returns the number at `offset` of the part.
    #[inline]
    fn field<T>(&self, offset: usize) -> &T {
        debug_assert!(offset + size_of::<T>() <= HEADER + STATE * usize::from(self.desc_num));
        // SAFETY: within the part, as every caller's offset is.
        let pointer = unsafe { self.start.add(offset) }.cast::<T>();
        // SAFETY: within the mapping that `_region` keeps; aligned, as the part and all numbers in it are; `T` is only
        // an atomic, for which every value is valid, since the front-end shares the memory.
        unsafe { &*pointer }
    }

    fn version(&self) -> &AtomicU16 {
        self.field(8)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.field(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.field(14)
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.field(HEADER + STATE * usize::from(head))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.field(HEADER + STATE * usize::from(head) + 6)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        self.field(HEADER + STATE * usize::from(head) + 8)
    }
}

/// Called after each store that the next back-end may see. Tests simulate a crash here.
#[cfg(not(test))]
#[inline]
pub fn step() {}

#[cfg(test)]
pub use tests::step;

#[cfg(test)]
mod tests;
