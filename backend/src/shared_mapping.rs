//! A part of a front-end's file, mapped for reading and writing: guest memory, the log of changed pages, the inflight
//! region. [`crate::sigbus`] watches every mapping, so a file that its owner truncates ends the session, not the
//! process.
#![expect(unsafe_code, reason = "a mapping may be shared by threads, and is prefaulted")]

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use crate::sigbus;

/// The size of a page.
const PAGE: usize = 0x1000;

/// Why a part of a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The length is 0 or too large.
    #[error("cannot map {size} bytes at offset {offset:#x} of a file")]
    Size {
        /// Offset in the file.
        offset: u64,
        /// Length.
        size: u64,
    },
    /// The file is too short.
    #[error("file has {size} bytes, but {needed} are needed")]
    BeyondFile {
        /// Offset plus length.
        needed: u64,
        /// Length of the file.
        size: u64,
    },
    /// No slot is left to watch the mapping.
    #[error("too many mappings")]
    TooMany,
    /// The file cannot be inspected.
    #[error("cannot inspect the file")]
    Inspect(#[source] std::io::Error),
    /// The kernel refuses the mapping.
    #[error("cannot map the file")]
    Map(#[source] MmapRegionError),
}

/// A mapped part of a file, with the file.
#[derive(Debug)]
pub struct SharedMapping {
    start: *mut u8,
    // Declared before the mapping, so that the watch ends before the address range can be reused.
    _watch: sigbus::Watch,
    /// Whole pages of the file. `length` may end within the last one.
    _mapping: MmapRegion,
    length: usize,
    file: Arc<File>,
    offset: u64,
}

// SAFETY: the pointer is into `_mapping`, which lives as long as this and may be used from any thread.
unsafe impl Send for SharedMapping {}
// SAFETY: as above; all accesses to the memory are volatile, atomic or done by the kernel.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// Returns a [`MappingError`] if the file is too short or cannot be mapped.
    pub fn new(file: File, offset: u64, size: u64) -> Result<Self, MappingError> {
        let impossible = || MappingError::Size { offset, size };
        let needed = offset.checked_add(size).ok_or_else(impossible)?;
        let length = usize::try_from(size).map_err(|_| impossible())?;
        if length == 0 || isize::try_from(length).is_err() {
            return Err(impossible());
        }
        let metadata = file.metadata().map_err(MappingError::Inspect)?;
        // A device, such as persistent memory, has no file length. Its driver checks the range.
        if !metadata.file_type().is_char_device() && metadata.size() < needed {
            return Err(MappingError::BeyondFile { needed, size: metadata.size() });
        }
        // For huge pages the kernel rounds up the length of a new mapping, but it cannot replace or unmap a part of a
        // huge page (mmap(2), "Huge page (Huge TLB) mappings").
        let whole = length.checked_next_multiple_of(page_size(&file)?).ok_or_else(impossible)?;
        let file = Arc::new(file);
        let place = FileOffset::from_arc(Arc::clone(&file), offset);
        let mapping = MmapRegion::from_file(place, whole).map_err(MappingError::Map)?;
        let start = mapping.as_ptr();
        let watch = sigbus::Watch::new(start as usize, whole).ok_or(MappingError::TooMany)?;
        Ok(Self { start, _watch: watch, _mapping: mapping, length, file, offset })
    }

    /// Returns the start of the mapping.
    #[inline]
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Returns the requested length in bytes.
    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Returns the mapped file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the offset of the mapping in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Prefaults the pages of `length` bytes at `start` for writing, without changing them. Does nothing if the kernel
    /// does not support that, or if the range is not within this mapping.
    pub fn prefault(&self, start: *mut u8, length: usize) {
        let offset = (start as usize).wrapping_sub(self.start as usize);
        if offset.checked_add(length).is_none_or(|end| end > self.length()) {
            return;
        }
        let first = offset & !(PAGE - 1);
        // SAFETY: within the mapping, as checked above.
        let page = unsafe { self.start.add(first) };
        // SAFETY: pages of our own mapping, whose contents stay. A truncated file causes an error, not a signal.
        unsafe { libc::madvise(page.cast(), offset + length - first, libc::MADV_POPULATE_WRITE) };
    }
}

/// Returns the granularity for the length of a mapping of `file`: the huge page size, or 1 if the kernel rounds the
/// length itself.
fn page_size(file: &File) -> Result<usize, MappingError> {
    let filesystem = fstatfs(file).map_err(|errno| MappingError::Inspect(errno.into()))?;
    if filesystem.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(1);
    }
    let size = usize::try_from(filesystem.block_size()).unwrap_or_default();
    Ok(size.max(PAGE))
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const HUGE: u64 = 2 << 20;
    const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

    /// At least 8 huge pages, which a test reserves if the machine has fewer.
    struct HugePages(Option<String>);

    impl HugePages {
        fn reserve() -> Option<Self> {
            let before = std::fs::read_to_string(HUGE_PAGES).ok()?;
            let before = before.trim().to_owned();
            if before.parse::<u64>().ok()? >= 8 {
                return Some(Self(None));
            }
            std::fs::write(HUGE_PAGES, "8").ok()?;
            let reserved = Self(Some(before));
            let now = std::fs::read_to_string(HUGE_PAGES).ok()?;
            (now.trim().parse::<u64>().ok()? >= 8).then_some(reserved)
        }

        fn file(pages: u64) -> Option<File> {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
            let file = File::from(memfd_create("huge", flags).ok()?);
            file.set_len(pages * HUGE).ok()?;
            Some(file)
        }
    }

    impl Drop for HugePages {
        fn drop(&mut self) {
            if let Some(before) = &self.0 {
                let _ = std::fs::write(HUGE_PAGES, before);
            }
        }
    }

    /// Returns how many mappings of `file` this process has.
    fn mappings(file: &File) -> usize {
        let inode = format!(" {} ", file.metadata().unwrap().ino());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(&inode) && line.contains("huge")).count()
    }

    #[test]
    fn partial_huge_page_mappings_are_unmapped_and_survive_truncation() {
        let Some((_pages, file)) = HugePages::reserve().and_then(|pages| Some((pages, HugePages::file(2)?)))
        else {
            eprintln!("skipped: no huge pages on this machine");
            return;
        };
        sigbus::install().unwrap();
        for size in [HUGE + 0x1000, HUGE - 0x1000, 2 * HUGE, 0x1000] {
            for _ in 0..500 {
                let mapping = SharedMapping::new(file.try_clone().unwrap(), 0, size).unwrap();
                assert_eq!(mapping.length() as u64, size);
                assert_eq!(mappings(&file), 1);
                drop(mapping);
            }
            assert_eq!(mappings(&file), 0, "mapping of {size:#x} bytes was not unmapped");
        }
        let mapping = SharedMapping::new(file.try_clone().unwrap(), 0, HUGE + 0x1000).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: within the mapping.
        let place = unsafe { mapping.start().add(0x2000) };
        // SAFETY: within the mapping, which is replaced when this faults.
        let byte = unsafe { place.read_volatile() };
        assert_eq!(byte, 0);
        assert!(sigbus::take_truncation());
        drop(mapping);
        assert_eq!(mappings(&file), 0);
    }
}
