//! Guest memory that the front-end shares: an immutable table of mapped regions (vhost-user: "Memory region
//! description").
//!
//! A change of the table creates a new [`GuestMemory`], which shares the mappings of the regions that stay. Users of
//! the old table keep its mappings alive. This is the only place that turns peers' addresses into host pointers.
#![expect(unsafe_code, reason = "turns guest addresses into pointers within a mapping")]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionInfo;

use crate::shared_mapping::{MappingError, SharedMapping};
use crate::sigbus::MAX_REGIONS;
use crate::yielding::yield_if_due;

/// A region as the front-end describes it. Sizes and offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// Guest physical address.
    pub guest_address: u64,
    /// Length.
    pub size: u64,
    /// Address in the front-end's own address space, used for the vrings.
    pub user_address: u64,
    /// Offset of the region's start in the file.
    pub file_offset: u64,
}

/// Why a region was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// An address plus its size overflows.
    #[error("memory region at guest address {0:#x} wraps around")]
    Wraps(u64),
    /// The region shares guest or user addresses with another region.
    #[error("memory region at guest address {0:#x} overlaps another one")]
    Overlaps(u64),
    /// The table has more than [`MAX_REGIONS`] regions.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// The table has no such region.
    #[error("no memory region at guest address {0:#x} has that size and user address")]
    Unknown(u64),
    /// The file cannot be inspected.
    #[error("cannot inspect the file of a memory region")]
    Inspect(#[source] std::io::Error),
    /// The file cannot be mapped.
    #[error("cannot map the memory region at guest address {guest_address:#x}")]
    Mapping {
        /// The region's guest physical address.
        guest_address: u64,
        /// The reason.
        #[source]
        source: MappingError,
    },
}

/// One mapped region.
#[derive(Debug)]
struct Region {
    layout: RegionLayout,
    mapping: SharedMapping,
}

impl Region {
    fn map(layout: RegionLayout, file: File) -> Result<Self, MemoryError> {
        let RegionLayout { guest_address, size, user_address, file_offset } = layout;
        let wraps = || MemoryError::Wraps(guest_address);
        guest_address.checked_add(size).ok_or_else(wraps)?;
        user_address.checked_add(size).ok_or_else(wraps)?;
        let mapping = SharedMapping::new(file, file_offset, size)
            .map_err(|source| MemoryError::Mapping { guest_address, source })?;
        Ok(Self { layout, mapping })
    }

    fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, b: u64| a < b + other.layout.size && b < a + self.layout.size;
        cross(self.layout.guest_address, other.layout.guest_address)
            || cross(self.layout.user_address, other.layout.user_address)
    }

    /// Returns whether the region maps `file`.
    fn is_of(&self, file: &File) -> Result<bool, MemoryError> {
        let own = self.mapping.file().metadata().map_err(MemoryError::Inspect)?;
        let other = file.metadata().map_err(MemoryError::Inspect)?;
        Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
    }

    /// Returns the host pointer at `offset` bytes into the region, and how many bytes follow.
    #[inline]
    fn at(&self, offset: u64) -> Option<(*mut u8, usize)> {
        if offset >= self.layout.size {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: `offset` is less than the mapping's size.
        let pointer = unsafe { self.mapping.start().add(offset) };
        Some((pointer, self.mapping.length() - offset))
    }
}

/// A region in the table.
#[derive(Clone, Debug)]
struct Entry {
    region: Arc<Region>,
    /// How often the region was added: QEMU before 8.0 adds and removes every region once per queue pair.
    count: u32,
}

/// The table of regions, sorted by guest address.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    entries: Vec<Entry>,
}

impl GuestMemory {
    /// Maps a whole table (`SET_MEM_TABLE`).
    ///
    /// # Errors
    /// Returns a [`MemoryError`] if a region is invalid or cannot be mapped. No region stays mapped then.
    pub fn map(regions: impl IntoIterator<Item = (RegionLayout, File)>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (layout, file) in regions {
            memory.insert(Region::map(layout, file)?)?;
        }
        Ok(memory)
    }

