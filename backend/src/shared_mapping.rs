//! A part of a front-end's file, mapped for reading and writing: guest memory, the log of changed pages, the
//! inflight region. Every mapping is known to [`crate::sigbus`], so a file that its owner truncates costs the
//! session, not the process.
#![expect(unsafe_code, reason = "a mapping may be shared by threads, and is made ready for use")]

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
    /// No bytes, or more than there are addresses.
    #[error("{size} bytes at offset {offset:#x} of a file cannot be mapped")]
    Size {
        /// Offset in the file.
        offset: u64,
        /// Length.
        size: u64,
    },
    /// The file ends before.
    #[error("{needed} bytes are needed of a file that has {size}")]
    BeyondFile {
        /// Offset plus length.
        needed: u64,
        /// Length of the file.
        size: u64,
    },
    /// More mappings than are ever needed.
    #[error("too many mappings")]
    TooMany,
    /// The file cannot be inspected.
    #[error("cannot inspect the file")]
    Inspect(#[source] std::io::Error),
    /// The system would not.
    #[error("cannot map the file")]
    Map(#[source] MmapRegionError),
}

/// A mapped part of a file, with the file.
#[derive(Debug)]
pub struct SharedMapping {
    start: *mut u8,
    // Declared before the mapping: the watch ends before the address range can be used for something else.
    _watch: sigbus::Watch,
    /// Whole pages of the file: `length` may end within its last one.
    _mapping: MmapRegion,
    length: usize,
    file: Arc<File>,
    offset: u64,
}

// SAFETY: the pointer is into `_mapping`, which lives as long as this and may be used from any thread.
unsafe impl Send for SharedMapping {}
// SAFETY: as above; all access to what it points to is volatile, atomic or done by the kernel.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// [`MappingError`]; nothing stays mapped then.
    pub fn new(file: File, offset: u64, size: u64) -> Result<Self, MappingError> {
        let impossible = || MappingError::Size { offset, size };
        let needed = offset.checked_add(size).ok_or_else(impossible)?;
        let length = usize::try_from(size).map_err(|_| impossible())?;
        if length == 0 || isize::try_from(length).is_err() {
            return Err(impossible());
        }
        let metadata = file.metadata().map_err(MappingError::Inspect)?;
        // A device (persistent memory, say) has no length of its own; its driver checks the range.
        if !metadata.file_type().is_char_device() && metadata.size() < needed {
            return Err(MappingError::BeyondFile { needed, size: metadata.size() });
        }
        // For huge pages the kernel rounds the length of a new mapping up, but neither replaces nor removes a part of
        // such a page (mmap(2), "Huge page (Huge TLB) mappings").
        let whole = length.checked_next_multiple_of(page_size(&file)?).ok_or_else(impossible)?;
        let file = Arc::new(file);
        let place = FileOffset::from_arc(Arc::clone(&file), offset);
        let mapping = MmapRegion::from_file(place, whole).map_err(MappingError::Map)?;
        let start = mapping.as_ptr();
        let watch = sigbus::Watch::new(start as usize, whole).ok_or(MappingError::TooMany)?;
        Ok(Self { start, _watch: watch, _mapping: mapping, length, file, offset })
    }

    /// Where the mapping begins.
    #[inline]
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// How many bytes were asked for.
    #[inline]
    pub fn length(&self) -> usize {
        self.length
    }

    /// What is mapped.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where in the file the mapping begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Has the pages of `length` bytes at `start` there for writing, which does not change them: the first touch of a
    /// page takes time. Does nothing where that is not possible, and for what is not all of this mapping.
    pub fn prefault(&self, start: *mut u8, length: usize) {
        let offset = (start as usize).wrapping_sub(self.start as usize);
        if offset.checked_add(length).is_none_or(|end| end > self.length()) {
            return;
        }
        let first = offset & !(PAGE - 1);
        // SAFETY: within the mapping, as was checked.
        let page = unsafe { self.start.add(first) };
        // SAFETY: pages of our own mapping, whose contents stay; a file that ends before is an error, not a signal.
        unsafe { libc::madvise(page.cast(), offset + length - first, libc::MADV_POPULATE_WRITE) };
    }
}

/// The size of the pages that a mapping of `file` consists of; 1 where the kernel rounds by itself.
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

    /// A few huge pages, reserved for a test if the machine has none.
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

    /// How many mappings of `file` this process has.
    fn mappings(file: &File) -> usize {
        let inode = format!(" {} ", file.metadata().unwrap().ino());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(&inode) && line.contains("huge")).count()
    }

    #[test]
    fn parts_of_huge_pages_are_unmapped_and_survive_a_truncated_file() {
        let Some((_pages, file)) = HugePages::reserve().and_then(|pages| Some((pages, HugePages::file(2)?)))
        else {
            eprintln!("left out: this machine gives no huge pages");
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
            assert_eq!(mappings(&file), 0, "{size:#x} bytes stay mapped");
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
