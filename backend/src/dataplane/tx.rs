//! Guest to TAP. The worker turns a batch of chains into vectors, passes them to the TAP frame by frame, and publishes
//! the batch with one index update and at most one call.
#![expect(unsafe_code, reason = "passes vectors into guest memory to the kernel")]

use baton_faults::Batch;

use super::chain::{self, Direction, MAX_VECTORS, Vectors};
use super::ring::Ring;
use super::{BATCH, TURN_BYTES, TURN_FRAMES, Turn};
use crate::metrics;
use crate::net_header;
use crate::tap::batch::{BatchWriter, MAX_BATCH};
use crate::tap::{MAX_FRAME, Sent, TapQueue};
use crate::vring::RingError;

/// The minimum number of bytes that a piece of a frame counts for in a turn.
const PIECE: usize = 64;

/// The fewest frames that are worth a [`BatchWriter`]. Fewer cost less one by one.
const MIN_BATCH: usize = 32;

const _: () = assert!(BATCH <= MAX_BATCH);

/// A chain of the batch.
#[derive(Clone, Copy, Debug)]
struct Frame {
    head: u16,
    /// Index of its first vector.
    first: usize,
    /// Index after its last vector.
    end: usize,
    /// Length in bytes, header included; 0 for an unusable chain.
    length: u32,
}

/// The transmit side of a queue pair.
#[derive(Debug, Default)]
pub struct Tx {
    /// The vring, while it is set up.
    pub ring: Option<Ring>,
    /// Length of the virtio-net header.
    pub header: usize,
    /// The TAP's send buffer is unlimited. Otherwise a frame that does not fit would be overtaken by the rest of its
    /// batch.
    pub unlimited: bool,
    batch: Vec<Frame>,
    vectors: Vectors,
    hint: usize,
    /// The TAP's send buffer was full. The frame is sent again when the TAP is writable.
    full: bool,
    /// A signal arrived before the TAP took the frame. The frame is sent again after the worker has checked its gate.
    interrupted: bool,
}

impl Tx {
    /// Notes that the TAP is writable. Returns whether a frame was waiting for that.
    pub fn writable(&mut self) -> bool {
        std::mem::take(&mut self.full)
    }

    /// Touches the memory that the first frames need.
    pub fn prefault(&mut self) {
        self.vectors.prefault();
        self.batch.resize(usize::from(BATCH), Frame { head: 0, first: 0, end: 0, length: 0 });
        self.batch.clear();
    }

    /// Enables kicks, unless that has no use now. Returns whether there is nothing to do until a kick or other event.
    pub fn enable_kicks(&mut self) -> bool {
        match &mut self.ring {
            Some(ring) if ring.runs() && !(self.full && ring.enabled) => ring.vring.enable_kicks(0) == Ok(0),
            _ => true,
        }
    }

