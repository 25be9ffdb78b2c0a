//! Dispatches accesses to ports and to memory-mapped I/O.
//!
//! A bus is filled before the vCPUs start and never changes after, so the vCPU threads look devices up without
//! a lock; each device has its own. A vCPU never waits for anything else with a device locked: the other vCPUs
//! read that device's registers in every interrupt.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

/// What a write has begun, and is complete only when it has ended.
#[derive(Debug)]
#[must_use = "the guest relies on it being done when its access ends"]
pub struct Pending {
    answer: Receiver<()>,
    ended: Arc<AtomicBool>,
}

impl Pending {
    /// It ends when `answer` is sent, or can no longer be.
    pub fn new(answer: Receiver<()>) -> Self {
        Self { answer, ended: Arc::default() }
    }

    /// Tells others that it has ended.
    pub fn ended(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.ended)
    }

    /// Waits for its end.
    pub fn wait(self) {
        // No answer: the thread that had to do it has ended.
        let _ = self.answer.recv();
        self.ended.store(true, Ordering::Release);
    }
}

/// What answers in a range of a bus. Offsets are relative to the range; the guest chooses them and the lengths
/// freely within it.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset`; gives what the write has to wait for, with the device unlocked.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending>;
}

struct Range {
    start: u64,
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// The ports, or the memory-mapped I/O, of a VM.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.ranges.iter().map(|range| (range.start, range.length))).finish()
    }
}

impl Bus {
    /// Lets `device` answer at `start..start + length`, which no other device may have.
    pub fn insert(&mut self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) {
        let at = self.ranges.partition_point(|range| range.start < start);
        debug_assert!(at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].length <= start);
        debug_assert!(at == self.ranges.len() || start + length <= self.ranges[at].start);
        self.ranges.insert(at, Range { start, length, device });
    }

    /// Reads; where there is no device, all bits are ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            let pending = device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
            pending.into_iter().for_each(Pending::wait);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let at = self.ranges.partition_point(|range| range.start <= address).checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = address - range.start;
        (offset < range.length).then_some((offset, &*range.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        written: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending> {
            self.written.push((offset, data.to_vec()));
            None
        }
    }

    #[test]
    fn an_access_reaches_the_device_of_its_range_only() {
        let (low, high) =
            (Arc::new(Mutex::new(Recorder::default())), Arc::new(Mutex::new(Recorder::default())));
        let mut bus = Bus::default();
        bus.insert(0x200, 8, high.clone());
        bus.insert(0x100, 8, low.clone());

        bus.write(0x107, &[1, 2]);
        bus.write(0x108, &[3]);
        bus.write(0x200, &[4]);
        bus.write(0xff, &[5]);

        assert_eq!(low.lock().unwrap().written, [(7, vec![1, 2])]);
        assert_eq!(high.lock().unwrap().written, [(0, vec![4])]);
    }

    #[test]
    fn a_range_without_a_device_reads_as_ones() {
        let mut bus = Bus::default();
        bus.insert(0x100, 8, Arc::new(Mutex::new(Recorder::default())));
        let mut data = [0; 2];
        bus.read(0x103, &mut data);
        assert_eq!(data, [3, 3]);
        bus.read(0x109, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }
}
