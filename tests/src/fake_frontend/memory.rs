//! The guest's memory: several regions, each in a memfd. Their guest addresses, front-end addresses and local addresses
//! are unrelated, so that a test fails if the back-end confuses them.
//!
//! A [`SharedSlice`] is a piece of the memory, which another process may read and write at any time. It keeps its
//! mapping alive.
#![expect(unsafe_code, reason = "accesses memory shared with another process through raw pointers")]

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

/// A memory region: its description in messages, and its file.
#[derive(Clone, Debug)]
pub struct Region {
    /// The region as the front-end's messages describe it.
    pub place: MemoryRegion,
    file: Arc<OwnedFd>,
    mapping: Arc<Mapping>,
}

impl Region {
    /// Creates a region backed by a new memfd, whose first `file_offset` bytes are not part of the region.
    ///
    /// # Errors
    /// Returns an error if the memfd cannot be created, or the region cannot be mapped.
    pub fn new(place: MemoryRegion) -> io::Result<Self> {
        let file = memfd_create("guest memory", MFdFlags::MFD_CLOEXEC)?;
        let file_size = i64::try_from(place.file_offset + place.size).map_err(io::Error::other)?;
        nix::unistd::ftruncate(&file, file_size)?;
        Self::of(place, file)
    }

    /// Maps a region in this file, which must be large enough.
    ///
    /// # Errors
    /// Returns an error if the region cannot be mapped.
    pub fn of(place: MemoryRegion, file: OwnedFd) -> io::Result<Self> {
        let mapping = Mapping::new(&file, place.file_offset, place.size)?;
        Ok(Self { place, file: Arc::new(file), mapping: Arc::new(mapping) })
    }

    /// All bytes of the region.
    pub fn bytes(&self) -> SharedSlice {
        SharedSlice::new(&self.mapping, 0, self.mapping.length)
    }

    /// Truncates the file, which affects every process that has mapped it. The memory beyond `length` must not be
    /// accessed afterwards.
    ///
    /// # Errors
    /// Returns an error if the file cannot be truncated.
    pub fn truncate(&self, length: i64) -> io::Result<()> {
        Ok(nix::unistd::ftruncate(&self.file, length)?)
    }

    /// The file that backs the region.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The regions of a guest.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    /// How many bytes of each region are allocated.
    taken: Vec<u64>,
}

impl GuestMemory {
    /// Creates a region for each of `sizes`, at ascending guest addresses with gaps between them, and at descending
    /// front-end addresses.
    ///
    /// # Errors
    /// Returns an error if a region cannot be created or mapped.
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

    /// Creates a guest memory from these regions.
    ///
    /// # Errors
    /// Returns no error at present.
    pub fn from_regions(regions: Vec<Region>) -> io::Result<Self> {
        Ok(Self { taken: vec![0; regions.len()], regions })
    }

    /// All regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Allocates `length` bytes in region number `region`, aligned to `alignment`. Returns their guest address.
    ///
    /// # Panics
    /// Panics if the region is full; then the test needs a larger one.
    pub fn allocate(&mut self, region: usize, length: usize, alignment: u64) -> u64 {
        let start = self.taken[region].next_multiple_of(alignment);
        let end = start + u64::try_from(length).expect("a length");
        assert!(end <= self.regions[region].place.size, "memory region {region} is full");
        self.taken[region] = end;
        self.regions[region].place.guest_address + start
    }

    /// The `length` bytes at a guest address.
    ///
    /// # Panics
    /// Panics if they are not all in one region.
    pub fn slice(&self, guest_address: u64, length: usize) -> SharedSlice {
        let (region, offset) = self.find(guest_address);
        SharedSlice::new(&region.mapping, usize::try_from(offset).expect("an offset"), length)
    }

    /// A copy of all allocated bytes, with which a test can later check that nothing was written.
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

    /// Translates a guest address to the front-end's address space.
    ///
    /// # Panics
    /// Panics if the address is in no region.
    pub fn user_address(&self, guest_address: u64) -> u64 {
        let (region, offset) = self.find(guest_address);
        region.place.user_address + offset
    }

