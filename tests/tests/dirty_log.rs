//! The log of changed pages: while a front-end has logging on, the back-end marks every page of guest memory that it
//! writes, and the used rings if the front-end asks for that. While logging is off it marks nothing.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeSet;
use std::time::Instant;

use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::dirty_log::PAGE;
use baton_tests::fake_frontend::net::GSO_TCPV4;
use baton_tests::fake_frontend::ring::Ring;
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::fake_frontend::{Device, DirtyLog, GuestMemory, NetHeader, Options, Region, features};
use baton_tests::frames::{self, Network, Transport};
use baton_tests::process::PATIENCE;
use baton_tests::{netns, on_both_datapaths};

on_both_datapaths! {
    every_changed_page_is_marked,
    every_page_of_a_large_segment_is_marked,
    used_rings_are_marked_only_on_request_and_at_their_log_address,
    nothing_is_marked_while_logging_is_off,
    copy_of_marked_pages_is_complete_under_traffic,
    copy_of_marked_pages_is_complete_during_hand_overs,
    too_small_log_is_refused,
    reset_device_discards_the_log,
}

const BASIC: u64 = features::PROTOCOL_FEATURES | features::VERSION_1;
/// An address in the gap between the memory regions.
const NO_MEMORY: u64 = 0x8000_0000;

fn options(features: u64) -> Options {
    let protocol_features = Options::default().protocol_features | protocol::LOG_SHMFD;
    Options { features, protocol_features, ..Options::default() }
}

/// The guest address of the used ring, which every front-end gives as its log address.
fn used_ring(ring: &Ring) -> Option<u64> {
    Some(ring.queue.addresses().used)
}

/// The numbers of the pages that `length` bytes at a guest address lie in.
fn pages(address: u64, length: usize) -> impl Iterator<Item = u64> {
    address / PAGE..(address + u64::try_from(length).unwrap()).div_ceil(PAGE)
}

/// The pages that differ between two snapshots.
fn changed(memory: &GuestMemory, before: &[Vec<u8>], after: &[Vec<u8>]) -> BTreeSet<u64> {
    let mut changed = BTreeSet::new();
    for ((region, before), after) in memory.regions().iter().zip(before).zip(after) {
        let page = usize::try_from(PAGE).unwrap();
        let pairs = before.chunks(page).zip(after.chunks(page));
        let first = region.place.guest_address / PAGE;
        changed.extend(
            (first..).zip(pairs).filter(|(_, (before, after))| before != after).map(|(page, _)| page),
        );
    }
    changed
}

/// Polls a ring, without writing to it, until its used index is `used`.
fn wait_used(device: &Device, index: u32, used: u16) {
    let deadline = Instant::now() + PATIENCE;
    while device.ring(index).queue.used_index() != used {
        assert!(Instant::now() < deadline, "vring {index} does not reach used index {used}");
        std::thread::yield_now();
    }
}

/// Sends a frame from the network; returns the pages that change with it, and those that are marked.
fn receive_one(
    rig: &Rig,
    device: &mut Device,
    log: &DirtyLog,
    header: &NetHeader,
    frame: &[u8],
) -> (BTreeSet<u64>, BTreeSet<u64>) {
    device.ring_mut(0).queue.disable_calls();
    let before = device.memory.snapshot();
    log.take();
    rig.network.send_with(header, frame).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !device.ring(0).queue.has_used() {
        assert!(Instant::now() < deadline, "no frame arrived");
        std::thread::yield_now();
    }
    // The worker publishes all buffers of a frame at once. These messages park it, so afterwards it is done.
    device.connection.set_vring_enable(0, true).unwrap();
    device.connection.get_features().unwrap();
    let marked = log.take();
    let changed = changed(&device.memory, &before, &device.memory.snapshot());
    let (_, received) = device.receive(0).unwrap();
    assert!(received == frame, "the frame differs");
    (changed, marked)
}

