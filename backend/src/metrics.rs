//! Counters of a queue pair. The worker writes them and the control socket reports them. They continue across sessions.
//!
//! Frames that the kernel moves are not counted, so with vhost-net most counters are absent from the report.

use std::sync::atomic::{AtomicU64, Ordering};

use baton_protocol::control::{Datapath, DirectionStats, QueuePairStats};
use baton_protocol::handover::wire::device::DirectionCounters;

/// The largest frame that needs no segmentation: Ethernet header, 1500 bytes, VLAN tag.
const LARGEST_PLAIN: usize = 1518;

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`, without a locked instruction, since there is only one writer.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Raises the counter to `value`, if it is less.
    #[inline]
    fn raise(&self, value: u64) {
        if self.get() < value {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// The counters of one direction.
#[derive(Debug, Default)]
pub struct Direction {
    frames: Counter,
    bytes: Counter,
    large_frames: Counter,
    largest_frame: Counter,
    /// Frames or chains that were dropped.
    pub dropped: Counter,
    /// Chains that were discarded because the vring is disabled.
    pub discarded: Counter,
    /// Kicks received.
    pub kicks: Counter,
    /// Calls made.
    pub calls: Counter,
}

impl Direction {
    /// Counts a frame of `length` bytes, without the virtio-net header.
    #[inline]
    pub fn frame(&self, length: usize) {
        self.frames.add(1);
        self.bytes.add(length as u64);
        if length > LARGEST_PLAIN {
            self.large_frames.add(1);
        }
        self.largest_frame.raise(length as u64);
    }

    /// Returns the counters, for another process to continue from.
    pub fn save(&self) -> DirectionCounters {
        DirectionCounters {
            frames: self.frames.get(),
            bytes: self.bytes.get(),
            large_frames: self.large_frames.get(),
            largest_frame: self.largest_frame.get(),
            dropped: self.dropped.get(),
            discarded: self.discarded.get(),
            kicks: self.kicks.get(),
            calls: self.calls.get(),
        }
    }

    /// Continues from the counters of another process. The worker must be parked.
    pub fn restore(&self, saved: &DirectionCounters) {
        let DirectionCounters {
            frames,
            bytes,
            large_frames,
            largest_frame,
            dropped,
            discarded,
            kicks,
            calls,
        } = *saved;
        self.frames.set(frames);
        self.bytes.set(bytes);
        self.large_frames.set(large_frames);
        self.largest_frame.set(largest_frame);
        self.dropped.set(dropped);
        self.discarded.set(discarded);
        self.kicks.set(kicks);
        self.calls.set(calls);
    }

    fn snapshot(&self, datapath: Datapath) -> DirectionStats {
        let discarded = self.discarded.get();
        match datapath {
            Datapath::Userspace => DirectionStats {
                frames: Some(self.frames.get()),
                bytes: Some(self.bytes.get()),
                large_frames: Some(self.large_frames.get()),
                largest_frame: Some(self.largest_frame.get()),
                dropped: Some(self.dropped.get()),
                discarded,
                kicks: Some(self.kicks.get()),
                calls: Some(self.calls.get()),
            },
            Datapath::VhostNet => DirectionStats { discarded, ..DirectionStats::default() },
        }
    }
}

/// The counters of one queue pair.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// TAP to guest.
    pub rx: Direction,
    /// Guest to TAP.
    pub tx: Direction,
}

impl PairCounters {
    /// Returns the counters that are known with this datapath.
    pub fn snapshot(&self, datapath: Datapath) -> QueuePairStats {
        QueuePairStats { rx: self.rx.snapshot(datapath), tx: self.tx.snapshot(datapath) }
    }
}
