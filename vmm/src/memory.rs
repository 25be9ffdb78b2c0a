//! Guest RAM: where it lies in the guest's physical address space, and the sealed memfds that hold it.
//!
//! RAM fills the space below the 32-bit hole first; what does not fit there goes on at 4 GiB. Each of the two
//! regions is one memfd whose size is sealed, so a process that maps it (the back-end) can never be killed by
//! a truncation.

use std::fs::File;
use std::num::TryFromIntError;

use baton_channel::sealed_memfd::{self, SealedMemfdError};
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap as GenericMmap};

/// Guest memory without a dirty bitmap.
pub type GuestMemory = GenericMmap<()>;

/// The start of the 32-bit hole: RAM below it, devices above.
pub const HOLE_START: u64 = 3 << 30;
/// The end of the 32-bit hole: RAM above it.
pub const HOLE_END: u64 = 4 << 30;

/// Why guest RAM could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel refused a memfd of this size.
    #[error("guest memory: cannot make a memfd of {size} bytes")]
    Memfd {
        /// How large it should have become.
        size: u64,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It could not be mapped.
    #[error("guest memory: cannot map it")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// Another number of regions than this amount of memory has.
    #[error("guest memory: {came} regions instead of {needed}")]
    Regions {
        /// How many files came.
        came: usize,
        /// How many regions there are.
        needed: usize,
    },
    /// A file that is too long or too short, or whose size could change under the guest.
    #[error("guest memory")]
    Adopt(#[from] SealedMemfdError),
    /// Regions that lie elsewhere than ours.
    #[error("guest memory: its regions lie elsewhere than {0} bytes have them")]
    Layout(u64),
    /// More than this host can address.
    #[error("guest memory: too large for this host")]
    TooLarge(#[from] TryFromIntError),
}

/// The guest-physical ranges of `size` bytes of RAM: start and length.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START { vec![(0, size)] } else { vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)] }
}

/// Allocates and maps `size` bytes of guest RAM.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    let mut mapped = Vec::new();
    for (start, length) in ranges(size) {
        let file = sealed_memfd::create("baton-guest-ram", length)
            .map_err(|source| MemoryError::Memfd { size: length, source })?;
        mapped.push((GuestAddress(start), usize::try_from(length)?, Some(FileOffset::new(file, 0))));
    }
    GuestMemory::from_ranges_with_files(mapped).map_err(MemoryError::Map)
}

/// Maps guest RAM that another process has made: one file for each of [`ranges`], sealed as ours are.
pub fn adopt(size: u64, files: Vec<File>) -> Result<GuestMemory, MemoryError> {
    let ranges = ranges(size);
    if files.len() != ranges.len() {
        return Err(MemoryError::Regions { came: files.len(), needed: ranges.len() });
    }
    let mut mapped = Vec::new();
    for ((start, length), file) in ranges.into_iter().zip(files) {
        let file = sealed_memfd::adopt(file.into(), "a region's file", length)?;
        mapped.push((GuestAddress(start), usize::try_from(length)?, Some(FileOffset::new(file, 0))));
    }
    GuestMemory::from_ranges_with_files(mapped).map_err(MemoryError::Map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn small_ram_is_one_range_from_zero() {
        assert_eq!(ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
    }

    #[test]
    fn large_ram_goes_on_above_the_hole() {
        assert_eq!(ranges(4 << 30), [(0, HOLE_START), (HOLE_END, 1 << 30)]);
        assert_eq!(ranges(HOLE_START + 4096), [(0, HOLE_START), (HOLE_END, 4096)]);
    }

    #[test]
    fn only_what_is_as_our_own_is_adopted() {
        use vm_memory::Bytes;
        let size = 64 << 20;
        let ours = allocate(size).unwrap();
        let file = || ours.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let theirs = adopt(size, vec![file()]).unwrap();
        ours.write_obj(7_u32, GuestAddress(0x1000)).unwrap();
        assert_eq!(theirs.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 7);

        let refused = |size, files| adopt(size, files).unwrap_err();
        assert!(matches!(refused(size, vec![]), MemoryError::Regions { came: 0, needed: 1 }));
        assert!(matches!(refused(size, vec![file(), file()]), MemoryError::Regions { .. }));
        let error = refused(128 << 20, vec![file()]);
        assert!(matches!(error, MemoryError::Adopt(SealedMemfdError::Size { .. })), "{error}");
        let plain = File::open("/proc/self/exe").unwrap();
        let error = refused(size, vec![plain]);
        assert!(matches!(error, MemoryError::Adopt(SealedMemfdError::NotSealed { .. })), "{error}");
    }

    #[test]
    fn the_memfds_cannot_be_resized() {
        let memory = allocate(16 << 20).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), 16 << 20);
        file.set_len(4096).unwrap_err();
        file.set_len(32 << 20).unwrap_err();
    }
}