    /// Returns whether the driver was last asked to kick.
    pub fn wants_kicks(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.vring.wants_kicks())
    }

    /// Asks the driver not to kick, since the worker polls.
    pub fn suppress_kicks(&mut self) {
        if let Some(ring) = &mut self.ring
            && ring.runs()
        {
            ring.vring.suppress_kicks();
        }
    }

    /// Sends the chains that the driver has made available, for one turn, with `writer` if there
    /// are many. Leaves kicks disabled if it sent any.
    pub fn run(
        &mut self,
        pair: u16,
        tap: &TapQueue,
        counters: &metrics::Direction,
        writer: Option<&mut BatchWriter>,
    ) -> Turn {
        let Some(mut ring) = self.ring.take() else { return Turn::Idle };
        let turn = if !ring.runs() {
            Turn::Idle
        } else {
            self.turn(&mut ring, tap, counters, writer).unwrap_or_else(|error| {
                ring.fail("transmit", pair, &error);
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
        mut writer: Option<&mut BatchWriter>,
    ) -> Result<Turn, RingError> {
        if self.full && ring.enabled {
            return Ok(Turn::Idle);
        }
        let (mut frames, mut bytes) = (0, 0);
        while frames < TURN_FRAMES && bytes < TURN_BYTES {
            if ring.vring.available(0)? == 0 {
                return Ok(Turn::ended(frames > 0));
            }
            ring.vring.disable_kicks();
            let result = if ring.enabled {
                self.fill(ring).map(|()| self.send(ring, tap, counters, writer.as_deref_mut()))
            } else {
                discard(ring, counters).map(|discarded| (discarded, 0))
            };
            // Publish what was completed before an error.
            if ring.publish(Batch::Sent) {
                counters.calls.add(1);
            }
            let (sent, length) = result?;
            if self.full && ring.enabled {
                return Ok(Turn::Full);
            }
            if std::mem::take(&mut self.interrupted) {
                return Ok(Turn::More);
            }
            frames += sent;
            bytes += length;
        }
        Ok(Turn::More)
    }

    /// Turns the next chains into vectors.
    fn fill(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.batch.clear();
        self.vectors.0.clear();
        let count = ring.vring.available(0)?.min(BATCH);
        for nth in 0..count {
            let head = match ring.vring.head(nth) {
                Ok(head) => head,
                // Send the frames before the error first.
                Err(_) if nth > 0 => break,
                Err(error) => return Err(error),
            };
            let first = self.vectors.0.len();
            let length = match chain::append(
                &ring.vring,
                head,
                Direction::Readable,
                &mut self.hint,
                &mut self.vectors,
            ) {
                Ok(length) => length,
                Err(error) => {
                    tracing::debug!(%error, "transmit chain dropped");
                    0
                }
            };
            self.batch.push(Frame { head, first, end: self.vectors.0.len(), length });
            if self.vectors.0.len() >= MAX_VECTORS {
                break;
            }
        }
        Ok(())
    }

    /// Passes the batch to the TAP. Returns how many frames and bytes were sent or dropped.
    fn send(
        &mut self,
        ring: &mut Ring,
        tap: &TapQueue,
        counters: &metrics::Direction,
        writer: Option<&mut BatchWriter>,
    ) -> (u32, usize) {
        let (mut frames, mut bytes) = (0, 0);
        let written = writer.map_or(&[][..], |writer| self.write(tap, writer));
        // Frames before this one cannot wait, for a later frame was sent.
        let last = written.iter().rposition(|sent| *sent == Sent::Done).unwrap_or(0);
        for (position, frame) in self.batch.iter().enumerate() {
            let length = frame.length as usize;
            if length <= self.header {
                counters.dropped.add(1);
            } else {
                let vectors = &self.vectors.0[frame.first..frame.end];
                let sent = match written.get(position) {
                    Some(Sent::Full | Sent::Interrupted) if position < last => {
                        match send(vectors, length, self.header, tap) {
                            Sent::Full | Sent::Interrupted => Sent::Refused,
                            sent => sent,
                        }
                    }
                    Some(Sent::Invalid) | None => send(vectors, length, self.header, tap),
                    Some(sent) => *sent,
                };
                match sent {
                    Sent::Done => counters.frame(length - self.header),
                    Sent::Refused | Sent::Invalid => counters.dropped.add(1),
                    Sent::Full => {
                        self.full = true;
                        break;
                    }
                    Sent::Interrupted => {
                        self.interrupted = true;
                        break;
                    }
                }
            }
            ring.vring.complete(frame.head, 0);
            frames += 1;
            // A frame of many small pieces takes long, too.
            bytes += length.max(PIECE * (frame.end - frame.first));
        }
        (frames, bytes)
    }
}

impl Tx {
    /// Writes the frames at the start of the batch that need no mending, if they are many. Returns their results.
    fn write<'a>(&self, tap: &TapQueue, writer: &'a mut BatchWriter) -> &'a [Sent] {
        if self.batch.len() < MIN_BATCH || !self.unlimited || !tap.has_nowait() {
            return &[];
        }
        let vectors = |frame: &Frame| &self.vectors.0[frame.first..frame.end];
        let plain = |frame: &&Frame| {
            let (vectors, length) = (vectors(frame), frame.length as usize);
            length > self.header
                && vectors.len() <= MAX_VECTORS
                // SAFETY: the vectors are guest memory that the ring's memory table keeps mapped.
                && !unsafe { net_header::may_need_mending(vectors, length, self.header) }
        };
        let count = self.batch.iter().take_while(plain).count();
        if count < MIN_BATCH || !writer.is_ready() {
            return &[];
        }
        // SAFETY: as above. The guest may change its memory meanwhile, which affects only its own frames.
        unsafe { writer.send(tap, self.batch[..count].iter().map(vectors)) }
    }
}

/// Sends the frame in `vectors`. If the kernel rejects it as invalid, repairs the header in a copy, if possible, and
/// sends the copy.
#[inline]
fn send(vectors: &[libc::iovec], length: usize, header: usize, tap: &TapQueue) -> Sent {
    if vectors.len() > MAX_VECTORS {
        let Some(mut frame) = copied(vectors, length, header) else { return Sent::Refused };
        net_header::mend_length(&mut frame, header);
        return send_copy(&frame, tap);
    }
    // SAFETY: the vectors are guest memory that the ring's memory table keeps mapped. The guest may change it
    // meanwhile, which affects only its own frame.
    match unsafe { tap.send(vectors) } {
        Sent::Invalid => {
            let Some(mut frame) = copied(vectors, length, header) else { return Sent::Invalid };
            if net_header::mend_length(&mut frame, header) { send_copy(&frame, tap) } else { Sent::Invalid }
        }
        sent => sent,
    }
}

fn send_copy(frame: &[u8], tap: &TapQueue) -> Sent {
    let vector = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
    // SAFETY: the vector is our own copy, which the kernel only reads.
    unsafe { tap.send(&[vector]) }
}

/// Returns a private copy of a frame of `length` bytes, or `None` if that is longer than any TAP accepts.
#[cold]
fn copied(vectors: &[libc::iovec], length: usize, header: usize) -> Option<Vec<u8>> {
    if length > header + MAX_FRAME {
        return None;
    }
    let mut frame = vec![0u8; length];
    let mut rest = frame.as_mut_slice();
    for vector in vectors {
        let (to, behind) = rest.split_at_mut_checked(vector.iov_len)?;
        // SAFETY: the vector is guest memory that the ring's memory table keeps mapped, and `to` is as long.
        unsafe { vector.iov_base.cast::<u8>().copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        rest = behind;
    }
    Some(frame)
}

/// Completes a batch of chains without sending them: the ring is started but disabled.
fn discard(ring: &mut Ring, counters: &metrics::Direction) -> Result<u32, RingError> {
    let count = ring.vring.available(0)?.min(BATCH);
    for _ in 0..count {
        let head = ring.vring.head(0)?;
        ring.vring.complete(head, 0);
        counters.discarded.add(1);
    }
    Ok(u32::from(count))
}
