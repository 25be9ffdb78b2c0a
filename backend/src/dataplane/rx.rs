//! TAP to guest. The worker turns chains into vectors before frames arrive, and reads each frame straight into them.
//!
//! The size of a frame is unknown before it is read. A read gets chains for a small frame while frames are small, and
//! for the largest frame while frames are large. If they cannot hold the largest one, the *spill* follows them: our own
//! buffer for the rest. So no read cuts a frame off, and no frame is read while the guest has no buffer. A frame that
//! was read and needs more buffers than the guest has made available becomes the *frame in hand*, delivered first.
#![expect(unsafe_code, reason = "passes vectors into guest memory to the kernel")]

use baton_faults::Batch;

use super::buffers::{Buffer, Buffers, Room, Usable};
use super::chain::MAX_VECTORS;
use super::ring::Ring;
use super::{BATCH, TURN_BYTES, TURN_FRAMES, Turn};
use crate::metrics;
use crate::net_header::{self, Accepted, Verdict};
use crate::tap::{MAX_FRAME, Received, TapQueue};
use crate::vring::RingError;

/// Bytes that a frame of standard size needs, with a VLAN tag and the virtio-net header.
const SMALL: usize = net_header::LONG + 1518;
/// Bytes that the largest frame needs, with the virtio-net header.
const LARGEST: usize = net_header::LONG + MAX_FRAME;
/// After so many small frames in a row, reads are for small frames again.
const CALM: u8 = 32;

/// The negotiated settings that affect receiving.
#[derive(Clone, Copy, Debug, Default)]
pub struct RxSettings {
    /// Length of the virtio-net header.
    pub header: usize,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub mergeable: bool,
    /// The headers that the guest accepts.
    pub accepted: Accepted,
}

/// A frame that was read from the TAP and is not delivered yet. Its header is the 10 bytes that all sessions share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameInHand {
    /// The virtio-net header without `num_buffers`.
    pub header: [u8; net_header::SHORT],
    /// The Ethernet frame.
    pub frame: Vec<u8>,
}

/// The receive side of a queue pair.
#[derive(Debug, Default)]
pub struct Rx {
    /// The vring, while it is set up.
    pub ring: Option<Ring>,
    /// The negotiated settings.
    pub settings: RxSettings,
    /// The frame in hand.
    pub in_hand: Option<FrameInHand>,
    buffers: Buffers,
    spill: Vec<u8>,
    large: bool,
    calm: u8,
    /// A signal arrived before the TAP gave a frame. The frame is read after the worker has checked its gate.
    interrupted: bool,
    /// Completed chains are not published yet.
    hidden: bool,
}

impl Rx {
    /// Forgets the prepared chains, which the ring still counts as available. Must be called whenever the ring, its
    /// memory or the negotiated features change.
    pub fn unprepare(&mut self) {
        self.buffers.clear();
    }

    /// Touches the memory that the first frames need.
    pub fn prefault(&mut self) {
        self.spill = vec![u8::MAX; LARGEST];
        self.buffers.prefault();
    }

    /// Receives frames for one turn without publishing their chains. [`Self::show`] publishes them.
    pub fn run_hidden(&mut self, pair: u16, tap: &TapQueue, counters: &metrics::Direction) -> Turn {
        self.hidden = true;
        let turn = self.run(pair, tap, counters);
        self.hidden = false;
        turn
    }

    /// Publishes the chains that [`Self::run_hidden`] has completed.
    pub fn show(&mut self, counters: &metrics::Direction) {
        if self.ring.as_mut().is_some_and(|ring| ring.publish(Batch::Received)) {
            counters.calls.add(1);
        }
    }

