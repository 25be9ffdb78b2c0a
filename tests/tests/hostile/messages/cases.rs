//! The cases: wrong messages.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use baton_tests::fake_frontend::wire::{MemoryRegion, Message, NEED_REPLY, NO_FD, REPLY, VERSION, request};
use baton_tests::fake_frontend::{Device, Region};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Stage::{self, Fresh, Negotiated, Running};
use super::settle;

/// A name, the stage where the case begins, and the attack. Sending may fail, since the back-end may close the
/// connection at any time.
pub(super) type Case = (&'static str, Stage, fn(&mut Device));

const MEMORY: MemoryRegion =
    MemoryRegion { guest_address: 0, size: 0x10000, user_address: 0x7000_0000_0000, file_offset: 0 };

fn say(device: &Device, message: &Message) {
    say_with(device, message, &[]);
}

pub(super) fn say_with(device: &Device, message: &Message, fds: &[BorrowedFd<'_>]) {
    // The back-end may have closed the connection.
    let _ = device.connection.send(message, fds);
}

/// Sets up a ring at these front-end addresses, otherwise correctly, and starts it.
fn with_ring_at(device: &Device, descriptors: u64, used: u64, available: u64) {
    let _ = device.connection.set_memory_table(&device.memory);
    let ring = device.ring(1);
    say(device, &Message::vring_state(request::SET_VRING_NUM, 1, 256));
    say(device, &Message::vring_addresses(1, descriptors, used, available));
    say_with(device, &Message::u64(request::SET_VRING_KICK, 1), &[ring.kick.as_fd()]);
    say(device, &Message::vring_state(request::SET_VRING_ENABLE, 1, 1));
    ring.kick().unwrap();
}

/// Sets up a ring of this size and starts it.
fn with_ring_of(device: &Device, size: u32) {
    let _ = device.connection.set_memory_table(&device.memory);
    say(device, &Message::vring_state(request::SET_VRING_NUM, 1, size));
    let ring = device.ring(1);
    let _ = device.connection.set_vring_addresses(1, &device.memory, ring.queue.addresses());
    say_with(device, &Message::u64(request::SET_VRING_KICK, 1), &[ring.kick.as_fd()]);
    say(device, &Message::vring_state(request::SET_VRING_ENABLE, 1, 1));
    ring.kick().unwrap();
}

/// Sends a memory table of these regions, all of one valid file, and then uses it.
fn with_regions(device: &Device, regions: &[MemoryRegion]) {
    let file = Region::new(MemoryRegion { size: 0x20000, ..MEMORY }).unwrap();
    say_with(device, &Message::memory_table(regions), &vec![file.file(); regions.len()]);
    for region in regions {
        say_with(device, &Message::single_region(request::ADD_MEM_REG, region), &[file.file()]);
    }
    let address = regions.first().map_or(0, |region| region.user_address);
    let ring = device.ring(1);
    say(device, &Message::vring_state(request::SET_VRING_NUM, 1, 256));
    say(
        device,
        &Message::vring_addresses(1, address, address.wrapping_add(0x2000), address.wrapping_add(0x4000)),
    );
    say_with(device, &Message::u64(request::SET_VRING_KICK, 1), &[ring.kick.as_fd()]);
    say(device, &Message::vring_state(request::SET_VRING_ENABLE, 1, 1));
}

/// Sends a memory table of one region of this file.
fn with_memory_file(device: &Device, file: BorrowedFd<'_>) {
    say_with(device, &Message::memory_table(&[MEMORY]), &[file]);
    say_with(device, &Message::single_region(request::ADD_MEM_REG, &MEMORY), &[file]);
}

/// Gives a running device this file as kick, call and error descriptors, and makes traffic in both directions.
fn with_events(device: &mut Device, file: BorrowedFd<'_>) {
    for index in [0, 1] {
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            say_with(device, &Message::u64(request, index), &[file]);
        }
    }
    traffic(device);
}

/// Makes chains available and kicks.
fn traffic(device: &mut Device) {
    for number in 0..50 {
        let frame = baton_tests::frames::numbered(number, 100);
        let _ = device.enqueue(0, &Default::default(), &frame);
    }
    for index in [0, 1] {
        device.ring_mut(index).queue.publish();
        device.ring(index).kick().unwrap();
    }
}

pub(super) fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap()
}

fn null() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

