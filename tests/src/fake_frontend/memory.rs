//! The guest's memory: several regions, each a memfd, at guest addresses, front-end addresses and own addresses that
//! have nothing to do with each other — so that a back-end that takes one for another is found out.
//!
//! A [`SharedSlice`] is a piece of it that another process reads and writes at any time. It keeps its mapping alive.
#![expect(unsafe_code, reason = "memory that another process shares is reached through raw pointers")]

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::wire::MemoryRegion;

/// A memory region: what the front-end says of it, and its file.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where it is, as the messages say it.
    pub place: MemoryRegion,
    file: Arc<OwnedFd>,
    mapping: Arc<Mapping>,
}

impl Region {
    /// A region backed by a memfd of its own, which begins with `file_offset` bytes that are not part of it.
    ///
    /// # Errors
    /// The system's, for a size that cannot be mapped.
    pub fn new(place: MemoryRegion) -> io::Result<Self> {
        let file = memfd_create("guest memory", MFdFlags::MFD_CLOEXEC)?;
        let file_size = i64::try_from(place.file_offset + place.size).map_err(io::Error::other)?;
        nix::unistd::ftruncate(&file, file_size)?;
        Self::of(place, file)
    }

    /// A region in this file, which is large enough.
    ///
    /// # Errors
    /// The system's, for one that cannot be mapped.
    pub fn of(place: MemoryRegion, file: OwnedFd) -> io::Result<Self> {
        let mapping = Mapping::new(&file, place.file_offset, place.size)?;
        Ok(Self { place, file: Arc::new(file), mapping: Arc::new(mapping) })
    }

    /// All its bytes.
    pub fn bytes(&self) -> SharedSlice {
        SharedSlice::new(&self.mapping, 0, self.mapping.length)
    }

    /// Cuts the file off, under everybody who has mapped it. The memory must not be touched afterwards.
    ///
    /// # Errors
    /// The system's.
    pub fn truncate(&self, length: i64) -> io::Result<()> {
        Ok(nix::unistd::ftruncate(&self.file, length)?)
    }

    /// The file behind it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The regions of a guest.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    /// How much of each region has been handed out.
    taken: Vec<u64>,
}

impl GuestMemory {
    /// Memory of one region for each of `sizes`: at growing guest addresses with gaps between them, and at
    /// front-end addresses in the opposite order.
    ///
    /// # Errors
    /// The system's, if a region cannot be mapped.
    pub fn new(sizes: &[u64]) -> io::Result<Self> {
        const GUEST_STEP: u64 = 1 << 32;
        const USER_TOP: u64 = 0x7a00_0000_0000;
        let places = (0u64..).zip(sizes).map(|(number, &size)| MemoryRegion {
            guest_address: 0x10_0000 + number * GUEST_STEP,
            size,
            user_address: USER_TOP - (number + 1) * GUEST_STEP,
            file_offset: number * 0x1000,
        });
        Self::from_regions(places.map(Region::new).collect::<io::Result<_>>()?)
    }

    /// Memory of these regions.
    ///
    /// # Errors
    /// None at present.
    pub fn from_regions(regions: Vec<Region>) -> io::Result<Self> {
        Ok(Self { taken: vec![0; regions.len()], regions })
    }

    /// All regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A guest address with `length` free bytes behind it in region number `region`, aligned to `alignment`.
    ///
    /// # Panics
    /// If the region is full: the test needs a larger one.
    pub fn allocate(&mut self, region: usize, length: usize, alignment: u64) -> u64 {
        let start = self.taken[region].next_multiple_of(alignment);
        let end = start + u64::try_from(length).expect("a length");
        assert!(end <= self.regions[region].place.size, "memory region {region} is full");
        self.taken[region] = end;
        self.regions[region].place.guest_address + start
    }

    /// The bytes at a guest address.
    ///
    /// # Panics
    /// If they are not all in one region.
    pub fn slice(&self, guest_address: u64, length: usize) -> SharedSlice {
        let (region, offset) = self.find(guest_address);
        SharedSlice::new(&region.mapping, usize::try_from(offset).expect("an offset"), length)
    }

    /// A copy of everything: what a test compares with later to see that nothing was written.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.regions
            .iter()
            .zip(&self.taken)
            .map(|(region, &taken)| {
                let length = usize::try_from(taken).expect("a region's size");
                SharedSlice::new(&region.mapping, 0, length).to_vec()
            })
            .collect()
    }

    /// A guest address in the front-end's address space.
    ///
    /// # Panics
    /// If it is in no region.
    pub fn user_address(&self, guest_address: u64) -> u64 {
        let (region, offset) = self.find(guest_address);
        region.place.user_address + offset
    }

    /// Where a guest address is: the number of its region, and the offset in that.
    ///
    /// # Panics
    /// If it is in no region.
    pub fn offset(&self, guest_address: u64) -> (usize, usize) {
        let (region, offset) = self.find(guest_address);
        let number = self.regions.iter().position(|other| other.place == region.place);
        (number.expect("one of the regions"), usize::try_from(offset).expect("an offset"))
    }

    fn find(&self, guest_address: u64) -> (&Region, u64) {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = guest_address.wrapping_sub(region.place.guest_address);
                (offset < region.place.size).then_some((region, offset))
            })
            .unwrap_or_else(|| panic!("guest address {guest_address:#x} is in no region"))
    }
}

/// A file's mapped range.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    length: usize,
}