    /// Delivers the TAP's frames for one turn.
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
                Some(Buffer { length: 0, head, .. }) => {
                    ring.vring.complete(head, 0);
                    self.buffers.consume(1);
                    counters.dropped.add(1);
                    // Count it as a frame: a guest that makes only unusable chains available must not keep the worker
                    // from parking.
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

    /// Returns the first prepared chain. If the guest has made none available, enables kicks and returns `None`.
    fn front(&mut self, ring: &mut Ring, counters: &metrics::Direction) -> Result<Option<Buffer>, RingError> {
        if self.buffers.front().is_none() && !self.prepare(ring, counters)? {
            return Ok(None);
        }
        Ok(self.buffers.front())
    }

    /// Prepares more chains. If the guest has made none available, enables kicks and returns false.
    fn prepare(&mut self, ring: &mut Ring, counters: &metrics::Direction) -> Result<bool, RingError> {
        self.buffers.compact();
        let taken = self.buffers.taken();
        let mut count = ring.vring.available(taken)?;
        if count == 0 {
            // The guest may need its used buffers back before it can offer new ones.
            if !self.hidden && ring.vring.publish() {
                counters.calls.add(1);
            }
            count = ring.vring.enable_kicks(taken)?;
            if count == 0 {
                return Ok(false);
            }
        }
        ring.vring.disable_kicks();
        let RxSettings { header, mergeable, .. } = self.settings;
        self.buffers.append(&ring.vring, count, Usable { header, mergeable })?;
        Ok(true)
    }

    /// Returns as many chains as `wanted` bytes need, or all chains if they are fewer. Returns one chain without
    /// mergeable buffers, and no further chain if all together would have `most` vectors.
    fn room(
        &mut self,
        ring: &mut Ring,
        wanted: usize,
        most: usize,
        counters: &metrics::Direction,
    ) -> Result<Room, RingError> {
        let mut room = Room::default();
        while !self.buffers.fill(&mut room, wanted, most, self.settings.mergeable) {
            if !self.prepare(ring, counters)? {
                room.all = true;
                break;
            }
        }
        Ok(room)
    }

    /// Returns whether a frame that does not fit into `room` fits once the guest offers more buffers.
    fn worth_waiting(&self, ring: &Ring, room: Room) -> bool {
        self.settings.mergeable && room.all && room.chains < usize::from(ring.vring.size())
    }

    /// Reads one frame and delivers it. Returns its length, or 0 if it was dropped. Returns `None` if the TAP has no
    /// frame, if a signal arrived, or if the frame is in hand now.
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
        let chains = &self.buffers.chains()[..room.chains];
        let (first, end) = (chains[0].first, chains[room.chains - 1].end);
        let spill = libc::iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() };
        let vectors = end - first + usize::from(room.bytes < LARGEST);
        // A chain of more pieces than a system call takes: read into the spill and copy.
        let aside = vectors > MAX_VECTORS;
        let received = if aside {
            // SAFETY: the vector is the spill buffer, which nothing else uses during the call.
            unsafe { tap.receive(&[spill]) }
        } else if room.bytes >= LARGEST {
            // SAFETY: the vectors are writable buffers of the guest that the ring's memory table keeps mapped.
            unsafe { tap.receive(self.buffers.vectors(first..end)) }
        } else {
            // SAFETY: as above, and the spill buffer, which nothing else uses during the call.
            self.buffers.with_spill(first..end, spill, |vectors| unsafe { tap.receive(vectors) })
        };
        let length = match received {
            Received::Frame(length) if length > self.settings.header => length,
            // The read failed, or the frame is too short.
            Received::Frame(_) | Received::Failed => {
                self.log(ring, if aside { 0 } else { room.bytes });
                counters.dropped.add(1);
                return Ok(Some(0));
            }
            Received::Interrupted => {
                self.interrupted = true;
                return Ok(None);
            }
            // The pair reports a TAP that is gone.
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
        // These chains were written, even if the frame is dropped.
        self.log(ring, room.bytes);
        self.deliver_spilled(ring, length, room.bytes, counters)
    }

    /// Chooses whether the next read is for a small or a large frame.
    fn adapt(&mut self, length: usize) {
        if length > SMALL {
            self.large = true;
            self.calm = 0;
        } else if self.large {
            self.calm += 1;
            self.large = self.calm < CALM;
        }
    }

