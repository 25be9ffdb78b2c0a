//! Random messages and random ring contents, for some seconds each. The seed is printed; `BATON_FUZZ_SEED` repeats a
//! run.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use baton_tests::datapath::{self, Datapath};
use baton_tests::fake_frontend::wire::{MemoryRegion, Message, protocol, request};
use baton_tests::fake_frontend::{Connection, Device, Options, Region, features};
use baton_tests::hostile::{Random, Victim};
use baton_tests::on_both_datapaths;
use nix::sys::eventfd::{EfdFlags, EventFd};

on_both_datapaths! {
    back_end_survives_random_messages,
    back_end_survives_random_rings,
}

/// How long each test runs.
const TIME: Duration = Duration::from_secs(8);

/// A number for a field: near an address, an index, a small multiple of the page size, or an edge case.
fn number(random: &mut Random, device: &Device) -> u64 {
    let place = device.memory.regions()[random.below(2)].place;
    match random.below(6) {
        0 => place.guest_address + (random.edge() & 0xffff),
        1 => place.user_address + (random.edge() & 0xfff0),
        2 => random.next_u64() & 3,
        3 => 0x1000 * (random.next_u64() & 0xff),
        _ => random.edge(),
    }
}

fn random_region(random: &mut Random, device: &Device) -> MemoryRegion {
    let place = device.memory.regions()[random.below(2)].place;
    let or = |random: &mut Random, value| if random.once_in(4) { number(random, device) } else { value };
    MemoryRegion {
        guest_address: or(random, place.guest_address),
        size: or(random, place.size),
        user_address: or(random, place.user_address),
        file_offset: or(random, place.file_offset),
    }
}

fn u32_of(number: u64) -> u32 {
    u32::try_from(number & 0xffff_ffff).unwrap()
}

/// A message that is plausible, malformed or random.
fn random_message(random: &mut Random, device: &Device) -> Message {
    let index = if random.once_in(8) { random.next_u32() } else { u32_of(random.next_u64() & 1) };
    let message = match random.below(14) {
        0 => Message::u64(
            request::SET_FEATURES,
            match random.below(4) {
                0 | 1 => device.options.features,
                2 => device.options.features | features::LOG_ALL,
                _ => random.edge(),
            },
        ),
        1 => {
            let regions: Vec<_> = (0..random.below(4)).map(|_| random_region(random, device)).collect();
            Message::memory_table(&regions)
        }
        2 => {
            let request = random.pick(&[request::ADD_MEM_REG, request::REM_MEM_REG]);
            Message::single_region(request, &random_region(random, device))
        }
        3 => {
            let [a, b, c] = [0; 3].map(|_: i32| number(random, device));
            let log = random.once_in(2).then(|| random.edge());
            Message::logged_vring_addresses(index, [a, b, c], log)
        }
        4 | 5 => {
            let requests = [
                request::SET_VRING_NUM,
                request::SET_VRING_BASE,
                request::GET_VRING_BASE,
                request::SET_VRING_ENABLE,
            ];
            Message::vring_state(random.pick(&requests), index, u32_of(random.edge()))
        }
        6 => Message::vring_state(request::SET_VRING_ENABLE, index, u32_of(random.next_u64() & 1)),
        7 | 8 => {
            let requests = [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR];
            Message::u64(random.pick(&requests), u64::from(index) | (random.next_u64() & 0x100))
        }
        9 => Message::get_config(u32_of(random.edge()), u32_of(random.next_u64() & 0x3f)),
        10 => {
            Message::empty(random.pick(&[request::GET_FEATURES, request::RESET_DEVICE, request::RESET_OWNER]))
        }
        11 => {
            let size = if random.once_in(2) { 1 << 20 } else { random.edge() };
            Message::log_base(size, if random.once_in(2) { 0 } else { random.edge() })
        }
        12 => {
            let request = random.pick(&[request::GET_INFLIGHT_FD, request::SET_INFLIGHT_FD]);
            let size = if random.once_in(2) { 1 << 20 } else { random.edge() };
            let [queues, entries] = [2, device.options.queue_size]
                .map(|valid| if random.once_in(2) { valid } else { random.next_u16() });
            Message::inflight(
                request,
                size,
                if random.once_in(2) { 0 } else { random.edge() },
                queues,
                entries,
            )
        }
        _ => {
            let payload = (0..random.below(64)).map(|_| random.next_u64().to_le_bytes()[0]).collect();
            Message::new(u32_of(random.next_u64() & 0x3f), payload)
        }
    };
    let message = if random.once_in(3) { message.with_need_reply() } else { message };
    let message = if random.once_in(50) { message.with_flags(random.next_u32()) } else { message };
    if random.once_in(50) {
        let size = u32_of(random.edge());
        message.with_size(size)
    } else {
        message
    }
}

/// Discards what the back-end has sent; returns whether the connection is still open.
fn listen(connection: &Connection) -> bool {
    connection.stream().set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    let open = loop {
        match nix::unistd::read(connection.stream(), &mut bytes) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(nix::errno::Errno::EAGAIN) => break true,
            Err(_) => break false,
        }
    };
    connection.stream().set_nonblocking(false).unwrap();
    open
}