fn every_changed_page_is_marked(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    netns::set_mtu(TAP, 9000).unwrap();
    let merge = BASIC | features::MRG_RXBUF;
    let short = features::PROTOCOL_FEATURES;
    let cases: [(u64, &[u32], usize); 9] = [
        (short, &[2048], 1514),
        (BASIC, &[2048], 1514),
        (BASIC, &[12, 2000], 1514),
        (BASIC | features::INDIRECT_DESC, &[12, 700, 13, 5000], 1514),
        (merge, &[2048], 1514),
        (merge, &[300], 9014),
        (merge, &[7, 5, 1, 4099], 9014),
        (short | features::MRG_RXBUF, &[4096], 9014),
        (merge | features::EVENT_IDX, &[2048], 9014),
    ];
    for (features, pieces, largest) in cases {
        let options = Options {
            receive_pieces: pieces.to_vec(),
            indirect: features & features::INDIRECT_DESC != 0,
            ..options(features)
        };
        let mut device = rig.device(options).unwrap();
        // Otherwise the worker may write the flags of this ring at any time.
        device.stop_ring(1).unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        device.start_log(&log, used_ring).unwrap();
        for (number, length) in (0..).zip([60, 1000, largest, 60, largest, largest - 1, 300]) {
            let frame = frames::numbered(number, length);
            let (changed, marked) = receive_one(&rig, &mut device, &log, &NetHeader::default(), &frame);
            let case = format!("features {features:#x}, pieces {pieces:?}, frame of {length}");
            assert!(changed.len() >= length / 4096, "{case}: only {changed:?} changed");
            assert!(changed.is_subset(&marked), "{case}: {changed:x?} changed, {marked:x?} are marked");
            // vhost-net writes and marks the used ring's flags whenever it is given a ring.
            assert!(changed == marked || datapath == Datapath::VhostNet, "{case}: {changed:x?}, {marked:x?}");
        }
    }
}

fn every_page_of_a_large_segment_is_marked(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let payload: Vec<u8> = (0..60_000u32).map(|number| number.to_le_bytes()[0] ^ 0x55).collect();
    let segment = frames::segment(Network::V4, Transport::Tcp, &payload);
    let header = segment.header(GSO_TCPV4, 1400);
    for merge in [0, features::MRG_RXBUF] {
        let features = BASIC | features::GUEST_CSUM | features::GUEST_TSO4 | merge;
        let mut device = rig.device(options(features).with_large_frames()).unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        device.start_log(&log, used_ring).unwrap();
        // The first is read into the buffers for small frames, the next ones into those for large frames.
        for _ in 0..3 {
            let (changed, marked) = receive_one(&rig, &mut device, &log, &header, &segment.bytes);
            assert!(changed.len() >= 15, "only {changed:?} changed");
            assert!(changed.is_subset(&marked), "{changed:x?} changed, {marked:x?} are marked");
        }
    }
}

fn used_rings_are_marked_only_on_request_and_at_their_log_address(datapath: Datapath) {
    /// From this index on the elements are on the second page of the used ring. The event index is on the third.
    const START: u16 = 600;
    let log_address = |ring: &Ring| NO_MEMORY + 16 * PAGE * u64::from(ring.index);
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for extra in [0, features::EVENT_IDX] {
        let options = Options { queue_size: 1024, ..options(BASIC | extra) };
        let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
        device.negotiate().unwrap();
        device.connection.set_memory_table(&device.memory).unwrap();
        for index in [0, 1] {
            device.ring_mut(index).queue.start_at(START);
            device.set_up_ring(index, START).unwrap();
            device.connection.set_vring_enable(index, true).unwrap();
        }
        device.fill_receive_rings().unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        let buffers: BTreeSet<_> =
            device.receive_buffers().flat_map(|(address, length)| pages(address, length)).collect();
        for wanted in [[false, false], [true, false], [false, true], [true, true]] {
            let address = |ring: &Ring| wanted[ring.index as usize].then(|| log_address(ring));
            device.start_log(&log, address).unwrap();
            log.take();
            rig.check_traffic(&mut device).unwrap();
            device.wait_transmitted(0).unwrap();
            device.stop_log().unwrap();
            let mut marked = log.take();
            for (index, wanted) in (0..).zip(wanted) {
                let first = log_address(device.ring(index)) / PAGE;
                let found: Vec<_> = (0..16).filter(|page| marked.remove(&(first + page))).collect();
                // Page 0 has flags and index, page 1 elements, page 2 the event index. Only the transmit ring's event
                // index is written here, since only that ring runs empty.
                let event = index == 1 && extra == features::EVENT_IDX;
                let expected: &[_] = if event { &[0, 1, 2] } else { &[0, 1] };
                assert_eq!(found, if wanted { expected } else { &[] }, "vring {index}, features {extra:#x}");
            }
            assert!(!marked.is_empty() && marked.is_subset(&buffers), "{marked:x?}");
        }
    }
}

