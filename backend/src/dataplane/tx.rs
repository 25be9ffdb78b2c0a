//! Guest to TAP. A batch of chains is turned into vectors first, then given to the TAP frame by frame, then
//! published with one index update and at most one call.
#![expect(unsafe_code, reason = "gives the kernel vectors into guest memory")]

use baton_faults::Batch;

use super::chain::{self, Direction, MAX_VECTORS, Vectors};
use super::ring::Ring;
use super::{BATCH, TURN_BYTES, TURN_FRAMES, Turn};
use crate::metrics;
use crate::net_header;
use crate::tap::{MAX_FRAME, Sent, TapQueue};
use crate::vring::RingError;

/// What a piece of a frame costs at least, in bytes.
const PIECE: usize = 64;

/// A chain of the batch.
#[derive(Clone, Copy, Debug)]
struct Frame {
    head: u16,
    /// Where its vectors begin.
    first: usize,
    /// Where they end.
    end: usize,
    /// Its bytes, header included; 0 for a chain that cannot be used.
    length: u32,
}

/// The transmit side of a queue pair.
#[derive(Debug, Default)]
pub struct Tx {
    /// The vring, while it is set up.
    pub ring: Option<Ring>,
    /// Length of the virtio-net header.
    pub header: usize,
    batch: Vec<Frame>,
    vectors: Vectors,
    hint: usize,
    /// The TAP's send buffer was full; to be tried again when it is writable.
    full: bool,
    /// A signal came before the TAP took the frame; to be tried again once the worker has looked at its gate.
    interrupted: bool,
}

impl Tx {
    /// The TAP became writable.
    pub fn writable(&mut self) -> bool {
        std::mem::take(&mut self.full)
    }

    /// Has the memory that the first frames need there before they come.
    pub fn prefault(&mut self) {
        self.vectors.prefault();
        self.batch.resize(usize::from(BATCH), Frame { head: 0, first: 0, end: 0, length: 0 });
        self.batch.clear();
    }

    /// Sends what the guest has made available, for one turn. Before it is idle it asks for kicks if `arm`.
    pub fn run(&mut self, pair: u16, tap: &TapQueue, counters: &metrics::Direction, arm: bool) -> Turn {
        let Some(mut ring) = self.ring.take() else { return Turn::Idle };
        let turn = if !ring.runs() {
            Turn::Idle
        } else {
            self.turn(&mut ring, tap, counters, arm).unwrap_or_else(|error| {
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
        arm: bool,
    ) -> Result<Turn, RingError> {
        if self.full && ring.enabled {
            return Ok(Turn::Idle);
        }
        let (mut frames, mut bytes) = (0, 0);
        while frames < TURN_FRAMES && bytes < TURN_BYTES {
            if ring.vring.available(0)? == 0 && (!arm || ring.vring.enable_kicks(0)? == 0) {
                return Ok(Turn::ended(frames > 0));
            }
            ring.vring.disable_kicks();
            let result = if ring.enabled {
                self.fill(ring).map(|()| self.send(ring, tap, counters))
            } else {
                discard(ring, counters).map(|discarded| (discarded, 0))
            };
            // What was completed before an error is the guest's all the same.
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

    /// Makes vectors of the next chains.
    fn fill(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.batch.clear();
        self.vectors.0.clear();
        let count = ring.vring.available(0)?.min(BATCH);
        for nth in 0..count {
            let head = match ring.vring.head(nth) {
                Ok(head) => head,
                // The frames before it go out first.
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

    /// Gives the batch to the TAP; gives the frames and bytes that it is rid of.
    fn send(&mut self, ring: &mut Ring, tap: &TapQueue, counters: &metrics::Direction) -> (u32, usize) {
        let (mut frames, mut bytes) = (0, 0);
        for frame in &self.batch {
            let length = frame.length as usize;
            if length <= self.header {
                counters.dropped.add(1);
            } else {
                let vectors = &self.vectors.0[frame.first..frame.end];
                match send(vectors, length, self.header, tap) {
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
            // Many small pieces take long, too.
            bytes += length.max(PIECE * (frame.end - frame.first));
        }
        (frames, bytes)
    }
}

/// Gives the TAP the frame in `vectors`. If the kernel calls it invalid, the header is mended, if that can be done.
#[inline]
fn send(vectors: &[libc::iovec], length: usize, header: usize, tap: &TapQueue) -> Sent {
    if vectors.len() > MAX_VECTORS {
        let Some(mut frame) = copied(vectors, length, header) else { return Sent::Refused };
        net_header::mend_length(&mut frame, header);
        return send_copy(&frame, tap);
    }
    // SAFETY: the vectors are guest memory that the ring's memory table keeps mapped; what the guest does to it
    // meanwhile is the guest's frame.
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
    // SAFETY: the copy is ours, and is only read.
    unsafe { tap.send(&[vector]) }
}

/// A private copy of a frame of `length` bytes. `None`: no TAP takes one so long.
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

/// Takes a batch of chains and gives them back unsent: the ring is started but disabled.
fn discard(ring: &mut Ring, counters: &metrics::Direction) -> Result<u32, RingError> {
    let count = ring.vring.available(0)?.min(BATCH);
    for _ in 0..count {
        let head = ring.vring.head(0)?;
        ring.vring.complete(head, 0);
        counters.discarded.add(1);
    }
    Ok(u32::from(count))
}
