//! The guest's receive buffers: chains of the receive ring that are I/O vectors already, before a frame comes.
//!
//! [`Buffers`] holds the chains from the ring's next available one on. A frame goes into the first of them. The bytes of a
//! frame are addressed by their offset from the first chain.
#![expect(unsafe_code, reason = "reads and writes bytes of guest memory")]

use super::BATCH;
use super::chain::{self, Direction, MAX_VECTORS, Vectors};
use crate::vring::{RingError, Vring};

/// A chain that a frame can be read into.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The chain's first descriptor.
    pub head: u16,
    /// Its first vector.
    pub first: usize,
    /// The vector after its last one.
    pub end: usize,
    /// Its bytes. An unusable chain has 0, and no vectors.
    pub length: u32,
}

/// Chains at the front of [`Buffers`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// How many chains.
    pub chains: usize,
    /// How many bytes they hold.
    pub bytes: usize,
    /// The guest has no more, and was asked to kick.
    pub all: bool,
}

/// Which chains can be used.
#[derive(Clone, Copy, Debug)]
pub struct Usable {
    /// Length of the virtio-net header.
    pub header: usize,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub mergeable: bool,
}

impl Usable {
    /// Whether a chain of `length` bytes is usable. Mergeable, a buffer of the header's size is legal (virtio 1.3
    /// §5.1.6.3.1). Alone it holds no frame.
    fn accepts(self, length: u32) -> bool {
        let length = length as usize;
        length > self.header || (self.mergeable && length == self.header)
    }
}

/// Receive buffers, in the ring's order.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Those before `next` are used up.
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

    /// Touches the memory that the first frames need. There must be no chains.
    pub fn prefault(&mut self) {
        self.vectors.prefault();
        let unused = Buffer { head: 0, first: 0, end: 0, length: 0 };
        self.chains.resize(5 * usize::from(BATCH), unused);
        self.chains.clear();
    }

    /// The first chain.
    #[inline]
    pub fn front(&self) -> Option<Buffer> {
        self.chains.get(self.next).copied()
    }

    /// All chains, the first one first.
    #[inline]
    pub fn chains(&self) -> &[Buffer] {
        &self.chains[self.next..]
    }

    /// Drops the first `count` chains.
    #[inline]
    pub fn consume(&mut self, count: usize) {
        self.next += count;
    }

    /// Vectors by their numbers, as a [`Buffer`] gives them.
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
        // The next chain's first vector is there. It gets its place back.
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
    /// [`RingError`] if the first of them is invalid. An invalid later one ends the batch.
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

    /// How many chains there are.
    pub fn taken(&self) -> u16 {
        u16::try_from(self.chains.len() - self.next).unwrap_or(u16::MAX)
    }

    /// Frees the place of the chains that are used up, if these are all or many.
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

    /// Adds chains to `room` until it has `wanted` bytes. Several only with `mergeable` buffers, and only as long as all
    /// of them have less than `most` vectors. Returns false if it needs more chains than there are.
    #[inline]
    pub fn fill(&self, room: &mut Room, wanted: usize, most: usize, mergeable: bool) -> bool {
        while let Some(chain) = self.chains.get(self.next + room.chains) {
            let vectors = chain.end - self.chains[self.next].first;
            if room.chains > 0 && vectors >= most {
                return true;
            }
            // An unusable chain between others holds no byte of the frame. It is used with a length of 0 in its place, to
            // keep the ring's order.
            room.chains += 1;
            room.bytes += chain.length as usize;
            if room.bytes >= wanted || !mergeable {
                return true;
            }
        }
        false
    }

    /// The vector that byte `offset` is in, and its offset there.
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
        // SAFETY: `place` gives an offset within the vector.
        unsafe { self.vectors.0[vector].iov_base.cast::<u8>().add(offset) }
    }

    /// Byte `offset`.
    #[inline]
    pub fn byte(&self, offset: usize) -> u8 {
        // SAFETY: guest memory that the ring's memory table keeps mapped.
        unsafe { self.pointer(offset).read_volatile() }
    }

    /// Sets byte `offset`.
    #[inline]
    pub fn set_byte(&self, offset: usize, value: u8) {
        // SAFETY: guest memory that the ring's memory table keeps mapped, in a buffer that the guest gave us.
        unsafe { self.pointer(offset).write_volatile(value) };
    }

    /// Copies `bytes` to byte `offset` and on.
    pub fn scatter(&self, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        self.each_piece(offset, bytes.len(), |pointer, count| {
            // SAFETY: `each_piece` gives `count` bytes of guest memory, and the slice is as long.
            unsafe { pointer.copy_from_nonoverlapping(bytes[done..][..count].as_ptr(), count) };
            done += count;
        });
    }

    /// Copies the first bytes to `bytes`.
    pub fn gather(&self, bytes: &mut [u8]) {
        let mut done = 0;
        self.each_piece(0, bytes.len(), |pointer, count| {
            let to = &mut bytes[done..][..count];
            // SAFETY: `each_piece` gives `count` bytes of guest memory, and `to` is as long.
            unsafe { pointer.copy_to_nonoverlapping(to.as_mut_ptr(), count) };
            done += count;
        });
    }

    /// Calls `action` with each contiguous piece of `length` bytes from byte `offset` on.
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