    /// Maps a table from the output of [`Self::files`] in another process: layout, count and file of each region.
    ///
    /// # Errors
    /// As for [`Self::map`].
    pub fn map_counted(
        regions: impl IntoIterator<Item = (RegionLayout, u32, File)>,
    ) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (layout, count, file) in regions {
            let place = memory.insert(Region::map(layout, file)?)?;
            memory.entries[place].count = count.max(1);
        }
        Ok(memory)
    }

    /// Returns all regions by guest address: layout, how often the region was added, and file.
    pub fn files(&self) -> impl Iterator<Item = (RegionLayout, u32, &File)> {
        self.entries.iter().map(|entry| (entry.region.layout, entry.count, entry.region.mapping.file()))
    }

    /// Prefaults the pages of `length` bytes at `pointer` for writing. [`Self::resolve`] or [`Self::resolve_user`] must
    /// have returned the pointer.
    pub fn prefault(&self, pointer: *mut u8, length: usize) {
        for Entry { region, .. } in &self.entries {
            region.mapping.prefault(pointer, length);
        }
        yield_if_due();
    }

    /// Returns this table with one more region (`ADD_MEM_REG`). A region with the same layout and file as an existing
    /// one increases its count: it must be removed as often as it was added.
    ///
    /// # Errors
    /// Returns a [`MemoryError`] if the region is invalid or cannot be mapped.
    pub fn with(&self, layout: RegionLayout, file: File) -> Result<Self, MemoryError> {
        let mut memory = self.clone();
        if let Some(entry) = memory.entries.iter_mut().find(|entry| entry.region.layout == layout)
            && entry.region.is_of(&file)?
        {
            entry.count = entry.count.checked_add(1).ok_or(MemoryError::TooMany)?;
        } else {
            memory.insert(Region::map(layout, file)?)?;
        }
        Ok(memory)
    }

    /// Returns this table without the region that has the guest address, user address and size of `layout`
    /// (`REM_MEM_REG`, which ignores the file offset).
    ///
    /// # Errors
    /// Returns [`MemoryError::Unknown`] if there is no such region.
    pub fn without(&self, layout: RegionLayout) -> Result<Self, MemoryError> {
        let same = |entry: &Entry| {
            let own = entry.region.layout;
            (own.guest_address, own.user_address, own.size)
                == (layout.guest_address, layout.user_address, layout.size)
        };
        let mut memory = self.clone();
        let index = memory.entries.iter().position(same).ok_or(MemoryError::Unknown(layout.guest_address))?;
        memory.entries[index].count -= 1;
        if memory.entries[index].count == 0 {
            memory.entries.remove(index);
        }
        Ok(memory)
    }

    fn insert(&mut self, region: Region) -> Result<usize, MemoryError> {
        if self.entries.len() == MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        if self.entries.iter().any(|other| other.region.overlaps(&region)) {
            return Err(MemoryError::Overlaps(region.layout.guest_address));
        }
        let below = |other: &Entry| other.region.layout.guest_address < region.layout.guest_address;
        let place = self.entries.partition_point(below);
        self.entries.insert(place, Entry { region: Arc::new(region), count: 1 });
        Ok(place)
    }

    /// Returns the number of regions.
    pub fn regions(&self) -> usize {
        self.entries.len()
    }

    /// Returns the regions for the kernel's vhost. Their user addresses are those of this process.
    pub fn vhost_regions(&self) -> impl Iterator<Item = VhostUserMemoryRegionInfo> {
        self.entries.iter().map(|Entry { region, .. }| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.layout.guest_address,
            memory_size: region.layout.size,
            userspace_addr: region.mapping.start() as usize as u64,
            ..VhostUserMemoryRegionInfo::default()
        })
    }

    /// Returns whether the table has no regions.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the host pointer of guest address `address`, and how many bytes follow in the same region.
    ///
    /// `hint` is the index of the region to try first. It is set to the index of the region that was found.
    #[inline]
    pub fn resolve(&self, address: u64, hint: &mut usize) -> Option<(*mut u8, usize)> {
        if let Some(Entry { region, .. }) = self.entries.get(*hint)
            && let Some(found) = region.at(address.wrapping_sub(region.layout.guest_address))
        {
            return Some(found);
        }
        let after = self.entries.partition_point(|entry| entry.region.layout.guest_address <= address);
        let index = after.checked_sub(1)?;
        let region = &self.entries[index].region;
        let found = region.at(address - region.layout.guest_address)?;
        *hint = index;
        Some(found)
    }

    /// Returns the guest address of `pointer`, which [`Self::resolve`] has returned.
    pub fn guest_address(&self, pointer: *const u8) -> Option<u64> {
        self.entries.iter().find_map(|Entry { region, .. }| {
            let offset = (pointer as usize).wrapping_sub(region.mapping.start() as usize);
            (offset < region.mapping.length()).then(|| region.layout.guest_address + offset as u64)
        })
    }

    /// Returns the first guest address after all regions, or 0 without regions.
    pub fn end(&self) -> u64 {
        // The regions are sorted and do not overlap.
        self.entries.last().map_or(0, |Entry { region, .. }| region.layout.guest_address + region.layout.size)
    }

    /// Returns the host pointer of the front-end's address `address`, if one region holds `length` bytes from there on.
    pub fn resolve_user(&self, address: u64, length: usize) -> Option<*mut u8> {
        self.entries.iter().find_map(|Entry { region, .. }| {
            let (pointer, rest) = region.at(address.wrapping_sub(region.layout.user_address))?;
            (rest >= length).then_some(pointer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    fn layout(guest_address: u64, user_address: u64) -> RegionLayout {
        RegionLayout { guest_address, size: 0x1000, user_address, file_offset: 0 }
    }

    #[test]
    fn addresses_resolve_only_within_their_region() {
        let memory = GuestMemory::map([
            (layout(0x10_0000, 0x7000_0000), file(0x1000)),
            (layout(0x1000, 0x6000_0000), file(0x1000)),
        ])
        .unwrap();
        let mut hint = 0;
        assert_eq!(memory.resolve(0x1ffe, &mut hint).unwrap().1, 2);
        assert!(memory.resolve(0x2000, &mut hint).is_none());
        assert!(memory.resolve(0xfff, &mut hint).is_none());
        assert_eq!(memory.resolve(0x10_0000, &mut hint).unwrap().1, 0x1000);
        assert_eq!(hint, 1);
        assert!(memory.resolve(u64::MAX, &mut hint).is_none());
        assert_eq!(
            memory.resolve_user(0x7000_0010, 8).unwrap(),
            memory.resolve(0x10_0010, &mut hint).unwrap().0
        );
        assert!(memory.resolve_user(0x7000_0ff9, 8).is_none());
    }

    #[test]
    fn guest_address_inverts_resolve() {
        assert_eq!(GuestMemory::default().end(), 0);
        let memory =
            GuestMemory::map([(layout(0x10_0000, 0), file(0x1000)), (layout(0x1000, 0x1000), file(0x1000))])
                .unwrap();
        assert_eq!(memory.end(), 0x10_1000);
        for address in [0x1000, 0x1fff, 0x10_0000, 0x10_0abc, 0x10_0fff] {
            let (pointer, _) = memory.resolve(address, &mut 0).unwrap();
            assert_eq!(memory.guest_address(pointer), Some(address));
        }
        assert_eq!(memory.guest_address(std::ptr::dangling()), None);
    }

    #[test]
    fn resolved_pointer_reads_data_of_the_file() {
        let mut shared = file(0x1000);
        shared.write_all(b"hello").unwrap();
        let memory = GuestMemory::map([(layout(0, 0x1000), shared)]).unwrap();
        let (pointer, _) = memory.resolve(4, &mut 0).unwrap();
        // SAFETY: `resolve` returned a pointer to at least one byte.
        assert_eq!(unsafe { pointer.read_volatile() }, b'o');
    }

    #[test]
    fn invalid_regions_are_refused() {
        let base = GuestMemory::map([(layout(0x1000, 0x1000), file(0x1000))]).unwrap();
        let refused = |layout, file| base.with(layout, file).unwrap_err();
        assert!(matches!(refused(layout(0x1800, 0x9000), file(0x1000)), MemoryError::Overlaps(0x1800)));
        assert!(matches!(refused(layout(0x8000, 0x1fff), file(0x1000)), MemoryError::Overlaps(_)));
        assert!(matches!(refused(layout(u64::MAX, 0), file(0x1000)), MemoryError::Wraps(_)));
        let unmappable = |layout, size| match refused(layout, file(size)) {
            MemoryError::Mapping { guest_address: 0x8000, source } => source,
            other => panic!("{other}"),
        };
        let short = unmappable(layout(0x8000, 0x8000), 0xfff);
        assert!(matches!(short, MappingError::BeyondFile { needed: 0x1000, size: 0xfff }));
        let empty = RegionLayout { size: 0, ..layout(0x8000, 0x8000) };
        assert!(matches!(unmappable(empty, 0x1000), MappingError::Size { .. }));
        let unaligned = RegionLayout { file_offset: 1, ..layout(0x8000, 0x8000) };
        assert!(matches!(unmappable(unaligned, 0x2000), MappingError::Map(_)));
        assert!(matches!(base.without(layout(0x1000, 0x2000)), Err(MemoryError::Unknown(0x1000))));
        assert!(base.without(layout(0x1000, 0x1000)).unwrap().is_empty());
        // The same layout, but another file.
        assert!(matches!(refused(layout(0x1000, 0x1000), file(0x1000)), MemoryError::Overlaps(_)));
    }

    #[test]
    fn table_mapped_from_files_of_another_is_equal() {
        let shared = file(0x3000);
        let regions = [
            (
                RegionLayout { file_offset: 0x1000, ..layout(0x10_0000, 0x7000_0000) },
                shared.try_clone().unwrap(),
            ),
            (layout(0x1000, 0x6000_0000), shared.try_clone().unwrap()),
        ];
        let memory = GuestMemory::map(regions).unwrap();
        let memory = memory.with(layout(0x1000, 0x6000_0000), shared).unwrap();
        let files = memory.files().map(|(layout, count, file)| (layout, count, file.try_clone().unwrap()));
        let again = GuestMemory::map_counted(files).unwrap();
        let plain = |memory: &GuestMemory| -> Vec<_> {
            memory.files().map(|(layout, count, _)| (layout, count)).collect()
        };
        assert_eq!(plain(&again), plain(&memory));
        let (ours, theirs) = (0x10_0123, 0x7000_0123);
        let (pointer, _) = memory.resolve(ours, &mut 0).unwrap();
        // SAFETY: `resolve` returned a pointer to at least one byte.
        unsafe { pointer.write_volatile(7) };
        let pointer = again.resolve_user(theirs, 1).unwrap();
        again.prefault(pointer, 0x10);
        // SAFETY: as above.
        assert_eq!(unsafe { pointer.read_volatile() }, 7);
    }

    #[test]
    fn region_is_unmapped_when_removed_as_often_as_added() {
        let shared = file(0x1000);
        let again = shared.try_clone().unwrap();
        let once = GuestMemory::map([(layout(0, 0), shared)]).unwrap();
        let twice = once.with(layout(0, 0), again).unwrap();
        let once = twice.without(layout(0, 0)).unwrap();
        assert!(!once.is_empty());
        assert!(once.without(layout(0, 0)).unwrap().is_empty());
    }
}