fn nothing_is_marked_while_logging_is_off(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(options(BASIC | features::MRG_RXBUF)).unwrap();
    let log = DirtyLog::new(&device.memory).unwrap();
    let traffic = |rig: &mut Rig, device: &mut Device| {
        rig.check_traffic(device).unwrap();
        device.wait_transmitted(0).unwrap();
        device.connection.get_features().unwrap();
    };
    // A log and VRING_F_LOG are not enough without LOG_ALL.
    device.connection.set_log_base(&log).unwrap();
    let addresses = device.ring(0).queue.addresses();
    let set_log_address = |device: &Device, address| {
        device.connection.set_logged_vring_addresses(0, &device.memory, addresses, Some(address))
    };
    set_log_address(&device, addresses.used).unwrap();
    set_log_address(&device, addresses.used + 2).unwrap_err();
    traffic(&mut rig, &mut device);
    assert_eq!(log.take(), BTreeSet::new());

    for _ in 0..3 {
        device.start_log(&log, used_ring).unwrap();
        traffic(&mut rig, &mut device);
        assert_ne!(log.take(), BTreeSet::new());
        device.stop_log().unwrap();
        log.take();
        traffic(&mut rig, &mut device);
        assert_eq!(log.take(), BTreeSet::new());
    }

    // A new log replaces the last one.
    device.start_log(&log, used_ring).unwrap();
    let next = DirtyLog::new(&device.memory).unwrap();
    device.connection.set_log_base(&next).unwrap();
    log.take();
    traffic(&mut rig, &mut device);
    assert_eq!(log.take(), BTreeSet::new());
    assert_ne!(next.take(), BTreeSet::new());

    // The next session has no log, even if it acknowledges LOG_ALL.
    drop(device);
    let mut device = rig.device(options(BASIC | features::LOG_ALL)).unwrap();
    traffic(&mut rig, &mut device);
    assert_eq!((log.take(), next.take()), (BTreeSet::new(), BTreeSet::new()));
    // A front-end may acknowledge LOG_ALL first and set the log afterwards.
    device.connection.set_log_base(&log).unwrap();
    traffic(&mut rig, &mut device);
    assert_ne!(log.take(), BTreeSet::new());
}

// Not with vhost-net: the kernel waits forever for room for a frame that is too large for the ring.
#[test]
fn pages_of_a_dropped_frame_are_marked() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let pieces = vec![200];
    for merge in [0, features::MRG_RXBUF] {
        // No canaries: the dropped frame overwrites those that the next frame is checked against.
        let options = Options {
            receive_pieces: pieces.clone(),
            queue_size: 4,
            canaries: false,
            ..options(BASIC | merge)
        };
        let mut device = rig.device(options).unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        device.start_log(&log, used_ring).unwrap();
        device.ring_mut(0).queue.disable_calls();
        let before = device.memory.snapshot();
        // The first frame is too large for the ring. The second one arrives when the first has been dropped.
        rig.inject(0..1, 1400).unwrap();
        rig.inject(1..2, 60).unwrap();
        wait_used(&device, 0, 1);
        let (changed, marked) = (changed(&device.memory, &before, &device.memory.snapshot()), log.take());
        assert!(changed.is_subset(&marked), "{changed:x?} changed, {marked:x?} are marked");
        rig.expect_in_guest(&mut device, 1..2).unwrap();
    }
}

/// Does what a front-end does that migrates a guest: copies all memory, then the marked pages again and again, the last
/// time with the device stopped. The copy must have everything that the back-end wrote.
fn copy_of_marked_pages_is_complete_under_traffic(datapath: Datapath) {
    check_copy(datapath, false);
}

fn copy_of_marked_pages_is_complete_during_hand_overs(datapath: Datapath) {
    check_copy(datapath, true);
}

/// Copies the marked pages while frames arrive and, if `moving`, while the session is handed over.
fn check_copy(datapath: Datapath, moving: bool) {
    for features in [BASIC, BASIC | features::MRG_RXBUF | features::EVENT_IDX] {
        // A new rig, since the last round leaves frames in the TAP.
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        // No canaries: only the back-end may write to the receive buffers.
        let mut device =
            rig.device(Options { canaries: false, ..options(features) }.with_large_frames()).unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.start_log(&log, used_ring).unwrap();
        let mut copy = device.memory.snapshot();
        let mut number = 0;
        for round in 0..50usize {
            let next = number + 40;
            rig.inject(number..next, 60 + (round * 179) % 8900).unwrap();
            // While the frames arrive.
            if moving && round % 10 == 5 {
                let target = Backend::waiting_for_session(datapath, &[]).unwrap();
                rig.backend.become_target(target).unwrap();
            }
            copy_marked(&device.memory, &log, &mut copy);
            rig.expect_in_guest(&mut device, number..next).unwrap();
            number = next;
        }
        rig.inject(number..number + 20, 1000).unwrap();
        for index in [0, 1] {
            device.stop_ring(index).unwrap();
        }
        copy_marked(&device.memory, &log, &mut copy);
        let now = device.memory.snapshot();
        for (address, length) in device.receive_buffers().chain(device.used_rings()) {
            let (region, offset) = device.memory.offset(address);
            let range = offset..offset + length;
            assert!(
                copy[region][range.clone()] == now[region][range],
                "{length} bytes at {address:#x} differ"
            );
        }
    }
}