pub(super) const CASES: &[Case] = &[
    ("no message", Fresh, |_| {}),
    ("ring size 0", Negotiated, |device| with_ring_of(device, 0)),
    ("ring size 3", Negotiated, |device| with_ring_of(device, 3)),
    ("ring size 65535", Negotiated, |device| with_ring_of(device, 65535)),
    ("ring size 32768, beyond its memory", Negotiated, |device| with_ring_of(device, 32768)),
    ("ring size 2^31", Negotiated, |device| with_ring_of(device, 1 << 31)),
    ("ring size 0 while running", Running, |device| with_ring_of(device, 0)),
    ("ring size 1 while running", Running, |device| with_ring_of(device, 1)),
    ("another ring size while running", Running, |device| with_ring_of(device, 16384)),
    ("rings at address 0", Negotiated, |device| with_ring_at(device, 0, 0, 0)),
    ("rings outside memory", Negotiated, |device| with_ring_at(device, 0x1000, 0x2000, 0x3000)),
    ("rings at the end of the address space", Negotiated, |device| {
        with_ring_at(device, u64::MAX - 15, u64::MAX - 3, u64::MAX - 1);
    }),
    ("rings at guest addresses", Negotiated, |device| {
        let address = device.memory.regions()[0].place.guest_address;
        with_ring_at(device, address, address + 0x2000, address + 0x4000);
    }),
    ("rings that overlap each other", Negotiated, |device| {
        let address = device.memory.regions()[0].place.user_address;
        with_ring_at(device, address, address, address);
    }),
    ("misaligned rings", Negotiated, |device| {
        let address = device.memory.regions()[0].place.user_address;
        with_ring_at(device, address + 1, address + 0x2001, address + 0x4001);
    }),
    ("rings that end beyond their region", Negotiated, |device| {
        let MemoryRegion { user_address, size, .. } = device.memory.regions()[0].place;
        let end = user_address + size;
        with_ring_at(device, end - 16 * 256 + 16, end - 2052 + 4, end - 518 + 2);
    }),
    ("rings outside memory while running", Running, |device| with_ring_at(device, 0x1000, 0x2000, 0x3000)),
    ("no memory region", Negotiated, |device| with_regions(device, &[])),
    ("no memory region while running", Running, |device| with_regions(device, &[])),
    ("an empty region", Negotiated, |device| with_regions(device, &[MemoryRegion { size: 0, ..MEMORY }])),
    ("a region of all memory", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { size: u64::MAX, ..MEMORY }]);
    }),
    ("a region of one odd byte", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { size: 1, ..MEMORY }]);
    }),
    ("a region that wraps in guest addresses", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { guest_address: u64::MAX - 0xfff, ..MEMORY }]);
    }),
    ("a region that wraps in front-end addresses", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { user_address: u64::MAX - 0xfff, ..MEMORY }]);
    }),
    ("a region whose file offset wraps", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { file_offset: u64::MAX - 0xfff, ..MEMORY }]);
    }),
    ("a region whose file offset is odd", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { file_offset: 1, ..MEMORY }]);
    }),
    ("a region longer than its file", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { size: 0x100_0000, ..MEMORY }]);
    }),
    ("a region beyond the end of its file", Negotiated, |device| {
        with_regions(device, &[MemoryRegion { file_offset: 0x100_0000, ..MEMORY }]);
    }),
    ("regions that overlap in guest addresses", Negotiated, |device| {
        let other =
            MemoryRegion { user_address: MEMORY.user_address + 0x10_0000, guest_address: 0x8000, ..MEMORY };
        with_regions(device, &[MEMORY, other]);
    }),
    ("regions that overlap in front-end addresses", Negotiated, |device| {
        let other =
            MemoryRegion { user_address: MEMORY.user_address + 0x8000, guest_address: 0x10_0000, ..MEMORY };
        with_regions(device, &[MEMORY, other]);
    }),
    ("the same region eight times", Negotiated, |device| with_regions(device, &[MEMORY; 8])),
    ("nine regions", Negotiated, |device| {
        let regions: Vec<_> = (0..9)
            .map(|number| MemoryRegion {
                guest_address: number << 32,
                user_address: MEMORY.user_address + (number << 32),
                ..MEMORY
            })
            .collect();
        with_regions(device, &regions);
    }),
    ("more regions than slots", Negotiated, |device| {
        let file = Region::new(MEMORY).unwrap();
        for number in 0..600 {
            let region = MemoryRegion {
                guest_address: number << 32,
                user_address: MEMORY.user_address + (number << 32),
                ..MEMORY
            };
            say_with(device, &Message::single_region(request::ADD_MEM_REG, &region), &[file.file()]);
        }
    }),
    ("an unknown region removed", Running, |device| {
        say(device, &Message::single_region(request::REM_MEM_REG, &MEMORY));
    }),
    ("regions removed under traffic", Running, |device| {
        traffic(device);
        for region in device.memory.regions() {
            say(device, &Message::single_region(request::REM_MEM_REG, &region.place));
        }
        traffic(device);
    }),
    ("a memory table that claims more regions than it has", Negotiated, |device| {
        let file = Region::new(MEMORY).unwrap();
        for count in [2u32, 8, 9, 255, u32::MAX] {
            let mut message = Message::memory_table(&[MEMORY]);
            message.payload[..4].copy_from_slice(&count.to_le_bytes());
            say_with(device, &message, &[file.file()]);
        }
    }),
    ("a memory table without its descriptors", Running, |device| {
        say(device, &Message::memory_table(&[MEMORY]));
    }),
    ("a memory table with surplus descriptors", Running, |device| {
        let file = Region::new(MEMORY).unwrap();
        say_with(device, &Message::memory_table(&[MEMORY]), &[file.file(); 8]);
    }),
    ("/dev/null as memory", Negotiated, |device| with_memory_file(device, null().as_fd())),
    ("an eventfd as memory", Negotiated, |device| with_memory_file(device, eventfd().as_fd())),
    ("a socket as memory", Negotiated, |device| {
        with_memory_file(device, UnixStream::pair().unwrap().0.as_fd());
    }),
    ("a pipe as memory", Negotiated, |device| {
        with_memory_file(device, nix::unistd::pipe().unwrap().0.as_fd());
    }),
    ("a directory as memory", Negotiated, |device| {
        with_memory_file(device, File::open("/").unwrap().as_fd());
    }),
    ("a read-only file as memory", Negotiated, |device| {
        with_memory_file(device, File::open("/proc/self/exe").unwrap().as_fd());
    }),
    ("memory tables swapped under traffic", Running, |device| {
        let other = baton_tests::fake_frontend::GuestMemory::new(&[0x10_0000]).unwrap();
        for _ in 0..100 {
            traffic(device);
            let _ = device.connection.set_memory_table(&other);
            let _ = device.connection.set_memory_table(&device.memory);
        }
    }),
    ("memory truncated under traffic", Running, |device| {
        traffic(device);
        for region in device.memory.regions() {
            region.truncate(0).unwrap();
        }
        device.ring(1).kick().unwrap();
        device.ring(0).kick().unwrap();
    }),
    ("memory truncated before it is used", Negotiated, |device| {
        device.set_up().unwrap();
        for region in device.memory.regions() {
            region.truncate(0).unwrap();
        }
        device.ring(1).kick().unwrap();
        device.ring(0).kick().unwrap();
    }),
    ("/dev/null for notifications", Running, |device| with_events(device, null().as_fd())),
    ("the read end of a pipe for notifications", Running, |device| {
        with_events(device, nix::unistd::pipe().unwrap().0.as_fd());
    }),
    ("a socket with a closed peer for notifications", Running, |device| {
        with_events(device, UnixStream::pair().unwrap().0.as_fd());
    }),
    ("a memory file for notifications", Running, |device| {
        with_events(device, Region::new(MEMORY).unwrap().file());
    }),
    ("a full, blocking eventfd for notifications", Running, |device| {
        let full = eventfd();
        full.write(u64::MAX - 1).unwrap();
        with_events(device, full.as_fd());
    }),
    ("the same eventfd for kicks and calls", Running, |device| {
        with_events(device, eventfd().as_fd());
        settle(&device.connection);
        traffic(device);
    }),
    ("notifications with surplus, missing and too many descriptors", Running, |device| {
        let event = eventfd();
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            say_with(device, &Message::u64(request, NO_FD), &[event.as_fd()]);
            say(device, &Message::u64(request, 0));
            say_with(device, &Message::u64(request, 0), &[event.as_fd(); 3]);
        }
    }),
    ("notifications for rings that do not exist", Running, |device| {
        let event = eventfd();
        for index in [2, 255, NO_FD | 2, 1 << 32, u64::MAX] {
            for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
                say_with(device, &Message::u64(request, index), &[event.as_fd()]);
            }
        }
    }),
    ("ring messages first", Fresh, |device| {
        say_with(device, &Message::u64(request::SET_VRING_KICK, 0), &[eventfd().as_fd()]);
        say(device, &Message::vring_state(request::SET_VRING_ENABLE, 0, 1));
        say(device, &Message::vring_state(request::GET_VRING_BASE, 0, 0));
        say(device, &Message::vring_addresses(0, 0x1000, 0x2000, 0x3000));
        say(device, &Message::vring_state(request::SET_VRING_NUM, 0, 256));
    }),
    ("set-up in reverse order", Fresh, |device| {
        device.ring(1).kick().unwrap();
        for index in [1, 0] {
            say(device, &Message::vring_state(request::SET_VRING_ENABLE, index, 1));
            let ring = device.ring(index);
            say_with(device, &Message::u64(request::SET_VRING_KICK, index.into()), &[ring.kick.as_fd()]);
            let _ = device.connection.set_vring_addresses(index, &device.memory, ring.queue.addresses());
            say(device, &Message::vring_state(request::SET_VRING_NUM, index, 256));
        }
        let _ = device.connection.set_memory_table(&device.memory);
        let _ = device.connection.set_features(device.options.features);
        traffic(device);
    }),
    ("other features while rings run", Running, |device| {
        for features in [0, 1 << 30, 1 << 32, 1 << 15, 1 << 29, u64::MAX, 0xffff_ffff, 1 << 34] {
            traffic(device);
            say(device, &Message::u64(request::SET_FEATURES, features));
        }
    }),
    ("other protocol features while rings run", Running, |device| {
        for features in [0, u64::MAX, 1 << 3, 1 << 12] {
            say(device, &Message::u64(request::SET_PROTOCOL_FEATURES, features));
            traffic(device);
        }
    }),
    ("resets under traffic", Running, |device| {
        for request in [request::RESET_DEVICE, request::RESET_OWNER, request::SET_OWNER] {
            traffic(device);
            say(device, &Message::empty(request));
        }
        traffic(device);
    }),
    ("bases beyond the ring's indices", Running, |device| {
        for base in [1, 255, 257, 65535, 65536, u32::MAX] {
            say(device, &Message::vring_state(request::SET_VRING_BASE, 1, base));
            traffic(device);
        }
    }),
    ("wrong versions and flags", Running, |device| {
        for flags in [0, 2, 3, VERSION | REPLY, VERSION | REPLY | NEED_REPLY, VERSION | 0x10, u32::MAX] {
            say(device, &Message::empty(request::GET_FEATURES).with_flags(flags));
        }
    }),
    ("an unexpected reply", Running, |device| {
        say(device, &Message::u64(request::GET_FEATURES, 5).with_flags(VERSION | REPLY));
    }),
    ("a message of 4 GiB", Running, |device| {
        say(device, &Message::empty(request::SET_FEATURES).with_size(u32::MAX));
        let _ = device.connection.send_bytes(&[0; 65536], &[]);
    }),
    ("a message slightly too large", Running, |device| {
        say(device, &Message::new(request::SET_CONFIG, vec![0; 4097]));
        say(device, &Message::new(request::SET_MEM_TABLE, vec![0xff; 4096]));
    }),
    ("a message longer than it says", Running, |device| {
        say(device, &Message::u64(request::SET_FEATURES, 0).with_size(4));
        say(device, &Message::u64(request::SET_FEATURES, 0).with_size(0));
    }),
    ("a message shorter than it says", Running, |device| {
        say(device, &Message::u64(request::SET_FEATURES, 0).with_size(16));
        say(device, &Message::u64(request::SET_FEATURES, 0).with_size(9));
    }),
    ("as many descriptors as a message can have", Running, |device| {
        let event = eventfd();
        say_with(device, &Message::empty(request::GET_FEATURES), &[event.as_fd(); 253]);
    }),
    ("descriptors with every message", Running, |device| {
        let event = eventfd();
        for _ in 0..50 {
            say_with(device, &Message::empty(request::GET_FEATURES), &[event.as_fd()]);
        }
    }),
    ("descriptors on every byte", Fresh, |device| {
        let event = eventfd();
        for byte in Message::u64(request::SET_FEATURES, 1 << 30).encode() {
            let _ = device.connection.send_bytes(&[byte], &[event.as_fd()]);
        }
    }),
    ("requests whose replies are never read", Running, |device| {
        device.connection.stream().set_nonblocking(true).unwrap();
        for _ in 0..100_000 {
            if device.connection.send(&Message::empty(request::GET_FEATURES), &[]).is_err() {
                break;
            }
        }
    }),
    ("SET_CONFIG", Running, |device| {
        say(device, &Message::new(request::SET_CONFIG, vec![0xff; 24]));
        say(device, &Message::new(request::SET_CONFIG, vec![0; 268]));
    }),
];
