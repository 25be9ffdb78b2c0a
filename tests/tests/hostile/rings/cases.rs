//! The cases: wrong rings.

use baton_tests::fake_frontend::net::NetHeader;
use baton_tests::fake_frontend::queue::{INDIRECT, NEXT, WRITE, write_descriptor};
use baton_tests::fake_frontend::wire::{Message, request};

use super::{Attack, RX, SIZE, TX};

pub(super) type Case = (&'static str, fn(&mut Attack));

pub(super) const CASES: &[Case] = &[
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
    ("a loop of receive buffers", |attack| {
        let buffer = attack.buffer;
        attack.queue(RX).set_descriptor(0, buffer, 100, NEXT | WRITE, 1);
        attack.queue(RX).set_descriptor(1, buffer, 100, NEXT | WRITE, 0);
        attack.give(RX, 0);
    }),
    ("a next descriptor that does not exist", |attack| {
        let buffer = attack.buffer;
        attack.queue(TX).set_descriptor(0, buffer, 60, NEXT, SIZE);
        attack.give(TX, 0);
        attack.queue(RX).set_descriptor(0, buffer, 60, NEXT | WRITE, u16::MAX);
        attack.give(RX, 0);
    }),
    ("a head that does not exist", |attack| attack.give(TX, SIZE)),
    ("a head far beyond the table", |attack| attack.give(TX, u16::MAX)),
    ("a receive head that does not exist", |attack| attack.give(RX, SIZE)),
    ("an available index one ahead of what fits", |attack| attack.give_at(TX, 0, SIZE + 1)),
    ("an available index far ahead", |attack| attack.give_at(TX, 0, 0x8000)),
    ("an available index that goes back", |attack| attack.give_at(TX, 0, u16::MAX)),
    ("a receive ring's available index that goes back", |attack| attack.give_at(RX, 0, u16::MAX)),
    ("the whole ring at once, all the same head", |attack| {
        let buffer = attack.buffer;
        attack.queue(TX).set_descriptor(0, buffer, 100, 0, 0);
        attack.give_at(TX, 0, SIZE);
    }),
    ("an empty chain", |attack| attack.transmit(0, 0, 0)),
    ("a chain of a thousand empty descriptors", |attack| {
        for number in 0..SIZE - 1 {
            attack.queue(TX).set_descriptor(number, 0, 0, NEXT, number + 1);
        }
        attack.queue(TX).set_descriptor(SIZE - 1, 0, 0, 0, 0);
        attack.give(TX, 0);
    }),
    ("empty receive buffers", |attack| {
        let buffer = attack.buffer;
        attack.queue(RX).set_descriptor(0, buffer, 0, WRITE, 0);
        attack.give_at(RX, 0, SIZE);
    }),
    ("a header without a frame", |attack| {
        for length in 1..=12 + 14 {
            let buffer = attack.buffer;
            attack.transmit(buffer, length, 0);
            attack.device.connection.get_features().unwrap();
        }
    }),
    ("a buffer outside memory", |attack| attack.transmit(0xdead_0000_0000, 1500, 0)),
    ("a receive buffer outside memory", |attack| attack.receive(0xdead_0000_0000, 1500, WRITE)),
    ("a buffer that wraps", |attack| attack.transmit(u64::MAX - 10, 1500, 0)),
    ("a receive buffer that wraps", |attack| attack.receive(u64::MAX - 10, 1500, WRITE)),
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
    ("a frame larger than the maximum", |attack| {
        let buffer = attack.buffer;
        for number in 0..3 {
            attack.queue(TX).set_descriptor(number, buffer, 60_000, NEXT, number + 1);
        }
        attack.queue(TX).set_descriptor(3, buffer, 60_000, 0, 0);
        attack.give(TX, 0);
    }),
    ("a front-end address instead of a guest address", |attack| {
        let address = attack.device.memory.user_address(attack.buffer);
        attack.transmit(address, 1500, 0);
        attack.receive(address, 1500, WRITE);
    }),
    ("a writable transmit buffer", |attack| {
        let buffer = attack.buffer;
        attack.transmit(buffer, 1500, WRITE);
    }),
    ("a readable receive buffer", |attack| {
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
    ("transmit chains of many lengths", |attack| {
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
    ("receive chains of many lengths", |attack| {
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
    ("indirect tables of extreme lengths", |attack| {
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
    ("a broken ring that works after it is set up again", |attack| {
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
    ("a ring stopped under load", |attack| {
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
