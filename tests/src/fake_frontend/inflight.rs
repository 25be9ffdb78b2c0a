//! The region in which a back-end tracks its descriptor chains in flight (vhost-user: "Inflight I/O tracking"). The
//! front-end keeps it. A test can write any values to it, to imitate another back-end that left them.

use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::Result;

use super::memory::Region;
use super::wire::{MemoryRegion, Message, request};

/// An inflight region.
#[derive(Debug)]
pub struct Inflight {
    region: Region,
    queues: u16,
    entries: u16,
}

impl Inflight {
    /// Maps the region of `size` bytes at `offset` of `file`, for `queues` vrings of `entries` descriptors.
    ///
    /// # Errors
    /// Returns an error if the region cannot be mapped.
    pub fn new(file: OwnedFd, size: u64, offset: u64, queues: u16, entries: u16) -> Result<Self> {
        let place = MemoryRegion { guest_address: 0, size, user_address: 0, file_offset: offset };
        Ok(Self { region: Region::of(place, file)?, queues, entries })
    }

    /// Creates an empty region in an unsealed memfd, which [`Self::truncate`] can truncate.
    ///
    /// # Errors
    /// Returns an error if the region cannot be created or mapped.
    pub fn in_memory(queues: u16, entries: u16) -> Result<Self> {
        let size = u64::from(queues) * u64::try_from(part(entries))?;
        let place = MemoryRegion { guest_address: 0, size, user_address: 0, file_offset: 0 };
        Ok(Self { region: Region::new(place)?, queues, entries })
    }

    /// Truncates the file to nothing. On success, the region must not be accessed afterwards.
    ///
    /// # Errors
    /// Returns an error if the file cannot be truncated, for instance because it is sealed.
    pub fn truncate(&self) -> Result<()> {
        Ok(self.region.truncate(0)?)
    }

    /// The `SET_INFLIGHT_FD` message for this region.
    pub fn message(&self) -> Message {
        let MemoryRegion { size, file_offset, .. } = self.region.place;
        Message::inflight(request::SET_INFLIGHT_FD, size, file_offset, self.queues, self.entries)
    }

    /// The file of the region.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.region.file()
    }

    /// A copy of the region's bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.region.bytes().to_vec()
    }

    /// Sets all bytes to `byte`.
    pub fn fill(&self, byte: u8) {
        self.region.bytes().fill(byte);
    }

    /// Sets each byte to the result of a call of `byte`.
    pub fn scribble(&self, mut byte: impl FnMut() -> u8) {
        let bytes = self.region.bytes();
        let scribbled: Vec<_> = (0..bytes.len()).map(|_| byte()).collect();
        bytes.write(0, &scribbled);
    }

    /// The offset of the part of vring `index`.
    fn part(&self, index: u16) -> usize {
        usize::from(index) * part(self.entries)
    }

    /// Writes the header of a vring's part: version, number of descriptors and used index.
    pub fn set_queue(&self, index: u16, used: u16) {
        let numbers = [1, self.entries, 0, used].map(u16::to_le_bytes).concat();
        self.region.bytes().write(self.part(index) + 8, &numbers);
    }

    /// Marks a chain as in flight, with the counter that gives the order in which the chains were taken.
    pub fn set_chain(&self, index: u16, head: u16, counter: u64) {
        let place = self.part(index) + 16 + 16 * usize::from(head);
        let bytes = self.region.bytes();
        bytes.write(place, &[1]);
        bytes.write(place + 8, &counter.to_le_bytes());
    }
}

/// The length of the part of a vring.
fn part(entries: u16) -> usize {
    (16 + 16 * usize::from(entries)).next_multiple_of(64)
}
