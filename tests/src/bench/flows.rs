//! Numbered and stamped frames of one direction, in flows, and what became of them.

use std::collections::BTreeSet;

use anyhow::{Context, Result};

use super::message::{Count, Worst};
use crate::frames::{Network, Segment, Transport, segment};

/// A frame's payload: number, stamp, and some bytes more.
const PAYLOAD: usize = 64;

/// A flow, with its next frame.
#[derive(Debug)]
struct Flow {
    frame: Segment,
    /// The number of the next frame to be sent.
    next: u32,
    /// The number of the frame that should arrive next.
    expected: u32,
    /// Those before it that have not arrived.
    missing: BTreeSet<u32>,
}

/// All flows of a direction.
#[derive(Debug)]
pub struct Flows {
    flows: Vec<Flow>,
    port: u16,
    turn: usize,
    /// When the last frame arrived.
    arrived: Option<u64>,
    worst: Worst,
    count: Count,
}

impl Flows {
    /// So many, told apart by their UDP ports from `port` on.
    pub fn new(port: u16, flows: u16) -> Self {
        let flow = |port: u16| {
            let mut frame = segment(Network::V4, Transport::Udp, &[0x5a; PAYLOAD]);
            let place = frame.transport_offset;
            frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
            Flow { frame, next: 0, expected: 0, missing: BTreeSet::new() }
        };
        Self {
            flows: (0..flows).map(|index| flow(port + index)).collect(),
            port,
            turn: 0,
            arrived: None,
            worst: Worst::default(),
            count: Count::default(),
        }
    }

    /// The next frame, with the number of its flow. It is sent once [`Self::sent`] is called.
    pub fn next(&mut self, now: u64) -> (usize, &[u8]) {
        let flow = &mut self.flows[self.turn];
        let place = flow.frame.payload_offset;
        flow.frame.bytes[place..place + 4].copy_from_slice(&flow.next.to_be_bytes());
        flow.frame.bytes[place + 4..place + 12].copy_from_slice(&now.to_be_bytes());
        (self.turn, &flow.frame.bytes)
    }

    /// It was sent.
    pub fn sent(&mut self) {
        let flow = &mut self.flows[self.turn];
        flow.next = flow.next.wrapping_add(1);
        self.count.sent += 1;
        self.turn = (self.turn + 1) % self.flows.len();
    }

    /// A frame arrived.
    ///
    /// # Errors
    /// If it is none of ours.
    pub fn arrived(&mut self, frame: &[u8], now: u64) -> Result<()> {
        let (transport, payload) = (self.flows[0].frame.transport_offset, self.flows[0].frame.payload_offset);
        let port = frame.get(transport..transport + 2).context("a short frame")?;
        let port = u16::from_be_bytes(port.try_into()?);
        let index = usize::from(port.wrapping_sub(self.port));
        let flow = self.flows.get_mut(index).with_context(|| format!("a frame of port {port}"))?;
        let number = frame.get(payload..payload + 4).context("a short frame")?;
        let number = u32::from_be_bytes(number.try_into()?);
        let stamp = frame.get(payload + 4..payload + 12).context("a short frame")?;
        let stamp = u64::from_be_bytes(stamp.try_into()?);

        if number >= flow.expected {
            flow.missing.extend(flow.expected..number);
            flow.expected = number + 1;
        } else if flow.missing.remove(&number) {
            self.count.reordered += 1;
        } else {
            self.count.doubled += 1;
        }
        let gap = self.arrived.replace(now).map_or(0, |before| now.saturating_sub(before));
        self.worst = self.worst.or(Worst { gap, delay: now.saturating_sub(stamp) });
        Ok(())
    }

    /// How many flows there are.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// How many have not arrived.
    pub fn outstanding(&self) -> u64 {
        let of = |flow: &Flow| flow.missing.len() as u64 + u64::from(flow.next - flow.expected);
        self.flows.iter().map(of).sum()
    }

    /// The worst since the last time.
    pub fn take_worst(&mut self) -> Worst {
        std::mem::take(&mut self.worst)
    }

    /// Everything since the last time; what has not arrived is lost. To be called while nothing is sent.
    pub fn take_count(&mut self) -> Count {
        let count = Count { lost: self.outstanding(), ..std::mem::take(&mut self.count) };
        for flow in &mut self.flows {
            flow.missing.clear();
            flow.expected = flow.next;
        }
        self.arrived = None;
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends the next frame of the only flow.
    fn send(flows: &mut Flows, now: u64) -> Vec<u8> {
        let frame = flows.next(now).1.to_vec();
        flows.sent();
        frame
    }

    #[test]
    fn what_became_of_each_frame_is_counted() {
        let mut flows = Flows::new(1000, 1);
        let frames: Vec<_> = (0..6).map(|_| send(&mut flows, 0)).collect();
        for index in [0, 2, 1, 2, 4] {
            flows.arrived(&frames[index], 0).unwrap();
        }
        assert_eq!(flows.outstanding(), 2);
        let count = flows.take_count();
        assert_eq!((count.sent, count.lost, count.doubled, count.reordered), (6, 2, 1, 1));
        assert_eq!(flows.outstanding(), 0);
        let next = send(&mut flows, 0);
        flows.arrived(&next, 0).unwrap();
        assert_eq!(flows.take_count(), Count { sent: 1, ..Count::default() });
    }

    #[test]
    fn the_worst_of_an_interval_is_kept() {
        let mut flows = Flows::new(1000, 1);
        for (sent, arrived) in [(10, 15), (20, 45), (50, 55)] {
            let frame = send(&mut flows, sent);
            flows.arrived(&frame, arrived).unwrap();
        }
        assert_eq!(flows.take_worst(), Worst { gap: 30, delay: 25 });
        assert_eq!(flows.take_worst(), Worst::default());
    }
}
