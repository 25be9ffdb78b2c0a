//! A guest that writes to its rings what it should not: every case is one line of a table, and after each the same
//! process serves a good front-end and has lost nothing.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::{self, Datapath, TestResult};
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::queue::{INDIRECT, NEXT, WRITE, write_descriptor};
use baton_tests::fake_frontend::wire::{Message, request};
use baton_tests::fake_frontend::{Buffer, Device, DriverQueue, Options, SharedSlice};
use baton_tests::hostile::Victim;
use baton_tests::process::until;
use baton_tests::{netns, on_both_datapaths};

on_both_datapaths! {
    wrong_rings_harm_nobody,
    wrong_rings_harm_nobody_without_optional_features,
    a_ring_gone_wrong_leaves_the_others_alone,
    a_buffer_too_small_for_its_frame_loses_that_frame_alone,
}

/// How many descriptors the queues have.
const SIZE: u16 = 1024;

/// What a case works with: a running device whose rings are empty.
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

    /// Puts a head at the next place of the available ring, and moves the index on by `step`.
    fn give_at(&mut self, vring: u32, head: u16, step: u16) {
        let next = self.queue(vring).used_index();
        self.queue(vring).set_available(next, head);
        self.queue(vring).set_available_index(next.wrapping_add(step));
        self.device.ring(vring).kick().unwrap();
    }

    /// One chain of one descriptor on the transmit ring.
    fn transmit(&mut self, address: u64, length: u32, flags: u16) {
        self.queue(TX).set_descriptor(0, address, length, flags, 0);
        self.give(TX, 0);
    }

    /// One buffer on the receive ring.
    fn receive(&mut self, address: u64, length: u32, flags: u16) {
        self.queue(RX).set_descriptor(0, address, length, flags, 0);
        self.give(RX, 0);
    }

    /// An indirect table of `length` bytes on the transmit ring, whose descriptors are all sound.
    fn indirect(&mut self, length: u32) {
        for number in 0..2047 {
            write_descriptor(&self.table_slice, number, self.buffer, 60, NEXT, number + 1);
        }
        write_descriptor(&self.table_slice, 2047, self.buffer, 60, 0, 0);
        let table = self.table;
        self.transmit(table, length, INDIRECT);
    }

    /// A sound frame with this header.
    fn header(&mut self, header: NetHeader) {
        self.device.memory.slice(self.buffer, 12).write(0, &header.encode());
        let buffer = self.buffer;
        self.transmit(buffer, 1500, 0);
    }
}

const RX: u32 = 0;
const TX: u32 = 1;