// SAFETY: a mapping may be used and unmapped from any thread.
unsafe impl Send for Mapping {}
// SAFETY: all access goes through `SharedSlice`, whose accesses are to memory that others change at any time anyway.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &OwnedFd, offset: u64, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let nonzero = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the place, so no memory in use is replaced.
        let start = unsafe { mmap(None, nonzero, protection, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { start, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no `SharedSlice` is left, since each holds a reference.
        unsafe { munmap(self.start, self.length) }.expect("a mapped range");
    }
}

/// A piece of guest memory. All offsets are checked; those of numbers must be aligned.
#[derive(Clone, Debug)]
pub struct SharedSlice {
    start: NonNull<u8>,
    length: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the memory stays mapped for as long as the slice lives, on whichever thread.
unsafe impl Send for SharedSlice {}

impl SharedSlice {
    fn new(mapping: &Arc<Mapping>, offset: usize, length: usize) -> Self {
        let end = offset.checked_add(length).expect("a length");
        assert!(end <= mapping.length, "{length} bytes at {offset:#x} do not fit the region");
        // SAFETY: `offset` is within the mapping, by the check above.
        let start = unsafe { mapping.start.cast::<u8>().add(offset) };
        Self { start, length, _mapping: Arc::clone(mapping) }
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The place of `length` bytes at `offset`, after checking that they are in the slice.
    fn place(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset <= self.length && length <= self.length - offset,
            "{length} bytes at {offset} are outside a slice of {}",
            self.length
        );
        // SAFETY: `offset` is within the slice, by the check above.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Replaces a byte and gives what it was, in one step.
    pub fn swap_u8(&self, offset: usize, value: u8) -> u8 {
        let place = self.place(offset, 1);
        // SAFETY: `place` checked it; shared with others, hence atomic.
        unsafe { AtomicU8::from_ptr(place) }.swap(value, Ordering::SeqCst)
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.place(offset, bytes.len());
        // SAFETY: `place` checked the source; `bytes` is memory of this process that nobody else shares.
        unsafe { source.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let target = self.place(offset, bytes.len());
        // SAFETY: `place` checked the target; `bytes` is memory of this process that nobody else shares.
        unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        let target = self.place(0, self.length);
        // SAFETY: `place` checked the target.
        unsafe { target.write_bytes(byte, self.length) };
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.read(0, &mut bytes);
        bytes
    }

    /// Appends `length` bytes from `offset` to `bytes`; does not allocate if the capacity is there.
    pub fn append_to(&self, offset: usize, length: usize, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.resize(start + length, 0);
        self.read(offset, &mut bytes[start..]);
    }

    /// Writes a little-endian number of 32 bits.
    pub fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Reads a little-endian number of 32 bits.
    pub fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Reads a little-endian number of 16 bits in one access.
    pub fn load_u16(&self, offset: usize, ordering: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(ordering))
    }

    /// Writes a little-endian number of 16 bits in one access.
    pub fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) {
        self.atomic_u16(offset).store(value.to_le(), ordering);
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let place = self.place(offset, 2).cast::<u16>();
        assert!(place.is_aligned(), "offset {offset} is odd");
        // SAFETY: `place` checked that the bytes are in the slice, which lives as long as the reference does; they
        // are aligned; and whoever else writes them while they are used like this does so in one access too.
        unsafe { AtomicU16::from_ptr(place) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_addresses_of_a_byte_differ() {
        let mut memory = GuestMemory::new(&[0x10000, 0x10000]).unwrap();
        memory.allocate(1, 10, 1);
        let guest = memory.allocate(1, 100, 64);
        let region = memory.regions()[1].place;
        assert_eq!(guest, region.guest_address + 64);
        assert_eq!(memory.user_address(guest), region.user_address + 64);
        assert_ne!(memory.user_address(guest), guest);
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        let memory = GuestMemory::new(&[0x1000, 0x1000]).unwrap();
        let region = &memory.regions()[1];
        memory.slice(region.place.guest_address + 5, 3).write(0, b"abc");
        let mut bytes = [0; 3];
        let offset = i64::try_from(region.place.file_offset + 5).unwrap();
        nix::sys::uio::pread(region.file(), &mut bytes, offset).unwrap();
        assert_eq!(&bytes, b"abc");
    }

    #[test]
    fn numbers_are_little_endian() {
        let memory = GuestMemory::new(&[0x1000]).unwrap();
        let slice = memory.slice(memory.regions()[0].place.guest_address, 8);
        slice.store_u16(2, 0x1234, Ordering::Relaxed);
        slice.write_u32(4, 0x5678_9abc);
        assert_eq!(slice.to_vec(), [0, 0, 0x34, 0x12, 0xbc, 0x9a, 0x78, 0x56]);
        assert_eq!(slice.load_u16(2, Ordering::Relaxed), 0x1234);
        assert_eq!(slice.read_u32(4), 0x5678_9abc);
    }

    #[test]
    #[should_panic(expected = "outside a slice")]
    fn a_slice_has_an_end() {
        let memory = GuestMemory::new(&[0x1000]).unwrap();
        memory.slice(memory.regions()[0].place.guest_address, 8).read(6, &mut [0; 3]);
    }

    #[test]
    #[should_panic(expected = "in no region")]
    fn an_address_between_regions_is_none() {
        let memory = GuestMemory::new(&[0x1000, 0x1000]).unwrap();
        memory.slice(memory.regions()[0].place.guest_address + 0x1000, 1);
    }
}
