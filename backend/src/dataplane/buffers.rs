//! The guest's receive buffers: chains of the receive ring, turned into I/O vectors before a frame arrives.
//!
//! [`Buffers`] holds chains in the order of the ring, from the next available one on. The next frame goes into the
//! first of them. Offsets count bytes from the start of the first chain.
#![expect(unsafe_code, reason = "reads and writes bytes of guest memory")]

use super::BATCH;
use super::chain::{self, Direction, MAX_VECTORS, Vectors};
use crate::vring::{RingError, Vring};

/// A chain that a frame can be read into.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// Index of its first vector.
    pub first: usize,
    /// Index after its last vector.
    pub end: usize,
    /// Length in bytes; 0 for an unusable chain, which has no vectors.
    pub length: u32,
}

/// A number of chains, counted from the first of [`Buffers`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// Number of chains.
    pub chains: usize,
    /// Their length in bytes.
    pub bytes: usize,
    /// The guest has made no more available, and kicks are enabled.
    pub all: bool,
}

/// Which chains are usable.
#[derive(Clone, Copy, Debug)]
pub struct Usable {
    /// Length of the virtio-net header.
    pub header: usize,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub mergeable: bool,
}

impl Usable {
    /// Returns whether a chain of `length` bytes is usable. With mergeable buffers, one as long as the header is legal
    /// (virtio 1.3 §5.1.6.3.1). Without, it can hold no frame.
    fn accepts(self, length: u32) -> bool {
        let length = length as usize;
        length > self.header || (self.mergeable && length == self.header)
    }
}

/// Receive buffers, in the order of the ring.
#[derive(Debug, Default)]
pub struct Buffers {
    /// The chains before `next` are consumed.
    chains: Vec<Buffer>,
    next: usize,
    vectors: Vectors,
    hint: usize,
}

impl Buffers {
    /// Forgets all chains, which the ring still counts as available.
    pub fn clear(&mut self) {
        self.chains.clear();
        self.vectors.0.clear();
        self.next = 0;
        self.hint = 0;
    }

    /// Touches the memory that the first frames need. Must be called without chains.
    pub fn prefault(&mut self) {
        self.vectors.prefault();
        let unused = Buffer { head: 0, first: 0, end: 0, length: 0 };
        self.chains.resize(5 * usize::from(BATCH), unused);
        self.chains.clear();
    }

    /// Returns the first chain.
    #[inline]
    pub fn front(&self) -> Option<Buffer> {
        self.chains.get(self.next).copied()
    }

    /// Returns all chains, from the first one on.
    #[inline]
    pub fn chains(&self) -> &[Buffer] {
        &self.chains[self.next..]
    }

    /// Drops the first `count` chains.
    #[inline]
    pub fn consume(&mut self, count: usize) {
        self.next += count;
    }

    /// Returns the vectors in `range`, in indices as in [`Buffer`].
    #[inline]
    pub fn vectors(&self, range: std::ops::Range<usize>) -> &[libc::iovec] {
        &self.vectors.0[range]
    }

    /// Calls `action` with the vectors in `range` and, behind them, `spill`.
    #[inline]
    pub fn with_spill<T>(
        &mut self,
        range: std::ops::Range<usize>,
        spill: libc::iovec,
        action: impl FnOnce(&[libc::iovec]) -> T,
    ) -> T {
        let std::ops::Range { start, end } = range;
        // If the next chain's first vector is at `end`, `spill` replaces it during the call.
        let behind = self.vectors.0.get_mut(end).map(|place| std::mem::replace(place, spill));
        if behind.is_none() {
            self.vectors.0.push(spill);
        }
        let result = action(&self.vectors.0[start..=end]);
        match behind {
            Some(behind) => self.vectors.0[end] = behind,
            None => self.vectors.0.truncate(end),
        }
        result
    }

    /// Appends the `count` next available chains of `vring`, at most a batch.
    ///
    /// # Errors
    /// Returns an error if the head of the first of them is invalid. An invalid later one ends the batch.
    pub fn append(&mut self, vring: &Vring, count: u16, usable: Usable) -> Result<(), RingError> {
        let taken = self.taken();
        let before = self.vectors.0.len();
        for nth in 0..count.min(BATCH) {
            let head = match vring.head(taken + nth) {
                Ok(head) => head,
                Err(_) if nth > 0 => break,
                Err(error) => return Err(error),
            };
            let first = self.vectors.0.len();
            let appended = chain::append(vring, head, Direction::Writable, &mut self.hint, &mut self.vectors);
            let length = match appended {
                Ok(length) if usable.accepts(length) => length,
                other => {
                    tracing::debug!(?other, "receive chain unusable");
                    self.vectors.0.truncate(first);
                    0
                }
            };
            self.chains.push(Buffer { head, first, end: self.vectors.0.len(), length });
            if self.vectors.0.len() - before >= MAX_VECTORS {
                break;
            }
        }
        Ok(())
    }