type Case = (&'static str, fn(&mut Attack));

const CASES: &[Case] = &[
    ("a descriptor that is its own next", |attack| {
        attack.queue(TX).set_descriptor(0, 0, 0, NEXT, 0);
        attack.give(TX, 0);
    }),
    ("a loop of two descriptors", |attack| {
        let buffer = attack.buffer;
        attack.queue(TX).set_descriptor(0, buffer, 60, NEXT, 1);
        attack.queue(TX).set_descriptor(1, buffer, 60, NEXT, 0);
        attack.give(TX, 0);
    }),
    ("a loop of all descriptors", |attack| {
        let buffer = attack.buffer;
        for number in 0..SIZE {
            attack.queue(TX).set_descriptor(number, buffer, 1, NEXT, (number + 1) % SIZE);
        }
        attack.give(TX, 5);
    }),
    ("a loop of buffers to receive into", |attack| {
        let buffer = attack.buffer;
        attack.queue(RX).set_descriptor(0, buffer, 100, NEXT | WRITE, 1);
        attack.queue(RX).set_descriptor(1, buffer, 100, NEXT | WRITE, 0);
        attack.give(RX, 0);
    }),
    ("a next that does not exist", |attack| {
        let buffer = attack.buffer;
        attack.queue(TX).set_descriptor(0, buffer, 60, NEXT, SIZE);
        attack.give(TX, 0);
        attack.queue(RX).set_descriptor(0, buffer, 60, NEXT | WRITE, u16::MAX);
        attack.give(RX, 0);
    }),
    ("a head that does not exist", |attack| attack.give(TX, SIZE)),
    ("a head far away", |attack| attack.give(TX, u16::MAX)),
    ("a head to receive into that does not exist", |attack| attack.give(RX, SIZE)),
    ("an available index one ahead of what fits", |attack| attack.give_at(TX, 0, SIZE + 1)),
    ("an available index far ahead", |attack| attack.give_at(TX, 0, 0x8000)),
    ("an available index that goes back", |attack| attack.give_at(TX, 0, u16::MAX)),
    ("an available index to receive with that goes back", |attack| attack.give_at(RX, 0, u16::MAX)),
    ("the whole ring at once, all the same head", |attack| {
        let buffer = attack.buffer;
        attack.queue(TX).set_descriptor(0, buffer, 100, 0, 0);
        attack.give_at(TX, 0, SIZE);
    }),
    ("a chain without a byte", |attack| attack.transmit(0, 0, 0)),
    ("a chain of a thousand empty descriptors", |attack| {
        for number in 0..SIZE - 1 {
            attack.queue(TX).set_descriptor(number, 0, 0, NEXT, number + 1);
        }
        attack.queue(TX).set_descriptor(SIZE - 1, 0, 0, 0, 0);
        attack.give(TX, 0);
    }),
    ("empty buffers to receive into", |attack| {
        let buffer = attack.buffer;
        attack.queue(RX).set_descriptor(0, buffer, 0, WRITE, 0);
        attack.give_at(RX, 0, SIZE);
    }),
    ("a header and no frame", |attack| {
        for length in 1..=12 + 14 {
            let buffer = attack.buffer;
            attack.transmit(buffer, length, 0);
            attack.device.connection.get_features().unwrap();
        }
    }),
    ("a buffer outside memory", |attack| attack.transmit(0xdead_0000_0000, 1500, 0)),
    ("a buffer to receive into outside memory", |attack| attack.receive(0xdead_0000_0000, 1500, WRITE)),
    ("a buffer that wraps", |attack| attack.transmit(u64::MAX - 10, 1500, 0)),
    ("a buffer to receive into that wraps", |attack| attack.receive(u64::MAX - 10, 1500, WRITE)),
    ("a buffer that leaves its region", |attack| {
        let place = attack.device.memory.regions()[0].place;
        attack.transmit(place.guest_address + place.size - 10, 1500, 0);
        attack.receive(place.guest_address + place.size - 10, 1500, WRITE);
    }),
    ("a buffer of 4 GiB", |attack| {
        let buffer = attack.buffer;
        attack.transmit(buffer, u32::MAX, 0);
        attack.receive(buffer, u32::MAX, WRITE);
    }),
    ("a frame larger than any", |attack| {
        let buffer = attack.buffer;
        for number in 0..3 {
            attack.queue(TX).set_descriptor(number, buffer, 60_000, NEXT, number + 1);
        }
        attack.queue(TX).set_descriptor(3, buffer, 60_000, 0, 0);
        attack.give(TX, 0);
    }),
    ("a front-end's address where a guest's belongs", |attack| {
        let address = attack.device.memory.user_address(attack.buffer);
        attack.transmit(address, 1500, 0);
        attack.receive(address, 1500, WRITE);
    }),
    ("a writable buffer to transmit", |attack| {
        let buffer = attack.buffer;
        attack.transmit(buffer, 1500, WRITE);
    }),
    ("a readable buffer to receive into", |attack| {
        let buffer = attack.buffer;
        attack.receive(buffer, 1500, 0);
    }),
    ("readable and writable buffers, mixed", |attack| {
        let buffer = attack.buffer;
        for vring in [TX, RX] {
            attack.queue(vring).set_descriptor(0, buffer, 100, NEXT, 1);
            attack.queue(vring).set_descriptor(1, buffer, 100, NEXT | WRITE, 2);
            attack.queue(vring).set_descriptor(2, buffer, 100, 0, 0);
            attack.give(vring, 0);
        }
    }),
    ("unknown descriptor flags", |attack| {
        let buffer = attack.buffer;
        attack.transmit(buffer, 100, 0xfff8);
    }),
    ("buffers on the rings themselves", |attack| {
        for vring in [TX, RX] {
            let rings = attack.queue(vring).addresses();
            for (number, address) in (0u16..).zip([rings.descriptors, rings.available, rings.used]) {
                attack.queue(vring).set_descriptor(
                    number,
                    address,
                    2000,
                    if vring == RX { WRITE } else { 0 },
                    0,
                );
                attack.give(vring, number);
            }
        }
    }),
    ("chains of every length to transmit", |attack| {
        for length in [1, 2, 3, 17, 18, 19, 20, 63, 64, 65, 127, 255, 256, 511, 512, 1022, 1023, 1024] {
            let buffer = attack.buffer;
            for number in 0..length {
                let flags = if number + 1 < length { NEXT } else { 0 };
                attack.queue(TX).set_descriptor(
                    number,
                    buffer + u64::from(number) * 16,
                    16,
                    flags,
                    number + 1,
                );
            }
            attack.give(TX, 0);
            attack.device.connection.get_features().unwrap();
        }
    }),
    ("chains of every length to receive into", |attack| {
        for length in [2, 18, 19, 20, 64, 65, 256, 1023, 1024] {
            let buffer = attack.buffer;
            for number in 0..length {
                let flags = WRITE | if number + 1 < length { NEXT } else { 0 };
                attack.queue(RX).set_descriptor(number, buffer + u64::from(number) * 4, 4, flags, number + 1);
            }
            attack.give(RX, 0);
            attack.device.connection.get_features().unwrap();
        }
    }),
    ("indirect tables of silly lengths", |attack| {
        for length in [0, 1, 15, 17, 31, 16 * 1024, 16 * 1025, 16 * 2048, 0xffff_fff0, u32::MAX] {
            attack.indirect(length);
            attack.device.connection.get_features().unwrap();
        }
    }),
    ("an indirect table outside memory", |attack| attack.transmit(0xdead_0000_0000, 64, INDIRECT)),
    ("an indirect table that wraps", |attack| attack.transmit(u64::MAX - 31, 64, INDIRECT)),
    ("an indirect table at an odd address", |attack| {
        let table = attack.table + 1;
        attack.transmit(table, 64, INDIRECT);
    }),
    ("an indirect table within an indirect table", |attack| {
        let table = attack.table;
        write_descriptor(&attack.table_slice, 0, table, 32, INDIRECT, 0);
        write_descriptor(&attack.table_slice, 1, table, 32, INDIRECT | NEXT, 0);
        attack.transmit(table, 32, INDIRECT);
    }),
    ("an indirect table that loops", |attack| {
        let (table, buffer) = (attack.table, attack.buffer);
        write_descriptor(&attack.table_slice, 0, buffer, 60, NEXT, 1);
        write_descriptor(&attack.table_slice, 1, buffer, 60, NEXT, 0);
        attack.transmit(table, 32, INDIRECT);
        attack.receive(table, 32, INDIRECT | WRITE);
    }),
    ("an indirect table whose next leaves it", |attack| {
        let (table, buffer) = (attack.table, attack.buffer);
        write_descriptor(&attack.table_slice, 0, buffer, 60, NEXT, 2);
        attack.transmit(table, 32, INDIRECT);
    }),
    ("an indirect table in the middle of a chain", |attack| {
        let (table, buffer) = (attack.table, attack.buffer);
        write_descriptor(&attack.table_slice, 0, buffer, 60, 0, 0);
        attack.queue(TX).set_descriptor(0, buffer, 60, NEXT, 1);
        attack.queue(TX).set_descriptor(1, table, 16, INDIRECT | NEXT, 0);
        attack.give(TX, 0);
    }),
    ("headers that claim impossible offloads", |attack| {
        for gso_type in [0, 1, 2, 3, 4, 5, 0x7f, 0x80, 0x81, 0xff] {
            for (hdr_len, gso_size, csum_start, csum_offset) in [
                (0, 0, 0, 0),
                (0, 1, 0, 0),
                (u16::MAX, u16::MAX, u16::MAX, u16::MAX),
                (54, 1400, 34, 16),
                (1, 1, 1487, 0),
                (54, 1, 1488, u16::MAX),
            ] {
                for flags in [0, 1, 0xff] {
                    let num_buffers = u16::MAX;
                    let header = NetHeader {
                        flags,
                        gso_type,
                        hdr_len,
                        gso_size,
                        csum_start,
                        csum_offset,
                        num_buffers,
                    };
                    attack.header(header);
                    attack.device.connection.get_features().unwrap();
                }
            }
        }
    }),
    ("a used ring that the guest writes", |attack| {
        for value in [0x5555, 0xffff, 0, 1] {
            attack.queue(TX).raw()[2].store_u16(2, value, std::sync::atomic::Ordering::Release);
            attack.queue(RX).raw()[2].fill(0xff);
            let buffer = attack.buffer;
            attack.transmit(buffer, 100, 0);
            attack.receive(buffer, 1500, WRITE);
            let _ = attack.device.stop_ring(TX);
            let _ = attack.device.restart_ring(TX, value);
        }
    }),
    ("event indices that the guest writes", |attack| {
        for value in [0, 1, 0x7fff, 0x8000, 0xffff] {
            attack.queue(TX).set_used_event(value);
            attack.queue(RX).set_used_event(value);
            let buffer = attack.buffer;
            attack.transmit(buffer, 100, 0);
            attack.receive(buffer, 1500, WRITE);
        }
    }),
    ("a broken ring that is set up anew works", |attack| {
        attack.give(TX, u16::MAX);
        attack.device.connection.get_features().unwrap();
        attack.device.stop_ring(TX).unwrap();
        let queue = attack.queue(TX);
        let used = queue.used_index();
        queue.start_at(used);
        attack.device.restart_ring(TX, used).unwrap();
        attack.device.send(0, &NetHeader::default(), &baton_tests::frames::numbered(1, 100)).unwrap();
        attack.device.wait_transmitted(0).unwrap();
    }),
    ("stopped while it is fed", |attack| {
        let buffer = attack.buffer;
        for _ in 0..50 {
            attack.queue(TX).set_descriptor(0, buffer, 100, 0, 0);
            attack.give_at(TX, 0, SIZE);
            let message = Message::vring_state(request::GET_VRING_BASE, TX, 0);
            attack.device.connection.ask(&message).unwrap();
            let base = attack.queue(TX).used_index();
            attack.device.restart_ring(TX, base).unwrap();
        }
    }),
];

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
        // Frames for whatever there is to receive into.
        victim.rig.inject(0..20, 1000).unwrap();
        attack.device.connection.get_features().unwrap_or_else(|error| panic!("{name}: {error:#}"));
        // The rest of the process is not held up either.
        victim.rig.backend.status().unwrap();
        drop(attack);
        victim.check().unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
}

