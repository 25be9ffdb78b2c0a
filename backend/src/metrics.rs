//! Counters of a queue pair, written by its worker and read by the control socket. They run on across sessions.
//!
//! Where the kernel moves the frames nobody here sees them: what was not counted is not told.

use std::sync::atomic::{AtomicU64, Ordering};

use baton_protocol::control::{Datapath, DirectionStats, QueuePairStats};
use baton_protocol::handover::wire::device::DirectionCounters;

/// The largest frame that is sent as it is: Ethernet header, 1500 bytes, VLAN tag.
const LARGEST_PLAIN: usize = 1518;

/// One counter, written by a single thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. There is only one writer, hence no locked instruction.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Makes it `value` if it is less.
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
    /// Frames given up.
    pub dropped: Counter,
    /// Frames discarded because the vring is disabled.
    pub discarded: Counter,
    /// Notifications received.
    pub kicks: Counter,
    /// Notifications sent.
    pub calls: Counter,
}

impl Direction {
    /// Counts one frame of `length` bytes, its header excluded.
    #[inline]
    pub fn frame(&self, length: usize) {
        self.frames.add(1);
        self.bytes.add(length as u64);
        if length > LARGEST_PLAIN {
            self.large_frames.add(1);
        }
        self.largest_frame.raise(length as u64);
    }

    /// What was counted so far, for another process to go on from.
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

    /// Goes on from what another process counted. The worker must be parked.
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
    /// All of them now that are known with this datapath.
    pub fn snapshot(&self, datapath: Datapath) -> QueuePairStats {
        QueuePairStats { rx: self.rx.snapshot(datapath), tx: self.tx.snapshot(datapath) }
    }
}
