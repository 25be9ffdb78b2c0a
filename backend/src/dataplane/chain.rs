//! Turns descriptor chains into I/O vectors for `readv` and `writev` (virtio 1.2 §§2.7.5, 2.7.7). Every buffer is
//! checked against guest memory.
#![expect(unsafe_code, reason = "reads indirect tables from guest memory")]

use crate::memory::GuestMemory;
use crate::vring::{Descriptor, MAX_SIZE, Vring};

/// `VIRTQ_DESC_F_NEXT`.
const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
const INDIRECT: u16 = 4;

/// The most vectors that one system call accepts (`IOV_MAX`).
pub const MAX_VECTORS: usize = 1024;

/// The most descriptors in a chain, and the most vectors that a chain turns into: the size of the largest ring (virtio
/// 1.3 §2.7.5.3.1: no chain is longer than the queue). A buffer is one vector, unless it spans memory regions.
pub const MAX_CHAIN: usize = MAX_SIZE as usize;

/// How many bytes of a ring's buffers are prefaulted: enough for 1024 buffers of 4 KiB.
const PREFAULT: usize = 4 << 20;

/// The size of a page.
const PAGE: usize = 0x1000;

/// The direction of the guest's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them.
    Readable,
    /// The device writes them.
    Writable,
}

/// Why a chain is unusable. This is a driver error, and the back-end drops only that chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain has more descriptors than the table.
    #[error("descriptor chain loops")]
    Loop,
    /// `next` is beyond the end of the table.
    #[error("descriptor index is beyond the end of the table")]
    Next,
    /// A readable buffer in a receive chain, or a writable one in a transmit chain.
    #[error("descriptor has the wrong direction")]
    Direction,
    /// A nested indirect table, one with `VIRTQ_DESC_F_NEXT`, one of a bad size, or one without negotiation.
    #[error("invalid indirect descriptor")]
    Indirect,
    /// The buffer is not in guest memory.
    #[error("buffer is outside guest memory")]
    Address,
    /// The chain has more than [`MAX_CHAIN`] pieces, or 4 GiB or more.
    #[error("descriptor chain is too long")]
    TooLong,
}

/// A growing list of I/O vectors, each of which points into guest memory or into a buffer that the list's owner keeps.
#[derive(Debug, Default)]
pub struct Vectors(pub Vec<libc::iovec>);

// SAFETY: an iovec is a plain pointer and a length; the owner of the list keeps the memory that it points to.
unsafe impl Send for Vectors {}

