//! A guest that writes wrong indices, descriptors and chains to its rings.

mod cases;

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::{self, Datapath, TestResult};
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::queue::{INDIRECT, NEXT, WRITE, write_descriptor};
use baton_tests::fake_frontend::{Buffer, Device, DriverQueue, Options, SharedSlice};
use baton_tests::hostile::Victim;
use baton_tests::process::until;
use baton_tests::{netns, on_both_datapaths};

use self::cases::CASES;

on_both_datapaths! {
    back_end_survives_wrong_rings,
    back_end_survives_wrong_rings_without_optional_features,
    broken_ring_does_not_affect_the_others,
    buffer_too_small_for_its_frame_loses_only_that_frame,
}

/// How many descriptors the queues have.
const SIZE: u16 = 1024;

/// What a case works with: a running device with empty rings.
struct Attack {
    device: Device,
    /// A guest address with 64 KiB behind it.
    buffer: u64,
    /// A guest address with room for a table of 2048 descriptors.
    table: u64,
    table_slice: SharedSlice,
}

impl Attack {
    fn queue(&mut self, vring: u32) -> &mut DriverQueue {
        &mut self.device.ring_mut(vring).queue
    }

    /// Makes one head available, whatever is in the table, and kicks.
    fn give(&mut self, vring: u32, head: u16) {
        self.give_at(vring, head, 1);
    }

    /// Puts a head at the next place of the available ring, and advances the index by `step`.
    fn give_at(&mut self, vring: u32, head: u16, step: u16) {
        let next = self.queue(vring).used_index();
        self.queue(vring).set_available(next, head);
        self.queue(vring).set_available_index(next.wrapping_add(step));
        self.device.ring(vring).kick().unwrap();
    }

    /// Makes a chain of one descriptor available on the transmit ring.
    fn transmit(&mut self, address: u64, length: u32, flags: u16) {
        self.queue(TX).set_descriptor(0, address, length, flags, 0);
        self.give(TX, 0);
    }

    /// Makes one buffer available on the receive ring.
    fn receive(&mut self, address: u64, length: u32, flags: u16) {
        self.queue(RX).set_descriptor(0, address, length, flags, 0);
        self.give(RX, 0);
    }

    /// Makes an indirect table of `length` bytes available on the transmit ring. All its descriptors are valid.
    fn indirect(&mut self, length: u32) {
        for number in 0..2047 {
            write_descriptor(&self.table_slice, number, self.buffer, 60, NEXT, number + 1);
        }
        write_descriptor(&self.table_slice, 2047, self.buffer, 60, 0, 0);
        let table = self.table;
        self.transmit(table, length, INDIRECT);
    }

    /// Transmits a valid frame with this header.
    fn header(&mut self, header: NetHeader) {
        self.device.memory.slice(self.buffer, 12).write(0, &header.encode());
        let buffer = self.buffer;
        self.transmit(buffer, 1500, 0);
    }
}

const RX: u32 = 0;
const TX: u32 = 1;