    /// Delivers a frame whose end is in the spill: copies that into more chains, or takes the whole frame in hand.
    fn deliver_spilled(
        &mut self,
        ring: &mut Ring,
        length: usize,
        in_chains: usize,
        counters: &metrics::Direction,
    ) -> Result<Option<usize>, RingError> {
        let room = self.room(ring, length, usize::MAX, counters)?;
        if room.bytes >= length {
            self.buffers.scatter(in_chains, &self.spill[..length - in_chains]);
            self.deliver(ring, length, counters);
            return Ok(Some(length));
        }
        if !self.worth_waiting(ring, room) {
            self.give_up(ring, room, counters);
            return Ok(Some(0));
        }
        let mut bytes = vec![0; length];
        self.buffers.gather(&mut bytes[..in_chains]);
        bytes[in_chains..].copy_from_slice(&self.spill[..length - in_chains]);
        let mut header = [0; net_header::SHORT];
        header.copy_from_slice(&bytes[..net_header::SHORT]);
        bytes.drain(..self.settings.header);
        self.in_hand = Some(FrameInHand { header, frame: bytes });
        Ok(None)
    }

    /// Delivers the frame in hand, or returns it if it does not fit yet.
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
        self.buffers.scatter(0, &bytes);
        self.deliver(ring, length, counters);
        Ok(None)
    }

    /// Drops a frame that will never fit. If `room` contains unusable chains, gives all its chains back to the guest:
    /// nothing else would move them.
    fn give_up(&mut self, ring: &mut Ring, room: Room, counters: &metrics::Direction) {
        counters.dropped.add(1);
        let chains = &self.buffers.chains()[..room.chains];
        if chains.iter().any(|chain| chain.length == 0) {
            chains.iter().for_each(|chain| ring.vring.complete(chain.head, 0));
            self.buffers.consume(room.chains);
        }
    }

    /// Delivers a frame of `length` bytes that is in the chains already: fills in its header and completes its chains.
    fn deliver(&mut self, ring: &mut Ring, length: usize, counters: &metrics::Direction) {
        let (flags, gso_type) =
            (self.buffers.byte(net_header::FLAGS), self.buffers.byte(net_header::GSO_TYPE));
        let verdict = self.settings.accepted.judge(flags, gso_type);
        if verdict == Verdict::Drop {
            // The chains stay prepared; the next frame overwrites them.
            self.log(ring, length);
            counters.dropped.add(1);
            return;
        }
        if verdict == Verdict::ClearFlags {
            self.buffers.set_byte(net_header::FLAGS, 0);
        }
        let (mut rest, mut last, mut count) = (length, 0, 0);
        while rest > 0 {
            last = rest.min(self.buffers.chains()[count].length as usize);
            rest -= last;
            count += 1;
        }
        if self.settings.header == net_header::LONG {
            let buffers = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
            self.buffers.set_byte(net_header::NUM_BUFFERS, buffers[0]);
            self.buffers.set_byte(net_header::NUM_BUFFERS + 1, buffers[1]);
        }
        self.log(ring, length);
        let chains = &self.buffers.chains()[..count];
        for chain in &chains[..count - 1] {
            ring.vring.complete(chain.head, chain.length);
        }
        // `last` is at most the length of a chain, which is a u32.
        ring.vring.complete(chains[count - 1].head, u32::try_from(last).unwrap_or(u32::MAX));
        self.buffers.consume(count);
        counters.frame(length - self.settings.header);
    }

    /// Marks the first `length` bytes of the chains as written, if the front-end keeps a log.
    #[inline]
    fn log(&self, ring: &Ring, length: usize) {
        if let Some(log) = ring.vring.log() {
            self.buffers
                .each_piece(0, length, |pointer, count| log.buffer(ring.vring.memory(), pointer, count));
        }
    }
}
