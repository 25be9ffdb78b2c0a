//! A part of a front-end's file, mapped for reading and writing: guest memory, the log of changed pages, the
//! inflight region. Every mapping is known to [`crate::sigbus`], so a file that its owner truncates costs the
//! session, not the process.
#![expect(unsafe_code, reason = "a mapping may be shared by threads, and is made ready for use")]

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

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
    mapping: MmapRegion,
    file: Arc<File>,
    offset: u64,
}

// SAFETY: the pointer is into `mapping`, which lives as long as this and may be used from any thread.
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
        let file = Arc::new(file);
        let place = FileOffset::from_arc(Arc::clone(&file), offset);
        let mapping = MmapRegion::from_file(place, length).map_err(MappingError::Map)?;
        let start = mapping.as_ptr();
        let watch = sigbus::Watch::new(start as usize, length).ok_or(MappingError::TooMany)?;
        Ok(Self { start, _watch: watch, mapping, file, offset })
    }

    /// Where the mapping begins.
    #[inline]
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// How many bytes are mapped.
    #[inline]
    pub fn length(&self) -> usize {
        self.mapping.size()
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
