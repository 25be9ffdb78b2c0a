//! TAP to guest. Chains are turned into vectors before frames come, and the TAP's frame is read straight into them.
//!
//! How large the next frame is cannot be known. While frames are small, a read gets the next chain and, behind it, a
//! buffer of our own that catches the rest of a larger one; once frames are large, it gets as many chains as the
//! largest frame needs. Either way no frame is cut off, and none is read while the guest has no buffer at all.
//! A frame that was read and does not fit into what the guest has made available is kept *in hand* and goes first.
#![expect(unsafe_code, reason = "gives the kernel vectors into guest memory, and writes headers there")]

use baton_faults::Batch;

use super::chain::{self, Direction, MAX_VECTORS, Vectors};
use super::ring::Ring;
use super::{BATCH, TURN_BYTES, TURN_FRAMES, Turn};
use crate::metrics;
use crate::net_header::{self, Accepted, Verdict};
use crate::tap::{MAX_FRAME, Received, TapQueue};
use crate::vring::RingError;

/// Room that a frame of standard size needs, with its header and a VLAN tag.
const SMALL: usize = net_header::LONG + 1518;
/// Room that any frame needs.
const LARGEST: usize = net_header::LONG + MAX_FRAME;
/// Small frames in a row after which reads are for small frames again.
const CALM: u8 = 32;

/// What the front-end negotiated, as far as receiving is concerned.
#[derive(Clone, Copy, Debug, Default)]
pub struct RxSettings {
    /// Length of the virtio-net header.
    pub header: usize,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub mergeable: bool,
    /// Which headers the guest can take.
    pub accepted: Accepted,
}

/// A frame that was read from the TAP and not delivered yet. The header is the 10 bytes that every session has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameInHand {
    /// The virtio-net header without `num_buffers`.
    pub header: [u8; net_header::SHORT],
    /// The Ethernet frame.
    pub frame: Vec<u8>,
}

/// A chain ready to be read into.
#[derive(Clone, Copy, Debug)]
struct Prepared {
    head: u16,
    /// Where its vectors begin.
    first: usize,
    /// Where they end.
    end: usize,
    /// Its bytes; 0 for a chain that cannot be used, which has no vectors either.
    length: u32,
}

/// The receive side of a queue pair.
#[derive(Debug, Default)]
pub struct Rx {
    /// The vring, while it is set up.
    pub ring: Option<Ring>,
    /// What was negotiated.
    pub settings: RxSettings,
    /// The frame in hand.
    pub in_hand: Option<FrameInHand>,
    /// Chains from the ring's next available one on; those before `next` are done with.
    prepared: Vec<Prepared>,
    next: usize,
    vectors: Vectors,
    hint: usize,
    spill: Vec<u8>,
    large: bool,
    calm: u8,
    /// A signal came before the TAP gave a frame; to be tried again once the worker has looked at its gate.
    interrupted: bool,
    /// What was completed is not to be shown to the guest yet.
    hidden: bool,
}

/// Chains at the front of what is prepared.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    chains: usize,
    bytes: usize,
    /// The guest has no more; it was asked to kick.
    all: bool,
}

impl Rx {
    /// Forgets the prepared chains, which the ring still counts as available. To be done whenever the ring, its
    /// memory or the negotiated features change.
    pub fn unprepare(&mut self) {
        self.prepared.clear();
        self.vectors.0.clear();
        self.next = 0;
        self.hint = 0;
    }

    /// Has the memory that the first frames need there before they come.
    pub fn prefault(&mut self) {
        self.spill = vec![u8::MAX; LARGEST];
        self.vectors.prefault();
        let unused = Prepared { head: 0, first: 0, end: 0, length: 0 };
        self.prepared.resize(5 * usize::from(BATCH), unused);
        self.prepared.clear();
    }