/// Runs all cases with these features.
fn attack_with(datapath: Datapath, features: u64) {
    let mut victim = Victim::new(datapath).unwrap();
    for (name, case) in CASES {
        eprintln!("{name}");
        let options = Options {
            features: features | features::PROTOCOL_FEATURES,
            queue_size: SIZE,
            canaries: false,
            ..Options::default()
        };
        let connection = victim.rig.backend.connect().unwrap();
        let mut device = Device::new(connection, options).unwrap();
        device.negotiate().unwrap();
        device.set_up().unwrap();
        let buffer = device.memory.allocate(0, 0x10000, 16);
        let table = device.memory.allocate(0, 16 * 2048, 16);
        let table_slice = device.memory.slice(table, 16 * 2048);
        let mut attack = Attack { device, buffer, table, table_slice };
        case(&mut attack);
        // Frames for the receive buffers, if there are any.
        victim.rig.inject(0..20, 1000).unwrap();
        attack.device.connection.get_features().unwrap_or_else(|error| panic!("{name}: {error:#}"));
        // The back-end still answers on its control socket.
        victim.rig.backend.status().unwrap();
        drop(attack);
        victim.check().unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
}

fn back_end_survives_wrong_rings(datapath: Datapath) {
    let features = features::VERSION_1 | features::MRG_RXBUF | features::INDIRECT_DESC | features::EVENT_IDX;
    attack_with(datapath, features);
}

fn back_end_survives_wrong_rings_without_optional_features(datapath: Datapath) {
    attack_with(datapath, 0);
}

fn broken_ring_does_not_affect_the_others(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let mut device = victim.rig.device(Options::default()).unwrap();
    // Breaks the transmit ring. Frames are still received.
    let queue = &device.pairs[0].transmit.queue;
    queue.set_available(queue.used_index(), u16::MAX);
    queue.set_available_index(queue.used_index().wrapping_add(1));
    device.ring(TX).kick().unwrap();
    victim.rig.inject(0..100, 100).unwrap();
    victim.rig.expect_in_guest(&mut device, 0..100).unwrap();
    drop(device);
    victim.check().unwrap();
}

fn buffer_too_small_for_its_frame_loses_only_that_frame(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let features = features::PROTOCOL_FEATURES | features::VERSION_1;
    let mut device = victim.rig.device(Options { features, ..Options::default() }).unwrap();
    let base = device.stop_ring(RX).unwrap();
    let address = device.memory.allocate(0, 64, 16);
    // Replaces all other buffers.
    let addresses = device.ring(RX).queue.addresses();
    let queue = DriverQueue::at(&device.memory, addresses, 256);
    device.ring_mut(RX).queue = queue;
    let queue = &mut device.ring_mut(RX).queue;
    let small = Buffer { address, length: 64, writable: true };
    queue.start_at(base);
    queue.add(&[small]).unwrap();
    queue.publish();
    device.restart_ring(RX, base).unwrap();
    victim.rig.inject(0..1, 1000).unwrap();
    victim
        .rig
        .backend
        .wait_pair_stats(0, |stats| stats.rx.dropped.is_none_or(|dropped| dropped == 1))
        .unwrap();
    drop(device);
    victim.check().unwrap();
}

/// User space only: vhost-net stops a ring at a malformed chain.
#[test]
fn unusable_receive_buffer_loses_no_frame() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        for (name, elsewhere, length, flags) in [
            ("empty", false, 0, WRITE),
            ("readable", false, 2048, 0),
            ("outside memory", true, 2048, WRITE),
            ("of the header's size", false, 12, WRITE),
        ] {
            eprintln!("{name}");
            let mut device = rig.device(Options { canaries: false, ..Options::default() }).unwrap();
            let base = device.stop_ring(RX).unwrap();
            let (buffer, _) = device.receive_buffers().nth(1).unwrap();
            let address = if elsewhere { 0xdead_0000_0000 } else { buffer };
            // The second available buffer.
            device.ring(RX).queue.set_descriptor(1, address, length, flags, 0);
            device.restart_ring(RX, base).unwrap();
            rig.inject(0..50, 3000).unwrap();
            rig.expect_in_guest(&mut device, 0..50).unwrap();
        }
    })
}

/// User space only, as above. A frame that is too large for the only usable buffer is lost; the ring continues.
#[test]
fn ring_with_one_usable_receive_buffer_continues() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        let options = Options { canaries: false, ..Options::default() };
        let size = options.queue_size;
        let mut device = rig.device(options).unwrap();
        let base = device.stop_ring(RX).unwrap();
        let (buffer, _) = device.receive_buffers().next().unwrap();
        for index in 1..size {
            device.ring(RX).queue.set_descriptor(index, buffer, 0, WRITE, 0);
        }
        device.restart_ring(RX, base).unwrap();
        rig.inject(0..1, 3000).unwrap();
        // All buffers come back, so the driver can replace them.
        let all = base.wrapping_add(size);
        until("all buffers are used", || Ok(device.ring(RX).queue.used_index() == all)).unwrap();
        rig.backend.check_healthy().unwrap();
    })
}

/// User space only, as above. The usable buffer is the first, and then behind all unusable ones. After large frames the
/// device looks for room for another large one, and so at every chain.
#[test]
fn small_frame_uses_the_only_usable_receive_buffer() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        for before in [100, 3000] {
            let options = Options { canaries: false, ..Options::default() };
            let size = options.queue_size;
            let mut device = rig.device(options).unwrap();
            rig.inject(0..5, before).unwrap();
            rig.expect_in_guest(&mut device, 0..5).unwrap();
            let base = device.stop_ring(RX).unwrap();
            let (buffer, _) = device.receive_buffers().next().unwrap();
            for index in (0..size).filter(|index| *index != base % size) {
                device.ring(RX).queue.set_descriptor(index, buffer, 0, WRITE, 0);
            }
            device.restart_ring(RX, base).unwrap();
            rig.inject(0..1, 100).unwrap();
            rig.expect_in_guest(&mut device, 0..1).unwrap();
            rig.inject(1..2, 100).unwrap();
            let all = base.wrapping_add(1).wrapping_add(size);
            until("all buffers are used", || Ok(device.ring(RX).queue.used_index() == all)).unwrap();
            for _ in 1..size {
                assert_eq!(device.pairs[0].receive.queue.pop().unwrap().length, 0);
            }
            rig.expect_in_guest(&mut device, 1..2).unwrap();
        }
    })
}

/// User space only: vhost-net gives the TAP the driver's header unchanged.
#[test]
fn header_length_beyond_the_frame_loses_no_frame() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        let mut device =
            rig.device(Options { transmit_pieces: vec![5, 7, 2048], ..Options::default() }).unwrap();
        for (number, hdr_len) in (0..).zip([100, 101, 2000, u16::MAX]) {
            let header = NetHeader { hdr_len, ..NetHeader::default() };
            device.send(0, &header, &baton_tests::frames::numbered(number, 100)).unwrap();
        }
        rig.expect_on_network(0..4).unwrap();
    })
}
