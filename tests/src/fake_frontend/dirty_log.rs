//! The log of written pages that a front-end shares with the back-end during a migration (vhost-user: "Migration").

use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;

use super::memory::{GuestMemory, Region, SharedSlice};
use super::wire::{MemoryRegion, Message};

/// The size of the page that one bit stands for, in bytes.
pub const PAGE: u64 = 4096;

/// A log in a separate memfd.
#[derive(Debug)]
pub struct DirtyLog {
    region: Region,
    bits: SharedSlice,
}

impl DirtyLog {
    /// Creates a log with a bit for every page of `memory`, and some spare ones.
    ///
    /// # Errors
    /// Returns an error if the memory cannot be allocated or mapped.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let ends = memory.regions().iter().map(|region| region.place.guest_address + region.place.size);
        Self::with_size(ends.max().unwrap_or(0).div_ceil(8 * PAGE) + 8)
    }

    /// Creates a log of `size` bytes, at an offset in its file.
    ///
    /// # Errors
    /// Returns an error if the memory cannot be allocated or mapped.
    pub fn with_size(size: u64) -> io::Result<Self> {
        let region =
            Region::new(MemoryRegion { guest_address: 0, size, user_address: 0, file_offset: PAGE })?;
        Ok(Self { bits: region.bytes(), region })
    }

    /// The `SET_LOG_BASE` message for this log.
    pub fn message(&self) -> Message {
        Message::log_base(self.region.place.size, self.region.place.file_offset)
    }

    /// The file of the log.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.region.file()
    }

    /// Truncates the file to nothing. The log must not be accessed afterwards.
    ///
    /// # Errors
    /// Returns an error if the file cannot be truncated.
    pub fn truncate(&self) -> io::Result<()> {
        self.region.truncate(0)
    }

    /// Returns the numbers of the marked pages and clears the marks.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for (first, &seen) in (0u64..).step_by(8).zip(&self.bits.to_vec()) {
            if seen == 0 {
                continue;
            }
            let offset = usize::try_from(first / 8).expect("within the log");
            let byte = self.bits.swap_u8(offset, 0);
            pages.extend((first..first + 8).filter(|page| byte >> (page % 8) & 1 != 0));
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_taken_once() {
        let log = DirtyLog::with_size(16).unwrap();
        log.bits.write(0, &[0x81, 0, 1]);
        assert_eq!(log.take(), BTreeSet::from([0, 7, 16]));
        assert_eq!(log.take(), BTreeSet::new());
    }
}