fn copy_marked(memory: &GuestMemory, log: &DirtyLog, copy: &mut [Vec<u8>]) {
    for page in log.take() {
        let (region, offset) = memory.offset(page * PAGE);
        let length = copy[region].len().saturating_sub(offset).min(usize::try_from(PAGE).unwrap());
        memory.slice(page * PAGE, length).read(0, &mut copy[region][offset..offset + length]);
    }
}

fn too_small_log_is_refused(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let end = |memory: &GuestMemory| {
        let last = memory.regions().last().unwrap().place;
        (last.guest_address + last.size).div_ceil(8 * PAGE)
    };
    // The back-end can only answer by closing the connection.
    let device = rig.device(options(BASIC)).unwrap();
    let small = DirtyLog::with_size(end(&device.memory) - 1).unwrap();
    device.connection.send(&small.message(), &[small.file()]).unwrap();
    device.connection.wait_closed().unwrap();

    // The log's file is shorter than the message says.
    let device = rig.device(options(BASIC)).unwrap();
    let large = DirtyLog::with_size(2 * end(&device.memory)).unwrap();
    let short = DirtyLog::with_size(end(&device.memory)).unwrap();
    device.connection.send(&large.message(), &[short.file()]).unwrap();
    device.connection.wait_closed().unwrap();

    // The log is just large enough. More memory needs a larger log first.
    let mut device = rig.device(options(BASIC)).unwrap();
    let exact = DirtyLog::with_size(end(&device.memory)).unwrap();
    device.start_log(&exact, used_ring).unwrap();
    let mut regions = device.memory.regions().to_vec();
    let mut place = regions[1].place;
    place.guest_address += 1 << 32;
    place.user_address = 0x1000_0000;
    regions.push(Region::new(place).unwrap());
    let more = GuestMemory::from_regions(regions).unwrap();
    device.connection.set_memory_table(&more).unwrap_err();
    rig.check_traffic(&mut device).unwrap();
    let larger = DirtyLog::new(&more).unwrap();
    device.connection.set_log_base(&larger).unwrap();
    device.connection.set_memory_table(&more).unwrap();
    rig.check_traffic(&mut device).unwrap();
    assert_ne!(larger.take(), BTreeSet::new());

    // An inactive log does not prevent more memory, but must be replaced before logging is on again.
    device.stop_log().unwrap();
    device.connection.set_log_base(&larger).unwrap();
    let mut regions = more.regions().to_vec();
    place.guest_address += 1 << 32;
    place.user_address = 0x2_1000_0000;
    regions.push(Region::new(place).unwrap());
    let most = GuestMemory::from_regions(regions).unwrap();
    device.connection.set_memory_table(&most).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let logging = device.options.features | features::LOG_ALL;
    device.connection.set_features(logging).unwrap_err();
    rig.check_traffic(&mut device).unwrap();
    device.connection.set_log_base(&DirtyLog::new(&most).unwrap()).unwrap();
    device.connection.set_features(logging).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

// Not with vhost-net: the kernel only fails to mark pages.
#[test]
fn truncated_log_ends_only_the_session() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(BASIC)).unwrap();
    let log = DirtyLog::new(&device.memory).unwrap();
    device.start_log(&log, used_ring).unwrap();
    rig.check_traffic(&mut device).unwrap();
    log.truncate().unwrap();
    rig.inject(0..1, 100).unwrap();
    device.connection.wait_closed().unwrap();
    drop(device);
    let mut device = rig.device(options(BASIC)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

fn reset_device_discards_the_log(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut options = options(BASIC);
    options.protocol_features |= protocol::RESET_DEVICE;
    let mut device = rig.device(options.clone()).unwrap();
    let log = DirtyLog::new(&device.memory).unwrap();
    device.start_log(&log, used_ring).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.connection.tell(&Message::empty(request::RESET_DEVICE), &[]).unwrap();
    assert_ne!(log.take(), BTreeSet::new());

    let Device { connection, .. } = device;
    let mut device = Device::new(connection, options).unwrap();
    device.connection.set_features(device.options.features | features::LOG_ALL).unwrap();
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.wait_transmitted(0).unwrap();
    assert_eq!(log.take(), BTreeSet::new());
}
