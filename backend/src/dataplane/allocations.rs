//! Checks that moving frames allocates no memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Turn;
use super::ring::{Kick, Ring};
use super::rx::{Rx, RxSettings};
use super::tx::Tx;
use crate::args::IoUring;
use crate::memory::{GuestMemory, RegionLayout};
use crate::metrics::Direction;
use crate::net_header;
use crate::tap::TapQueue;
use crate::tap::batch::BatchWriter;
use crate::vring::{RingAddresses, Vring, VringLayout};

/// Descriptors in a ring, and frames that are moved at once.
const SIZE: u16 = 64;
/// Bytes of a buffer.
const BUFFER: u32 = 2048;
/// `VIRTQ_DESC_F_WRITE`.
const WRITABLE: u16 = 2;
/// Guest address of the available ring.
const AVAILABLE: u64 = 0x1000;
/// Guest address of the first buffer.
const BUFFERS: u64 = 0x4000;

/// The driver of a ring whose chains are one buffer each, in the order of the descriptors.
struct Driver {
    memory: File,
    available: u16,
}

impl Driver {
    /// Creates a ring, in memory of its own, of buffers of `length` bytes with these flags.
    fn new(length: u32, flags: u16) -> (Self, Ring) {
        let memory = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
        let size = BUFFERS + u64::from(SIZE) * u64::from(BUFFER);
        memory.set_len(size).unwrap();
        for index in 0..SIZE {
            let mut descriptor = (BUFFERS + u64::from(index) * u64::from(BUFFER)).to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend([0, 0]);
            memory.write_all_at(&descriptor, 16 * u64::from(index)).unwrap();
            memory.write_all_at(&index.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(index)).unwrap();
        }
        let layout = RegionLayout { guest_address: 0, size, user_address: 0, file_offset: 0 };
        let mapped = GuestMemory::map([(layout, memory.try_clone().unwrap())]).unwrap();
        let addresses = RingAddresses { descriptors: 0, available: AVAILABLE, used: 0x2000 };
        let layout = VringLayout { size: SIZE, addresses, event_idx: false, indirect: false };
        let ring = Ring {
            vring: Vring::new(layout, Arc::new(mapped), None).unwrap(),
            kick: Kick::Polled,
            error: None,
            call_due: false,
            held: false,
            enabled: true,
            broken: false,
        };
        (Self { memory, available: 0 }, ring)
    }

    /// Makes all buffers available again.
    fn offer(&mut self) {
        self.available = self.available.wrapping_add(SIZE);
        self.memory.write_all_at(&self.available.to_le_bytes(), AVAILABLE + 2).unwrap();
    }
}

/// Returns a TAP's queue, which is a socket here, and the network.
fn queue() -> (TapQueue, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    (TapQueue::new(File::from(OwnedFd::from(near))), far)
}

/// Runs `round` a few times, then counts the allocations of many rounds.
fn allocations(mut round: impl FnMut()) -> u64 {
    (0..3).for_each(|_| round());
    allocation_counter::measure(|| (0..20).for_each(|_| round())).count_total
}

fn check_transmit(mut writer: Option<BatchWriter>) {
    let (tap, network) = queue();
    let (mut driver, ring) = Driver::new(100, 0);
    let mut tx = Tx::default();
    (tx.ring, tx.header, tx.unlimited) = (Some(ring), net_header::LONG, true);
    let counters = Direction::default();
    let count = allocations(|| {
        driver.offer();
        // The network's queue is short.
        let mut left = SIZE;
        while left > 0 {
            tx.run(0, &tap, &counters, writer.as_mut());
            while network.recv(&mut [0; 100]).is_ok() {
                left -= 1;
            }
            tx.writable();
        }
    });
    assert_eq!(count, 0);
}

#[test]
fn transmitting_allocates_nothing() {
    check_transmit(None);
}

#[test]
fn transmitting_batches_allocates_nothing() {
    let mut writer = BatchWriter::new(IoUring::Auto);
    while !writer.is_ready() {}
    check_transmit(Some(writer));
}

#[test]
fn receiving_allocates_nothing() {
    let (tap, network) = queue();
    let (mut driver, ring) = Driver::new(BUFFER, WRITABLE);
    let settings = RxSettings { header: net_header::LONG, mergeable: true, ..RxSettings::default() };
    let mut rx = Rx::default();
    (rx.ring, rx.settings) = (Some(ring), settings);
    let counters = Direction::default();
    let count = allocations(|| {
        driver.offer();
        for _ in 0..SIZE {
            network.send(&[0; 100]).unwrap();
            assert_eq!(rx.run(0, &tap, &counters), Turn::Done);
        }
    });
    assert_eq!(count, 0);
}