    /// Puts what the TAP has into the ring, for one turn; the guest sees it with [`Self::show`].
    pub fn run_hidden(&mut self, pair: u16, tap: &TapQueue, counters: &metrics::Direction) -> Turn {
        self.hidden = true;
        let turn = self.run(pair, tap, counters);
        self.hidden = false;
        turn
    }

    /// Shows the guest what [`Self::run_hidden`] has delivered.
    pub fn show(&mut self, counters: &metrics::Direction) {
        if self.ring.as_mut().is_some_and(|ring| ring.publish(Batch::Received)) {
            counters.calls.add(1);
        }
    }

    /// Delivers what the TAP has, for one turn.
    pub fn run(&mut self, pair: u16, tap: &TapQueue, counters: &metrics::Direction) -> Turn {
        let Some(mut ring) = self.ring.take() else { return Turn::Idle };
        let turn = if !ring.runs() || !ring.enabled || tap.is_gone() {
            Turn::Idle
        } else {
            let result = self.turn(&mut ring, tap, counters);
            if !self.hidden && ring.publish(Batch::Received) {
                counters.calls.add(1);
            }
            result.unwrap_or_else(|error| {
                ring.fail("receive", pair, &error);
                Turn::Idle
            })
        };
        self.ring = Some(ring);
        turn
    }

    fn turn(
        &mut self,
        ring: &mut Ring,
        tap: &TapQueue,
        counters: &metrics::Direction,
    ) -> Result<Turn, RingError> {
        let (mut frames, mut bytes) = (0u32, 0);
        while frames < TURN_FRAMES && bytes < TURN_BYTES {
            match self.front(ring, counters)? {
                None => return Ok(Turn::ended(frames > 0)),
                Some(Prepared { length: 0, head, .. }) => {
                    ring.vring.complete(head, 0);
                    self.next += 1;
                    counters.dropped.add(1);
                    // It counts: a guest that makes nothing else available must not keep the worker from parking.
                    frames += 1;
                    continue;
                }
                Some(_) => {}
            }
            if let Some(in_hand) = self.in_hand.take() {
                if let Some(in_hand) = self.deliver_in_hand(ring, in_hand, counters)? {
                    self.in_hand = Some(in_hand);
                    return Ok(Turn::Idle);
                }
                continue;
            }
            match self.receive(ring, tap, counters)? {
                Some(length) => {
                    frames += 1;
                    bytes += length;
                    if frames.is_multiple_of(u32::from(BATCH))
                        && !self.hidden
                        && ring.publish(Batch::Received)
                    {
                        counters.calls.add(1);
                    }
                }
                None if std::mem::take(&mut self.interrupted) => return Ok(Turn::More),
                None => return Ok(Turn::ended(frames > 0)),
            }
        }
        Ok(Turn::More)
    }

    /// The first prepared chain. `None`: the guest has given none, and was asked to kick.
    fn front(
        &mut self,
        ring: &mut Ring,
        counters: &metrics::Direction,
    ) -> Result<Option<Prepared>, RingError> {
        if self.next == self.prepared.len() && !self.prepare(ring, counters)? {
            return Ok(None);
        }
        Ok(self.prepared.get(self.next).copied())
    }

    /// Prepares more chains. False: there are none, and the guest was asked to kick.
    fn prepare(&mut self, ring: &mut Ring, counters: &metrics::Direction) -> Result<bool, RingError> {
        self.compact();
        let taken = u16::try_from(self.prepared.len() - self.next).unwrap_or(u16::MAX);
        let mut count = ring.vring.available(taken)?;
        if count == 0 {
            // The buffers so far must reach the guest before it can give new ones.
            if !self.hidden && ring.vring.publish() {
                counters.calls.add(1);
            }
            count = ring.vring.enable_kicks(taken)?;
            if count == 0 {
                return Ok(false);
            }
        }
        ring.vring.disable_kicks();
        let before = self.vectors.0.len();
        for nth in 0..count.min(BATCH) {
            let head = match ring.vring.head(taken + nth) {
                Ok(head) => head,
                Err(_) if nth > 0 => break,
                Err(error) => return Err(error),
            };
            let first = self.vectors.0.len();
            let length = match chain::append(
                &ring.vring,
                head,
                Direction::Writable,
                &mut self.hint,
                &mut self.vectors,
            ) {
                // Mergeable, a buffer of the header's size is legal (virtio 1.3 §5.1.6.3.1); alone it holds no frame.
                Ok(length)
                    if length as usize > self.settings.header
                        || (self.settings.mergeable && length as usize == self.settings.header) =>
                {
                    length
                }
                other => {
                    tracing::debug!(?other, "receive chain unusable");
                    self.vectors.0.truncate(first);
                    0
                }
            };
            self.prepared.push(Prepared { head, first, end: self.vectors.0.len(), length });
            if self.vectors.0.len() - before >= MAX_VECTORS {
                break;
            }
        }
        Ok(true)
    }