    /// Returns the number of chains.
    pub fn taken(&self) -> u16 {
        u16::try_from(self.chains.len() - self.next).unwrap_or(u16::MAX)
    }

    /// Removes the consumed chains, if they are all or many.
    pub fn compact(&mut self) {
        if self.next == self.chains.len() {
            self.chains.clear();
            self.vectors.0.clear();
            self.next = 0;
            return;
        }
        let used = self.chains[self.next].first;
        if self.next >= 4 * usize::from(BATCH) || used >= 8 * MAX_VECTORS {
            self.vectors.0.drain(..used);
            self.chains.drain(..self.next);
            for chain in &mut self.chains {
                chain.first -= used;
                chain.end -= used;
            }
            self.next = 0;
        }
    }

    /// Adds chains to `room` until it has `wanted` bytes. Adds one chain without `mergeable` buffers, and no further
    /// chain if all together would have `most` vectors. Returns false if the chains do not suffice.
    #[inline]
    pub fn fill(&self, room: &mut Room, wanted: usize, most: usize, mergeable: bool) -> bool {
        while let Some(chain) = self.chains.get(self.next + room.chains) {
            let vectors = chain.end - self.chains[self.next].first;
            if room.chains > 0 && vectors >= most {
                return true;
            }
            // An unusable chain between others holds no byte of the frame. It is completed in its place, with length 0,
            // to keep the order of the ring.
            room.chains += 1;
            room.bytes += chain.length as usize;
            if room.bytes >= wanted || !mergeable {
                return true;
            }
        }
        false
    }

    /// Returns the index of the vector that contains byte `offset`, and the offset in that vector.
    #[inline]
    fn place(&self, mut offset: usize) -> (usize, usize) {
        let mut vector = self.chains[self.next].first;
        while offset >= self.vectors.0[vector].iov_len {
            offset -= self.vectors.0[vector].iov_len;
            vector += 1;
        }
        (vector, offset)
    }

    #[inline]
    fn pointer(&self, offset: usize) -> *mut u8 {
        let (vector, offset) = self.place(offset);
        // SAFETY: `place` returns an offset within the vector.
        unsafe { self.vectors.0[vector].iov_base.cast::<u8>().add(offset) }
    }

    /// Returns the byte at `offset`.
    #[inline]
    pub fn byte(&self, offset: usize) -> u8 {
        // SAFETY: the pointer is into guest memory that the ring's memory table keeps mapped.
        unsafe { self.pointer(offset).read_volatile() }
    }

    /// Sets the byte at `offset`.
    #[inline]
    pub fn set_byte(&self, offset: usize, value: u8) {
        // SAFETY: the pointer is into a writable buffer of the guest that the ring's memory table keeps mapped.
        unsafe { self.pointer(offset).write_volatile(value) };
    }

    /// Copies `bytes` into the chains, from `offset` on.
    pub fn scatter(&self, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        self.each_piece(offset, bytes.len(), |pointer, count| {
            // SAFETY: `each_piece` passes `count` bytes of guest memory, and the slice is as long.
            unsafe { pointer.copy_from_nonoverlapping(bytes[done..][..count].as_ptr(), count) };
            done += count;
        });
    }

    /// Copies the first bytes of the chains to `bytes`.
    pub fn gather(&self, bytes: &mut [u8]) {
        let mut done = 0;
        self.each_piece(0, bytes.len(), |pointer, count| {
            let to = &mut bytes[done..][..count];
            // SAFETY: `each_piece` passes `count` bytes of guest memory, and `to` is as long.
            unsafe { pointer.copy_to_nonoverlapping(to.as_mut_ptr(), count) };
            done += count;
        });
    }

    /// Calls `action` with each contiguous piece of the `length` bytes from `offset` on.
    pub fn each_piece(&self, offset: usize, length: usize, mut action: impl FnMut(*mut u8, usize)) {
        if length == 0 {
            return;
        }
        let (mut vector, mut offset) = self.place(offset);
        let mut rest = length;
        while rest > 0 {
            let iovec = self.vectors.0[vector];
            let count = rest.min(iovec.iov_len - offset);
            // SAFETY: `offset` is within the vector.
            action(unsafe { iovec.iov_base.cast::<u8>().add(offset) }, count);
            rest -= count;
            vector += 1;
            offset = 0;
        }
    }
}