fn back_end_survives_random_messages(datapath: Datapath) {
    let mut random = Random::from_environment();
    let mut victim = Victim::new(datapath).unwrap();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let protocol_features = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::LOG_SHMFD
        | protocol::RESET_DEVICE
        | protocol::CONFIGURE_MEM_SLOTS
        | datapath::protocol_features(datapath);
    let end = Instant::now() + TIME;
    let mut connections = 0;
    while Instant::now() < end {
        let connection = victim.rig.backend.connect().unwrap();
        let mut device =
            Device::new(connection, Options { protocol_features, ..Options::default() }).unwrap();
        if !random.once_in(4) {
            device.negotiate().unwrap();
            if !random.once_in(3) {
                device.set_up().unwrap();
                device.fill_receive_rings().unwrap();
            }
        }
        let (nonblocking, blocking) = (
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
            EventFd::from_flags(EfdFlags::empty()).unwrap(),
        );
        for _ in 0..random.below(100) {
            let message = random_message(&mut random, &device);
            let files = [
                nonblocking.as_fd(),
                blocking.as_fd(),
                device.memory.regions()[0].file(),
                device.memory.regions()[1].file(),
                null.as_fd(),
            ];
            let needed = match message.request {
                request::SET_MEM_TABLE => message.payload.len() / 32,
                request::ADD_MEM_REG
                | request::SET_VRING_KICK
                | request::SET_VRING_CALL
                | request::SET_LOG_BASE
                | request::SET_INFLIGHT_FD => 1,
                _ => 0,
            };
            let count = if random.once_in(10) { random.below(10) } else { needed };
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| random.pick(&files)).collect();
            if device.connection.send(&message, &fds).is_err() || !listen(&device.connection) {
                break;
            }
            for index in [0, 1] {
                device.ring(index).kick().unwrap();
            }
        }
        drop(device);
        connections += 1;
        if connections % 20 == 0 {
            victim.check().unwrap();
        }
    }
    eprintln!("{connections} connections");
    victim.check().unwrap();
}

/// Writes a random value into the rings of a running device.
fn scribble(random: &mut Random, device: &Device, table: u64) {
    let index = u32_of(random.next_u64() & 1);
    let queue = &device.ring(index).queue;
    let size = usize::from(queue.size());
    match random.below(8) {
        0..=2 => {
            let address = if random.once_in(3) { table } else { number(random, device) };
            let length = if random.once_in(2) { random.next_u32() & 0xfff } else { u32_of(random.edge()) };
            let number = u16::try_from(random.below(size)).unwrap();
            let flags = random.next_u16() & if random.once_in(8) { 0xffff } else { 7 };
            let next = u16::try_from(random.below(size + 1)).unwrap();
            queue.set_descriptor(number, address, length, flags, next);
        }
        3 => {
            let slice = device.memory.slice(table, 1024);
            let bytes = random.next_u64().to_le_bytes();
            slice.write(random.below(1016), &bytes);
        }
        4 => {
            let head = if random.once_in(20) {
                random.next_u16()
            } else {
                u16::try_from(random.below(size)).unwrap()
            };
            queue.set_available(random.next_u16(), head);
        }
        5 => queue.set_used_event(random.next_u16()),
        6 => {
            let ahead = u16::try_from(random.below(size + 1)).unwrap();
            queue.set_available_index(queue.used_index().wrapping_add(ahead));
        }
        _ => {
            let rings = queue.raw();
            let slice = rings[random.below(3)];
            slice.write(random.below(slice.len()), &random.next_u64().to_le_bytes()[..1]);
        }
    }
}

fn back_end_survives_random_rings(datapath: Datapath) {
    let mut random = Random::from_environment();
    let mut victim = Victim::new(datapath).unwrap();
    let optional = [
        features::VERSION_1,
        features::MRG_RXBUF,
        features::EVENT_IDX,
        features::INDIRECT_DESC,
        features::CSUM | features::HOST_TSO4 | features::GUEST_CSUM | features::GUEST_TSO4,
    ];
    let end = Instant::now() + TIME;
    let mut connections = 0;
    while Instant::now() < end {
        let chosen = optional.iter().filter(|_| random.once_in(2)).fold(0, |all, one| all | one);
        let options = Options {
            features: chosen | features::PROTOCOL_FEATURES,
            queue_size: 1 << (4 + random.below(5)),
            canaries: false,
            ..Options::default()
        };
        let mut device = Device::new(victim.rig.backend.connect().unwrap(), options).unwrap();
        device.negotiate().unwrap();
        device.set_up().unwrap();
        device.post_receive_buffers(0, usize::MAX).unwrap();
        let table = device.memory.allocate(0, 1024, 16);
        let region: &Region = &device.memory.regions()[0];
        assert!(table > region.place.guest_address);
        for _ in 0..200 {
            for _ in 0..1 + random.below(30) {
                scribble(&mut random, &device, table);
            }
            for index in [0, 1] {
                device.ring(index).kick().unwrap();
            }
            if random.once_in(4) {
                // Fails if the TAP has no room: these frames need not be received.
                let _ = victim.rig.inject(0..1, 60 + random.below(1400));
            }
            if random.once_in(20) {
                // Sets up a ring again, which may be broken.
                let index = u32_of(random.next_u64() & 1);
                device.connection.get_vring_base(index).unwrap();
                let base = device.ring(index).queue.used_index();
                device.restart_ring(index, base).unwrap();
            }
        }
        device.connection.get_features().unwrap();
        victim.rig.network.drain().unwrap();
        drop(device);
        connections += 1;
        if connections % 10 == 0 {
            victim.check().unwrap();
        }
    }
    eprintln!("{connections} devices");
    victim.check().unwrap();
}
