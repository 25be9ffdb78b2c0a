//! Dispatches accesses to ports and to memory-mapped I/O.
//!
//! A bus does not change once the vCPUs run, so the vCPU threads look up devices without a lock. Each device has its
//! own lock. A vCPU never waits for anything while it holds that lock, because the other vCPUs read the device's
//! registers in every interrupt.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

/// An operation that a write has begun. The write is complete only when the operation ends.
#[derive(Debug)]
#[must_use = "the guest relies on the operation being complete when its access ends"]
pub struct Pending {
    answer: Receiver<()>,
    ended: Arc<AtomicBool>,
}

impl Pending {
    /// Creates an operation that ends when `answer` receives a message, or its sender is dropped.
    pub fn new(answer: Receiver<()>) -> Self {
        Self { answer, ended: Arc::default() }
    }

    /// Returns a flag that becomes true when the operation has ended.
    pub fn ended(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.ended)
    }

    /// Waits for the operation to end.
    pub fn wait(self) {
        // An error means that the thread that carries out the operation has ended.
        let _ = self.answer.recv();
        self.ended.store(true, Ordering::Release);
    }
}

/// A device in a range of a bus. Offsets are relative to the range. The guest chooses the offset, within the range, and
/// the length of an access.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Handles the guest's write at `offset`. Returns the operation that the write waits for with the device unlocked.
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
    /// Adds `device` at `start..start + length`, which must not overlap another device's range.
    pub fn insert(&mut self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) {
        let at = self.ranges.partition_point(|range| range.start < start);
        debug_assert!(at == 0 || self.ranges[at - 1].start + self.ranges[at - 1].length <= start);
        debug_assert!(at == self.ranges.len() || start + length <= self.ranges[at].start);
        self.ranges.insert(at, Range { start, length, device });
    }

    /// Reads from the device at `address`. Without a device, all bits are ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address` and waits until the write is complete. Does nothing without a device.
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
    fn access_reaches_only_the_device_of_its_range() {
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
    fn address_without_a_device_reads_as_ones() {
        let mut bus = Bus::default();
        bus.insert(0x100, 8, Arc::new(Mutex::new(Recorder::default())));
        let mut data = [0; 2];
        bus.read(0x103, &mut data);
        assert_eq!(data, [3, 3]);
        bus.read(0x109, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }
}
