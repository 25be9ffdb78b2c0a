//! The region in which a back-end notes which chains it has (vhost-user: "Inflight I/O tracking"), as the front-end
//! keeps it: and any numbers in it, as another back-end would have left them.

use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::Result;

use super::memory::Region;
use super::wire::{MemoryRegion, Message, request};

/// A region in a back-end's file.
#[derive(Debug)]
pub struct Inflight {
    region: Region,
    queues: u16,
    entries: u16,
}

impl Inflight {
    /// The region of `size` bytes at `offset` of `file`, for `queues` vrings of `entries` descriptors.
    ///
    /// # Errors
    /// If it cannot be mapped.
    pub fn new(file: OwnedFd, size: u64, offset: u64, queues: u16, entries: u16) -> Result<Self> {
        let place = MemoryRegion { guest_address: 0, size, user_address: 0, file_offset: offset };
        Ok(Self { region: Region::of(place, file)?, queues, entries })
    }

    /// An empty region in a file of our own, which can be cut off.
    ///
    /// # Errors
    /// The system's.
    pub fn in_memory(queues: u16, entries: u16) -> Result<Self> {
        let size = u64::from(queues) * u64::try_from(part(entries))?;
        let place = MemoryRegion { guest_address: 0, size, user_address: 0, file_offset: 0 };
        Ok(Self { region: Region::new(place)?, queues, entries })
    }

    /// Cuts its file off. If that succeeds, it must not be touched afterwards.
    ///
    /// # Errors
    /// The system's.
    pub fn truncate(&self) -> Result<()> {
        Ok(self.region.truncate(0)?)
    }

    /// The `SET_INFLIGHT_FD` that it goes with.
    pub fn message(&self) -> Message {
        let MemoryRegion { size, file_offset, .. } = self.region.place;
        Message::inflight(request::SET_INFLIGHT_FD, size, file_offset, self.queues, self.entries)
    }

    /// Its file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.region.file()
    }

    /// A copy of all its bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.region.bytes().to_vec()
    }

    /// Sets all its bytes.
    pub fn fill(&self, byte: u8) {
        self.region.bytes().fill(byte);
    }

    /// Sets each of its bytes.
    pub fn scribble(&self, mut byte: impl FnMut() -> u8) {
        let bytes = self.region.bytes();
        let scribbled: Vec<_> = (0..bytes.len()).map(|_| byte()).collect();
        bytes.write(0, &scribbled);
    }

    /// Where vring `index`'s part begins.
    fn part(&self, index: u16) -> usize {
        usize::from(index) * part(self.entries)
    }

    /// Writes what a back-end notes of a vring: version, number of descriptors and used index.
    pub fn set_queue(&self, index: u16, used: u16) {
        let numbers = [1, self.entries, 0, used].map(u16::to_le_bytes).concat();
        self.region.bytes().write(self.part(index) + 8, &numbers);
    }

    /// Writes what it notes of a chain that it has: the place in the order in which they were taken.
    pub fn set_chain(&self, index: u16, head: u16, counter: u64) {
        let place = self.part(index) + 16 + 16 * usize::from(head);
        let bytes = self.region.bytes();
        bytes.write(place, &[1]);
        bytes.write(place + 8, &counter.to_le_bytes());
    }
}

/// The length of a vring's part.
fn part(entries: u16) -> usize {
    (16 + 16 * usize::from(entries)).next_multiple_of(64)
}