    /// Frees the place of the chains that are done with, when it is all or much.
    fn compact(&mut self) {
        if self.next == self.prepared.len() {
            self.prepared.clear();
            self.vectors.0.clear();
            self.next = 0;
            return;
        }
        let done = self.prepared[self.next].first;
        if self.next >= 4 * usize::from(BATCH) || done >= 8 * MAX_VECTORS {
            self.vectors.0.drain(..done);
            self.prepared.drain(..self.next);
            for chain in &mut self.prepared {
                chain.first -= done;
                chain.end -= done;
            }
            self.next = 0;
        }
    }

    /// As many chains as are needed for `wanted` bytes, or as there are; one only without mergeable buffers. More than
    /// one only as long as all have less than `most` vectors.
    fn room(
        &mut self,
        ring: &mut Ring,
        wanted: usize,
        most: usize,
        counters: &metrics::Direction,
    ) -> Result<Room, RingError> {
        let mut room = Room::default();
        loop {
            while let Some(chain) = self.prepared.get(self.next + room.chains) {
                let vectors = chain.end - self.prepared[self.next].first;
                if room.chains > 0 && vectors >= most {
                    return Ok(room);
                }
                // An unusable chain between others holds no byte of the frame: it is used with a length of 0 in its
                // place, for the order of the ring, and costs neither the frame nor its neighbours.
                room.chains += 1;
                room.bytes += chain.length as usize;
                if room.bytes >= wanted || !self.settings.mergeable {
                    return Ok(room);
                }
            }
            if !self.prepare(ring, counters)? {
                room.all = true;
                return Ok(room);
            }
        }
    }

    /// Whether a frame that does not fit into `room` will once the guest gives more buffers.
    fn worth_waiting(&self, ring: &Ring, room: Room) -> bool {
        self.settings.mergeable && room.all && room.chains < usize::from(ring.vring.size())
    }

