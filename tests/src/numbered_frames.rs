//! Numbered frames of one direction, in flows. Counts the frames that are missing, and those that arrive late or twice.
//!
//! The UDP source port identifies a frame's flow. The payload contains the frame's number within its flow, and a time
//! stamp.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::frames::{Network, Segment, Transport, segment};

/// The length of a frame's payload: number, stamp and padding.
const PAYLOAD: usize = 64;
/// Where the padding begins.
const PADDING: usize = 12;

/// A flow, with its next frame.
#[derive(Debug)]
struct Flow {
    frame: Segment,
    /// The number of the next frame to send.
    next: u32,
    /// One more than the highest number that has arrived.
    received: u32,
    /// One more than the number that arrived last.
    expected: u32,
    /// Numbers below `received` that have not arrived.
    missing: BTreeSet<u32>,
}

/// All flows of a direction.
#[derive(Debug)]
pub struct Flows {
    flows: Vec<Flow>,
    port: u16,
    turn: usize,
    tally: Tally,
}

/// A frame that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The flow's port.
    pub port: u16,
    /// The frame's number in its flow.
    pub number: u32,
    /// The number that follows the frame of this flow that arrived before.
    pub expected: u32,
    /// Whether frames that arrive twice do so without a gap: from one of them on, all that follow it.
    pub in_order: bool,
    /// When the frame was sent.
    pub stamp: u64,
}

/// The frames of a direction, counted by what happened to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Frames sent.
    pub sent: u64,
    /// Frames that have not arrived, although later ones of their flow have.
    pub lost: u64,
    /// Frames that arrived again.
    pub doubled: u64,
    /// Frames that arrived after later ones of their flow.
    pub reordered: u64,
}

impl Flows {
    /// Creates this many flows, with consecutive UDP ports from `port` on.
    pub fn new(port: u16, flows: u16) -> Self {
        let flow = |port: u16| {
            let mut frame = segment(Network::V4, Transport::Udp, &[0x5a; PAYLOAD]);
            let place = frame.transport_offset;
            frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
            Flow { frame, next: 0, received: 0, expected: 0, missing: BTreeSet::new() }
        };
        let flows = (0..flows).map(|index| flow(port + index)).collect();
        Self { flows, port, turn: 0, tally: Tally::default() }
    }

    /// The next frame, with the index of its flow. The caller sends it and then calls [`Self::sent`].
    pub fn next(&mut self, stamp: u64) -> (usize, &[u8]) {
        let flow = &mut self.flows[self.turn];
        let payload = &mut flow.frame.bytes[flow.frame.payload_offset..];
        payload[..4].copy_from_slice(&flow.next.to_be_bytes());
        payload[4..PADDING].copy_from_slice(&stamp.to_be_bytes());
        (self.turn, &flow.frame.bytes)
    }

    /// Records that the next frame was sent, and moves on to the next flow.
    pub fn sent(&mut self) {
        self.flows[self.turn].next += 1;
        self.tally.sent += 1;
        self.turn = (self.turn + 1) % self.flows.len();
    }

    /// Counts a frame that arrived.
    ///
    /// # Errors
    /// Returns an error if the frame is damaged or was never sent.
    pub fn receive(&mut self, frame: &[u8]) -> Result<Arrival> {
        let Segment { transport_offset, payload_offset, .. } = self.flows[0].frame;
        let port =
            frame.get(transport_offset..).and_then(|bytes| bytes.first_chunk()).context("short frame")?;
        let port = u16::from_be_bytes(*port);
        let index = usize::from(port.wrapping_sub(self.port));
        let flow = self.flows.get_mut(index).with_context(|| format!("frame of unknown port {port}"))?;
        ensure!(frame.len() == flow.frame.bytes.len(), "frame of {} bytes", frame.len());
        let padding = payload_offset + PADDING;
        ensure!(frame[padding..] == flow.frame.bytes[padding..], "frame of port {port} is damaged");
        let (number, stamp) = frame[payload_offset..padding].split_at(4);
        let number = u32::from_be_bytes(number.try_into()?);
        let stamp = u64::from_be_bytes(stamp.try_into()?);
        ensure!(number < flow.next, "frame {number} of port {port} arrived but was never sent");

        let expected = std::mem::replace(&mut flow.expected, number + 1);
        let in_order = number <= expected || expected == flow.received;
        if number >= flow.received {
            self.tally.lost += u64::from(number - flow.received);
            flow.missing.extend(flow.received..number);
            flow.received = number + 1;
        } else if flow.missing.remove(&number) {
            self.tally.lost -= 1;
            self.tally.reordered += 1;
        } else {
            self.tally.doubled += 1;
        }
        Ok(Arrival { port, number, expected, in_order, stamp })
    }

    /// How many flows there are.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// How many frames were sent after the last one of their flow that arrived.
    pub fn in_flight(&self) -> u64 {
        self.flows.iter().map(|flow| u64::from(flow.next - flow.received)).sum()
    }

    /// The counts so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Returns the counts since the last call and resets them. Frames in flight count as lost.
    pub fn take_tally(&mut self) -> Tally {
        let lost = self.tally.lost + self.in_flight();
        for flow in &mut self.flows {
            flow.missing.clear();
            flow.received = flow.next;
            flow.expected = flow.next;
        }
        Tally { lost, ..std::mem::take(&mut self.tally) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes this many frames of the only flow and marks them as sent.
    fn send(flows: &mut Flows, count: usize) -> Vec<Vec<u8>> {
        let frame = |_| {
            let frame = flows.next(0).1.to_vec();
            flows.sent();
            frame
        };
        (0..count).map(frame).collect()
    }

    #[test]
    fn lost_doubled_and_reordered_frames_are_counted() {
        let mut flows = Flows::new(1000, 1);
        let frames = send(&mut flows, 6);
        for index in [0, 2, 1, 2, 4] {
            flows.receive(&frames[index]).unwrap();
        }
        assert_eq!(flows.tally(), Tally { sent: 6, lost: 1, doubled: 1, reordered: 1 });
        assert_eq!(flows.in_flight(), 1);
        assert_eq!(flows.take_tally(), Tally { sent: 6, lost: 2, doubled: 1, reordered: 1 });
        assert_eq!((flows.in_flight(), flows.tally()), (0, Tally::default()));
        let next = send(&mut flows, 1);
        flows.receive(&next[0]).unwrap();
        assert_eq!(flows.take_tally(), Tally { sent: 1, ..Tally::default() });
    }

    #[test]
    fn frames_that_arrive_twice_are_in_order_only_without_a_gap() {
        let mut flows = Flows::new(1000, 1);
        let frames = send(&mut flows, 5);
        let mut in_order = |index: usize| flows.receive(&frames[index]).unwrap().in_order;
        assert!([0, 1, 2, 3, 1, 2].into_iter().all(&mut in_order));
        assert!(!in_order(4));
    }
}
