//! Size and addresses of a vring's three rings, and their checks (virtio 1.2 §2.7).

use crate::memory::GuestMemory;

/// The largest split virtqueue (virtio 1.2 §2.7).
pub const MAX_SIZE: u16 = 32768;

/// Offset of the elements in the used ring. Each has 8 bytes; the event index follows them.
pub(super) const USED_ELEMENTS: usize = 4;

/// The addresses of the three rings, in the front-end's address space (`SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, 16-byte aligned.
    pub descriptors: u64,
    /// Available ring, 2-byte aligned.
    pub available: u64,
    /// Used ring, 4-byte aligned.
    pub used: u64,
}

/// Why a vring cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a power of two from 1 to [`MAX_SIZE`].
    #[error("vring size {0} is not a power of two up to {MAX_SIZE}")]
    Size(u32),
    /// A ring's address is not aligned as virtio 1.2 §2.7 requires.
    #[error("{ring} ring at {address:#x} is not aligned")]
    Alignment {
        /// Which of the three.
        ring: &'static str,
        /// The address that the front-end gave.
        address: u64,
    },
    /// A ring does not lie within one shared memory region.
    #[error("{ring} ring at {address:#x} is not in shared memory")]
    Unmapped {
        /// Which of the three.
        ring: &'static str,
        /// The address that the front-end gave.
        address: u64,
    },
}

/// Checks a vring size that a peer gave.
///
/// # Errors
/// Returns [`LayoutError::Size`] if it is not a power of two from 1 to [`MAX_SIZE`].
pub fn check_size(size: u32) -> Result<u16, LayoutError> {
    u16::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && *size <= MAX_SIZE)
        .ok_or(LayoutError::Size(size))
}

/// What is needed to map a [`Vring`](super::Vring).
#[derive(Clone, Copy, Debug)]
pub struct VringLayout {
    /// Number of descriptors, checked by [`check_size`].
    pub size: u16,
    /// The addresses of the rings.
    pub addresses: RingAddresses,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// Returns the length of an available ring in bytes, event index included.
pub(super) fn available_length(size: usize) -> usize {
    6 + 2 * size
}

/// Returns the length of a used ring in bytes, event index included.
pub(super) fn used_length(size: usize) -> usize {
    USED_ELEMENTS + 8 * size + 2
}

/// Returns a pointer to a ring in this process.
pub(super) fn locate(
    memory: &GuestMemory,
    ring: &'static str,
    address: u64,
    alignment: u64,
    length: usize,
) -> Result<*mut u8, LayoutError> {
    if !address.is_multiple_of(alignment) {
        return Err(LayoutError::Alignment { ring, address });
    }
    memory
        .resolve_user(address, length)
        // The mapping here may have another alignment than the front-end's.
        .filter(|pointer| (*pointer as usize as u64).is_multiple_of(alignment))
        .ok_or(LayoutError::Unmapped { ring, address })
}