    /// Reads one frame and delivers it, or takes it in hand. Gives its length, or `None` when the TAP has no more or
    /// the frame is in hand.
    fn receive(
        &mut self,
        ring: &mut Ring,
        tap: &TapQueue,
        counters: &metrics::Direction,
    ) -> Result<Option<usize>, RingError> {
        if self.spill.is_empty() {
            self.spill = vec![0; LARGEST];
        }
        // The last vector is for the spill.
        let room = self.room(ring, if self.large { LARGEST } else { SMALL }, MAX_VECTORS, counters)?;
        let first = self.prepared[self.next].first;
        let mut end = self.prepared[self.next + room.chains - 1].end;
        let spill = libc::iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() };
        let vectors = end - first + usize::from(room.bytes < LARGEST);
        // A chain of more pieces than a system call takes gets a copy.
        let aside = vectors > MAX_VECTORS;
        let received = if aside {
            // SAFETY: the spill buffer, which nobody else uses.
            unsafe { tap.receive(&[spill]) }
        } else if room.bytes >= LARGEST {
            // SAFETY: guest memory that the ring's memory table keeps mapped, in buffers that the guest gave us.
            unsafe { tap.receive(&self.vectors.0[first..end]) }
        } else {
            // What is behind is prepared too; it gets its place back at once.
            let behind = self.vectors.0.get_mut(end).map(|place| std::mem::replace(place, spill));
            if behind.is_none() {
                self.vectors.0.push(spill);
            }
            end += 1;
            // SAFETY: as above, and the spill buffer, which nobody else uses.
            let received = unsafe { tap.receive(&self.vectors.0[first..end]) };
            match behind {
                Some(behind) => self.vectors.0[end - 1] = behind,
                None => self.vectors.0.truncate(end - 1),
            }
            received
        };
        let length = match received {
            Received::Frame(length) if length > self.settings.header => length,
            // Lost or too short.
            Received::Frame(_) | Received::Failed => {
                self.log(ring, if aside { 0 } else { room.bytes });
                counters.dropped.add(1);
                return Ok(Some(0));
            }
            Received::Interrupted => {
                self.interrupted = true;
                return Ok(None);
            }
            // That it is gone is for the pair to report.
            Received::Empty | Received::Gone => return Ok(None),
        };
        self.adapt(length);
        if aside {
            return self.deliver_spilled(ring, length, 0, counters);
        }
        if length <= room.bytes {
            self.deliver(ring, length, counters);
            return Ok(Some(length));
        }
        // Whatever becomes of the frame.
        self.log(ring, room.bytes);
        self.deliver_spilled(ring, length, room.bytes, counters)
    }

    /// Chooses between reads for small and for large frames.
    fn adapt(&mut self, length: usize) {
        if length > SMALL {
            self.large = true;
            self.calm = 0;
        } else if self.large {
            self.calm += 1;
            self.large = self.calm < CALM;
        }
    }

    /// Part of the frame is in the spill buffer: finds more chains for it, or takes it in hand.
    fn deliver_spilled(
        &mut self,
        ring: &mut Ring,
        length: usize,
        in_chains: usize,
        counters: &metrics::Direction,
    ) -> Result<Option<usize>, RingError> {
        let room = self.room(ring, length, usize::MAX, counters)?;
        if room.bytes >= length {
            self.scatter(in_chains, length - in_chains);
            self.deliver(ring, length, counters);
            return Ok(Some(length));
        }
        if !self.worth_waiting(ring, room) {
            self.give_up(ring, room, counters);
            return Ok(Some(0));
        }
        let mut bytes = vec![0; length];
        self.gather(&mut bytes[..in_chains]);
        bytes[in_chains..].copy_from_slice(&self.spill[..length - in_chains]);
        let mut header = [0; net_header::SHORT];
        header.copy_from_slice(&bytes[..net_header::SHORT]);
        bytes.drain(..self.settings.header);
        self.in_hand = Some(FrameInHand { header, frame: bytes });
        Ok(None)
    }

    /// Delivers the frame in hand, or gives it back if there is no room yet.
    fn deliver_in_hand(
        &mut self,
        ring: &mut Ring,
        in_hand: FrameInHand,
        counters: &metrics::Direction,
    ) -> Result<Option<FrameInHand>, RingError> {
        let length = self.settings.header + in_hand.frame.len();
        let room = self.room(ring, length, usize::MAX, counters)?;
        if room.bytes < length {
            if self.worth_waiting(ring, room) {
                return Ok(Some(in_hand));
            }
            self.give_up(ring, room, counters);
            return Ok(None);
        }
        let mut bytes = vec![0; self.settings.header];
        bytes[..net_header::SHORT].copy_from_slice(&in_hand.header);
        bytes.extend_from_slice(&in_hand.frame);
        std::mem::swap(&mut self.spill, &mut bytes);
        self.scatter(0, length);
        std::mem::swap(&mut self.spill, &mut bytes);
        self.deliver(ring, length, counters);
        Ok(None)
    }

    /// Drops a frame for which there will be no room. Where unusable chains take the place, all go back to the guest:
    /// nothing else would move them.
    fn give_up(&mut self, ring: &mut Ring, room: Room, counters: &metrics::Direction) {
        counters.dropped.add(1);
        let chains = &self.prepared[self.next..][..room.chains];
        if chains.iter().any(|chain| chain.length == 0) {
            chains.iter().for_each(|chain| ring.vring.complete(chain.head, 0));
            self.next += room.chains;
        }
    }

    /// Completes as many chains as `length` bytes fill, which are in place but for the header.
    fn deliver(&mut self, ring: &mut Ring, length: usize, counters: &metrics::Direction) {
        let verdict =
            self.settings.accepted.judge(self.byte(net_header::FLAGS), self.byte(net_header::GSO_TYPE));
        if verdict == Verdict::Drop {
            // The chains stay; the next frame overwrites them.
            self.log(ring, length);
            counters.dropped.add(1);
            return;
        }
        if verdict == Verdict::ClearFlags {
            self.set_byte(net_header::FLAGS, 0);
        }
        let (mut rest, mut last, mut count) = (length, 0, 0);
        while rest > 0 {
            last = rest.min(self.prepared[self.next + count].length as usize);
            rest -= last;
            count += 1;
        }
        if self.settings.header == net_header::LONG {
            let buffers = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
            self.set_byte(net_header::NUM_BUFFERS, buffers[0]);
            self.set_byte(net_header::NUM_BUFFERS + 1, buffers[1]);
        }
        self.log(ring, length);
        let end = self.next + count;
        for chain in &self.prepared[self.next..end - 1] {
            ring.vring.complete(chain.head, chain.length);
        }
        // `last` is at most a chain's length, a u32.
        ring.vring.complete(self.prepared[end - 1].head, u32::try_from(last).unwrap_or(u32::MAX));
        self.next = end;
        counters.frame(length - self.settings.header);
    }

    /// Notes, while the front-end keeps a log, that the first `length` bytes of the chains at the front were written.
    #[inline]
    fn log(&self, ring: &Ring, length: usize) {
        if let Some(log) = ring.vring.log() {
            self.each_piece(0, length, |pointer, count| log.buffer(ring.vring.memory(), pointer, count));
        }
    }

    /// The vector and the offset in it where byte `offset` of the chains at the front lies.
    #[inline]
    fn place(&self, mut offset: usize) -> (usize, usize) {
        let mut vector = self.prepared[self.next].first;
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

    #[inline]
    fn byte(&self, offset: usize) -> u8 {
        // SAFETY: guest memory that the ring's memory table keeps mapped.
        unsafe { self.pointer(offset).read_volatile() }
    }

    #[inline]
    fn set_byte(&self, offset: usize, value: u8) {
        // SAFETY: guest memory that the ring's memory table keeps mapped, in a buffer that the guest gave us.
        unsafe { self.pointer(offset).write_volatile(value) };
    }

    /// Copies the first `length` bytes of the spill buffer to byte `offset` of the chains at the front and on.
    fn scatter(&self, offset: usize, length: usize) {
        let mut done = 0;
        self.each_piece(offset, length, |pointer, count| {
            // SAFETY: `each_piece` gives `count` bytes of guest memory; the spill buffer has `length` bytes.
            unsafe { pointer.copy_from_nonoverlapping(self.spill[done..][..count].as_ptr(), count) };
            done += count;
        });
    }

    /// Copies the first bytes of the chains at the front to `bytes`.
    fn gather(&self, bytes: &mut [u8]) {
        let mut done = 0;
        self.each_piece(0, bytes.len(), |pointer, count| {
            let to = &mut bytes[done..][..count];
            // SAFETY: `each_piece` gives `count` bytes of guest memory, and `to` is as long.
            unsafe { pointer.copy_to_nonoverlapping(to.as_mut_ptr(), count) };
            done += count;
        });
    }

    fn each_piece(&self, offset: usize, length: usize, mut action: impl FnMut(*mut u8, usize)) {
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