fn wrong_rings_harm_nobody(datapath: Datapath) {
    let features = features::VERSION_1 | features::MRG_RXBUF | features::INDIRECT_DESC | features::EVENT_IDX;
    attack_with(datapath, features);
}

fn wrong_rings_harm_nobody_without_optional_features(datapath: Datapath) {
    attack_with(datapath, 0);
}

fn a_ring_gone_wrong_leaves_the_others_alone(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let mut device = victim.rig.device(Options::default()).unwrap();
    // The transmit ring is broken; frames are received all the same.
    let queue = &device.pairs[0].transmit.queue;
    queue.set_available(queue.used_index(), u16::MAX);
    queue.set_available_index(queue.used_index().wrapping_add(1));
    device.ring(TX).kick().unwrap();
    victim.rig.inject(0..100, 100).unwrap();
    victim.rig.expect_in_guest(&mut device, 0..100).unwrap();
    drop(device);
    victim.check().unwrap();
}

fn a_buffer_too_small_for_its_frame_loses_that_frame_alone(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let features = features::PROTOCOL_FEATURES | features::VERSION_1;
    let mut device = victim.rig.device(Options { features, ..Options::default() }).unwrap();
    let base = device.stop_ring(RX).unwrap();
    let address = device.memory.allocate(0, 64, 16);
    // Instead of all the others.
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

/// In user space: the kernel's vhost-net stops at a bad chain.
#[test]
fn an_unusable_receive_buffer_costs_only_itself() -> TestResult {
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
            // The second of the buffers that are available.
            device.ring(RX).queue.set_descriptor(1, address, length, flags, 0);
            device.restart_ring(RX, base).unwrap();
            rig.inject(0..50, 3000).unwrap();
            rig.expect_in_guest(&mut device, 0..50).unwrap();
        }
    })
}

/// In user space, as above. What is too large for the one good buffer is lost; the ring is not.
#[test]
fn a_ring_with_one_usable_receive_buffer_goes_on() -> TestResult {
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
        // All buffers come back, for the driver to make usable ones of them.
        let all = base.wrapping_add(size);
        until("all buffers are used", || Ok(device.ring(RX).queue.used_index() == all)).unwrap();
        rig.backend.check_healthy().unwrap();
    })
}

/// In user space, as above: the good buffer is the first, and then behind all bad ones. After large frames the device
/// looks for room for another one, and so at every chain.
#[test]
fn a_small_frame_takes_the_one_usable_receive_buffer() -> TestResult {
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

/// In user space: the kernel's vhost-net gives the TAP the driver's header as it is.
#[test]
fn a_header_length_beyond_the_frame_loses_nothing() -> TestResult {
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
