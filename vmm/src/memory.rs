//! Guest RAM: where it lies in the guest's physical address space, and the sealed memfds that hold it.
//!
//! RAM fills the space below the 32-bit hole first and continues at 4 GiB. Each of the two regions is one memfd whose
//! size is sealed, so a truncation can never kill a process that maps it (the back-end).

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

/// Why guest RAM cannot be allocated or adopted.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel refused a memfd of this size.
    #[error("cannot create a memfd of {size} bytes for guest memory")]
    Memfd {
        /// The requested size.
        size: u64,
        /// The error of the system call.
        #[source]
        source: std::io::Error,
    },
    /// A region cannot be mapped.
    #[error("cannot map guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// The number of regions does not match the amount of memory.
    #[error("{received} guest memory regions received instead of {needed}")]
    Regions {
        /// The number of files received.
        received: usize,
        /// The number of regions needed.
        needed: usize,
    },
    /// A file that is too long or too short, or whose size could change under the guest.
    #[error("cannot use the received guest memory")]
    Adopt(#[from] SealedMemfdError),
    /// Regions that differ from [`ranges`].
    #[error("the received guest memory regions do not match the layout of {0} bytes")]
    Layout(u64),
    /// More than this host can address.
    #[error("guest memory is too large for this host")]
    TooLarge(#[from] TryFromIntError),
}

/// Returns the guest-physical ranges of `size` bytes of RAM: start and length.
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

/// Maps guest RAM that another process created: one file for each of [`ranges`], sealed as in [`allocate`].
pub fn adopt(size: u64, files: Vec<File>) -> Result<GuestMemory, MemoryError> {
    let ranges = ranges(size);
    if files.len() != ranges.len() {
        return Err(MemoryError::Regions { received: files.len(), needed: ranges.len() });
    }
    let mut mapped = Vec::new();
    for ((start, length), file) in ranges.into_iter().zip(files) {
        let file = sealed_memfd::adopt(file.into(), "a region's memfd", length)?;
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
    fn large_ram_continues_above_the_hole() {
        assert_eq!(ranges(4 << 30), [(0, HOLE_START), (HOLE_END, 1 << 30)]);
        assert_eq!(ranges(HOLE_START + 4096), [(0, HOLE_START), (HOLE_END, 4096)]);
    }

    #[test]
    fn adopt_checks_number_size_and_seals_of_files() {
        use vm_memory::Bytes;
        let size = 64 << 20;
        let ours = allocate(size).unwrap();
        let file = || ours.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let theirs = adopt(size, vec![file()]).unwrap();
        ours.write_obj(7_u32, GuestAddress(0x1000)).unwrap();
        assert_eq!(theirs.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 7);

        let refused = |size, files| adopt(size, files).unwrap_err();
        assert!(matches!(refused(size, vec![]), MemoryError::Regions { received: 0, needed: 1 }));
        assert!(matches!(refused(size, vec![file(), file()]), MemoryError::Regions { .. }));
        let error = refused(128 << 20, vec![file()]);
        assert!(matches!(error, MemoryError::Adopt(SealedMemfdError::Size { .. })), "{error}");
        let plain = File::open("/proc/self/exe").unwrap();
        let error = refused(size, vec![plain]);
        assert!(matches!(error, MemoryError::Adopt(SealedMemfdError::NotSealed { .. })), "{error}");
    }

    #[test]
    fn memfds_cannot_be_resized() {
        let memory = allocate(16 << 20).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), 16 << 20);
        file.set_len(4096).unwrap_err();
        file.set_len(32 << 20).unwrap_err();
    }
}