impl Vectors {
    /// Touches the memory for as many vectors as one system call accepts. The list must be empty.
    pub fn prefault(&mut self) {
        self.0.resize(MAX_VECTORS, libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        self.0.clear();
    }
}

/// Appends the buffers of the chain that begins at `head` to `vectors` and returns their total length in bytes.
/// Skips empty buffers. `hint` is the region to try first, as in [`GuestMemory::resolve`].
///
/// # Errors
/// Returns a [`ChainError`] if the chain is malformed, and leaves `vectors` unchanged.
#[inline]
pub fn append(
    vring: &Vring,
    head: u16,
    direction: Direction,
    hint: &mut usize,
    vectors: &mut Vectors,
) -> Result<u32, ChainError> {
    let before = vectors.0.len();
    let mut walk = Walk { memory: vring.memory(), direction, hint, vectors, before, length: 0 };
    let result = walk.run(vring, head);
    let length = walk.length;
    if let Err(error) = result {
        vectors.0.truncate(before);
        return Err(error);
    }
    Ok(length)
}

/// Prefaults the buffers that a ring's descriptor table points to, up to 4 MiB. The driver may change the table
/// meanwhile: this is only an optimisation.
pub fn prefault(vring: &Vring) {
    let memory = vring.memory();
    let (mut hint, mut left) = (0, PREFAULT);
    let mut pieces = Vec::with_capacity(usize::from(vring.size()));
    for index in 0..vring.size() {
        let Some(Descriptor { address, length, .. }) = vring.descriptor(index) else { break };
        if let Some((pointer, rest)) = memory.resolve(address, &mut hint) {
            let length = rest.min(length as usize).min(left);
            left -= length;
            pieces.push((pointer as usize, length, pointer));
        }
    }
    pieces.sort_unstable();
    // Merge adjacent pieces: each piece costs a system call.
    pieces.dedup_by(|next, piece| {
        let touch = next.0 <= (piece.0 + piece.1).next_multiple_of(PAGE);
        if touch {
            piece.1 = piece.1.max(next.0 + next.1 - piece.0);
        }
        touch
    });
    for (_, length, pointer) in pieces.into_iter().filter(|(_, length, _)| *length > 0) {
        memory.prefault(pointer, length);
    }
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    direction: Direction,
    hint: &'a mut usize,
    vectors: &'a mut Vectors,
    before: usize,
    length: u32,
}

impl Walk<'_> {
    fn run(&mut self, vring: &Vring, head: u16) -> Result<(), ChainError> {
        let mut index = head;
        for _ in 0..vring.size() {
            let descriptor = vring.descriptor(index).ok_or(ChainError::Next)?;
            if descriptor.flags & INDIRECT != 0 {
                if !vring.indirect() || descriptor.flags & NEXT != 0 {
                    return Err(ChainError::Indirect);
                }
                return self.table(descriptor);
            }
            self.buffer(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ChainError::Loop)
    }

    fn table(&mut self, table: Descriptor) -> Result<(), ChainError> {
        let count = table.length / 16;
        if count == 0 || !table.length.is_multiple_of(16) {
            return Err(ChainError::Indirect);
        }
        let mut index = 0;
        for _ in 0..count.min(u32::from(MAX_SIZE)) {
            let descriptor = self.load(table.address, index)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            self.buffer(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next);
            if index >= count {
                return Err(ChainError::Next);
            }
        }
        Err(ChainError::Loop)
    }

    /// Reads descriptor `index` of the indirect table at `table`. A descriptor may span memory regions.
    fn load(&mut self, table: u64, index: u32) -> Result<Descriptor, ChainError> {
        let address = table.checked_add(16 * u64::from(index)).ok_or(ChainError::Address)?;
        let (pointer, rest) = self.memory.resolve(address, self.hint).ok_or(ChainError::Address)?;
        let pointer = pointer.cast::<Descriptor>();
        if rest >= 16 && pointer.is_aligned() {
            // SAFETY: 16 bytes of guest memory, aligned; every bit pattern is a valid descriptor.
            return Ok(unsafe { pointer.read_volatile() });
        }
        let mut bytes = [0u8; 16];
        for (offset, byte) in (0u64..).zip(&mut bytes) {
            let address = address.checked_add(offset).ok_or(ChainError::Address)?;
            let (pointer, _) = self.memory.resolve(address, self.hint).ok_or(ChainError::Address)?;
            // SAFETY: `resolve` returns a pointer to at least one byte.
            *byte = unsafe { pointer.read_volatile() };
        }
        // SAFETY: 16 bytes; every bit pattern is a valid descriptor; the read allows any alignment.
        Ok(unsafe { bytes.as_ptr().cast::<Descriptor>().read_unaligned() })
    }

    #[inline]
    fn buffer(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let writable = descriptor.flags & WRITE != 0;
        if writable != (self.direction == Direction::Writable) {
            return Err(ChainError::Direction);
        }
        self.length = self.length.checked_add(descriptor.length).ok_or(ChainError::TooLong)?;
        let mut address = descriptor.address;
        let mut rest = descriptor.length as usize;
        while rest > 0 {
            let (pointer, contiguous) = self.memory.resolve(address, self.hint).ok_or(ChainError::Address)?;
            let length = rest.min(contiguous);
            if self.vectors.0.len() - self.before == MAX_CHAIN {
                return Err(ChainError::TooLong);
            }
            self.vectors.0.push(libc::iovec { iov_base: pointer.cast(), iov_len: length });
            rest -= length;
            // Only the last region can end at the top of the address space, and nothing follows it.
            address = address.wrapping_add(length as u64);
        }
        Ok(())
    }
}