    /// The region number and the offset in the region of a guest address.
    ///
    /// # Panics
    /// Panics if the address is in no region.
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

/// A mapped range of a file.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    length: usize,
}

// SAFETY: a mapping may be used and unmapped from any thread.
unsafe impl Send for Mapping {}
// SAFETY: all access goes through `SharedSlice`, which treats the memory as changing at any time.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &OwnedFd, offset: u64, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let nonzero = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe { mmap(None, nonzero, protection, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { start, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped the range, and no `SharedSlice` is left, because each holds a reference to this mapping.
        unsafe { munmap(self.start, self.length) }.expect("a mapped range");
    }
}

/// A piece of guest memory. All offsets are checked. Those of 16-bit atomic accesses must be even.
#[derive(Clone, Debug)]
pub struct SharedSlice {
    start: NonNull<u8>,
    length: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the memory stays mapped for as long as the slice lives, on any thread.
unsafe impl Send for SharedSlice {}

impl SharedSlice {
    fn new(mapping: &Arc<Mapping>, offset: usize, length: usize) -> Self {
        let end = offset.checked_add(length).expect("a length");
        assert!(end <= mapping.length, "{length} bytes at {offset:#x} do not fit the region");
        // SAFETY: `offset` is within the mapping, by the check above.
        let start = unsafe { mapping.start.cast::<u8>().add(offset) };
        Self { start, length, _mapping: Arc::clone(mapping) }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the slice is empty.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the pointer to `offset`, after checking that `length` bytes from there are in the slice.
    fn place(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset <= self.length && length <= self.length - offset,
            "{length} bytes at {offset} are outside a slice of {}",
            self.length
        );
        // SAFETY: `offset` is within the slice, by the check above.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Atomically replaces a byte. Returns the old value.
    pub fn swap_u8(&self, offset: usize, value: u8) -> u8 {
        let place = self.place(offset, 1);
        // SAFETY: `place` checked the offset. The byte is shared with other processes, hence the atomic access.
        unsafe { AtomicU8::from_ptr(place) }.swap(value, Ordering::SeqCst)
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.place(offset, bytes.len());
        // SAFETY: `place` checked the source. `bytes` is private memory of this process, so the ranges do not overlap.
        unsafe { source.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let target = self.place(offset, bytes.len());
        // SAFETY: `place` checked the target. `bytes` is private memory of this process, so the ranges do not overlap.
        unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Sets every byte to `byte`.
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

    /// Appends `length` bytes from `offset` to `bytes`. Does not allocate if the capacity suffices.
    pub fn append_to(&self, offset: usize, length: usize, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.resize(start + length, 0);
        self.read(offset, &mut bytes[start..]);
    }

    /// Writes a little-endian 32-bit number.
    pub fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Reads a little-endian 32-bit number.
    pub fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Reads a little-endian 16-bit number in one access.
    pub fn load_u16(&self, offset: usize, ordering: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(ordering))
    }

    /// Writes a little-endian 16-bit number in one access.
    pub fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) {
        self.atomic_u16(offset).store(value.to_le(), ordering);
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let place = self.place(offset, 2).cast::<u16>();
        assert!(place.is_aligned(), "offset {offset} is odd");
        // SAFETY: `place` checked that the bytes are in the slice, which outlives the reference. They are aligned. The
        // other process, too, writes them in one access.
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
    fn written_bytes_are_in_the_file() {
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
    fn reading_beyond_a_slice_panics() {
        let memory = GuestMemory::new(&[0x1000]).unwrap();
        memory.slice(memory.regions()[0].place.guest_address, 8).read(6, &mut [0; 3]);
    }

    #[test]
    #[should_panic(expected = "in no region")]
    fn an_address_between_regions_panics() {
        let memory = GuestMemory::new(&[0x1000, 0x1000]).unwrap();
        memory.slice(memory.regions()[0].place.guest_address + 0x1000, 1);
    }
}
