//! The log of changed pages that a front-end keeps while it migrates its guest (vhost-user: "Migration"): one bit per
//! page of guest memory, in memory that the front-end shares.
//!
//! The front-end clears bits and copies their pages at any time. So a bit is set after its page was written and before
//! the guest can learn of the write. It is set even if it is already set: the front-end may be about to clear it.
#![expect(unsafe_code, reason = "sets bits in memory that the front-end shares")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::memory::GuestMemory;
use crate::shared_mapping::{MappingError, SharedMapping};

/// Bytes of guest memory per bit (`VHOST_LOG_PAGE`).
pub const PAGE: u64 = 0x1000;

/// Why a log, or memory together with a log, was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log does not cover all memory: vhost-net would write beyond it, and the worker would lose pages.
    #[error("the log of changed pages ends at guest address {log_end:#x}, memory at {memory_end:#x}")]
    TooSmall {
        /// The first guest address without a bit.
        log_end: u64,
        /// The first guest address after all memory.
        memory_end: u64,
    },
    /// The log cannot be mapped.
    #[error("cannot map the log of changed pages")]
    Mapping(#[from] MappingError),
}

/// The log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: SharedMapping,
}

impl DirtyLog {
    /// Maps a log (`SET_LOG_BASE`): `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// Returns [`LogError::Mapping`] if the file is too short or cannot be mapped.
    pub fn new(file: File, offset: u64, size: u64) -> Result<Self, LogError> {
        Ok(Self { mapping: SharedMapping::new(file, offset, size)? })
    }

    /// Checks that there is a bit for every page of `memory`.
    ///
    /// # Errors
    /// Returns [`LogError::TooSmall`] if there is not.
    pub fn check_covers(&self, memory: &GuestMemory) -> Result<(), LogError> {
        let (log_end, memory_end) = (self.end(), memory.end());
        if log_end < memory_end { Err(LogError::TooSmall { log_end, memory_end }) } else { Ok(()) }
    }

    /// Returns whether there is a bit for each of `length` bytes from guest address `address` on.
    pub fn covers(&self, address: u64, length: u64) -> bool {
        address.checked_add(length).is_some_and(|end| end <= self.end())
    }

    /// Returns the first guest address without a bit.
    fn end(&self) -> u64 {
        (self.length() as u64).saturating_mul(8 * PAGE)
    }

    /// Returns the start of the mapping.
    pub fn start(&self) -> *mut u8 {
        self.mapping.start()
    }

    /// Returns the length of the log in bytes.
    pub fn length(&self) -> usize {
        self.mapping.length()
    }

    /// Returns the file that contains the log.
    pub fn file(&self) -> &File {
        self.mapping.file()
    }

    /// Returns offset and size of the log in the file, in bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.mapping.offset(), self.mapping.length() as u64)
    }

    /// Marks `length` bytes from guest address `address` on as written. Ignores pages without a bit.
    pub fn mark(&self, address: u64, length: usize) {
        let Some(beyond) = (length as u64).checked_sub(1) else { return };
        let last = address.saturating_add(beyond).min(self.end() - 1) / PAGE;
        for page in address / PAGE..=last {
            // The mapping's length is a usize.
            let Ok(byte) = usize::try_from(page / 8) else { return };
            // SAFETY: `last` is a page before `end`, whose bit is within the mapping.
            let pointer = unsafe { self.start().add(byte) };
            // SAFETY: within the mapping; shared with the front-end, hence atomic.
            let byte = unsafe { AtomicU8::from_ptr(pointer) };
            // Release: a front-end that clears the bit sees what was written to the page.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

/// The log as a vring uses it.
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// The guest address at which writes to the used ring are marked (`SET_VRING_ADDR`; the front-end chooses it).
    /// `None` if they are not (no `VRING_F_LOG`).
    pub used: Option<u64>,
}

impl RingLog {
    /// Marks `length` bytes at the host pointer `pointer` as written. The pointer is in one of `memory`'s regions.
    pub fn buffer(&self, memory: &GuestMemory, pointer: *const u8, length: usize) {
        if let Some(address) = memory.guest_address(pointer) {
            self.log.mark(address, length);
        }
    }

    /// Returns the guest address at which writes to a used ring of `length` bytes are marked, if the log covers it all.
    /// The kernel does not check that, and must not get another address.
    pub fn covered_used_ring(&self, length: usize) -> Option<u64> {
        self.used.filter(|address| self.log.covers(*address, length as u64))
    }

    /// Marks `length` bytes at `offset` in the used ring as written.
    pub fn used_ring(&self, offset: usize, length: usize) {
        if let Some(used) = self.used {
            self.log.mark(used.saturating_add(offset as u64), length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;
    use std::os::unix::fs::FileExt;

    fn log(offset: u64, size: u64) -> (File, DirtyLog) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(offset + size).unwrap();
        let log = DirtyLog::new(file.try_clone().unwrap(), offset, size).unwrap();
        (file, log)
    }

    fn bits(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1));
        (0..).zip(bits).filter(|(_, bit)| *bit == 1).map(|(number, _)| number).collect()
    }

    #[test]
    fn exactly_the_touched_pages_are_marked() {
        for (address, length, pages) in [
            (0, 1, vec![0]),
            (0xfff, 1, vec![0]),
            (0xfff, 2, vec![0, 1]),
            (0x7000, 0x2000, vec![7, 8]),
            (0x9000, 0x1001, vec![9, 10]),
            (0x5000, 0, vec![]),
        ] {
            let (file, log) = log(0, 16);
            log.mark(address, length);
            assert_eq!(bits(&file), pages, "{length} bytes at {address:#x}");
        }
    }

    #[test]
    fn marked_pages_stay_marked() {
        let (file, log) = log(0, 1);
        log.mark(0x1000, 1);
        log.mark(0x3000, 1);
        log.mark(0x1000, 1);
        assert_eq!(bits(&file), [1, 3]);
    }

    #[test]
    fn nothing_is_marked_beyond_the_log() {
        // The file continues to the end of the log's page, so a bit beyond the log would show.
        let (file, log) = log(0x1000, 2);
        file.set_len(0x2000).unwrap();
        log.mark(0xf000, 0x1_0000);
        log.mark(0x1_0000, 1);
        log.mark(u64::MAX, usize::MAX);
        log.mark(u64::MAX - 5, 3);
        assert_eq!(bits(&file), [8 * 0x1000 + 15]);
    }

    #[test]
    fn log_without_a_bit_for_every_page_is_too_small() {
        let (_file, log) = log(0, 2);
        let memory = |size| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            let layout = RegionLayout { guest_address: 0x8000, size, user_address: 0, file_offset: 0 };
            GuestMemory::map([(layout, file)]).unwrap()
        };
        log.check_covers(&GuestMemory::default()).unwrap();
        log.check_covers(&memory(0x8000)).unwrap();
        let error = log.check_covers(&memory(0x8001)).unwrap_err();
        assert!(matches!(error, LogError::TooSmall { log_end: 0x1_0000, memory_end: 0x1_0001 }));
    }

    #[test]
    fn log_outside_its_file_is_refused() {
        let refused = |offset, size| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(0x2000).unwrap();
            DirtyLog::new(file, offset, size).unwrap_err()
        };
        for (offset, size) in [(0, 0x2001), (0x2000, 1), (1, 1), (0, 0), (u64::MAX, 1), (0, u64::MAX)] {
            assert!(matches!(refused(offset, size), LogError::Mapping(_)), "{size} bytes at {offset}");
        }
    }
}
