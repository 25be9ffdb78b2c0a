//! The log of changed pages: while a front-end keeps one, every page of guest memory that the back-end writes is
//! marked there, as far as the front-end wants to know, and nothing is when it does not.
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
    every_page_that_changed_is_marked,
    every_page_of_a_large_segment_is_marked,
    the_used_rings_are_marked_only_where_asked_for_and_where_they_are_said_to_be,
    nothing_is_marked_before_it_is_asked_for_nor_after,
    a_copy_made_by_the_log_under_traffic_misses_nothing,
    a_copy_made_by_the_log_misses_nothing_while_the_session_moves,
    a_log_that_is_too_small_is_refused,
    a_reset_forgets_the_log,
}

const BASIC: u64 = features::PROTOCOL_FEATURES | features::VERSION_1;
/// A page that is no memory, in the gap between the regions.
const NO_MEMORY: u64 = 0x8000_0000;

fn options(features: u64) -> Options {
    let protocol_features = Options::default().protocol_features | protocol::LOG_SHMFD;
    Options { features, protocol_features, ..Options::default() }
}

/// The guest address of the used ring, as every front-end gives it.
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

/// Looks at a ring, and writes nothing, until the device has used as much.
fn wait_used(device: &Device, index: u32, used: u16) {
    let deadline = Instant::now() + PATIENCE;
    while device.ring(index).queue.used_index() != used {
        assert!(Instant::now() < deadline, "vring {index} was not used");
        std::thread::yield_now();
    }
}

/// Sends a frame from the network; gives the pages that changed with it, and those that were marked.
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
    // The whole frame's buffers are published at once. What the worker does then, it has done before this returns.
    device.connection.set_vring_enable(0, true).unwrap();
    device.connection.get_features().unwrap();
    let marked = log.take();
    let changed = changed(&device.memory, &before, &device.memory.snapshot());
    let (_, received) = device.receive(0).unwrap();
    assert!(received == frame, "another frame");
    (changed, marked)
}

fn every_page_that_changed_is_marked(datapath: Datapath) {
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
        // A look at this ring, whenever it comes, would write its flags.
        device.stop_ring(1).unwrap();
        let log = DirtyLog::new(&device.memory).unwrap();
        device.start_log(&log, used_ring).unwrap();
        for (number, length) in (0..).zip([60, 1000, largest, 60, largest, largest - 1, 300]) {
            let frame = frames::numbered(number, length);
            let (changed, marked) = receive_one(&rig, &mut device, &log, &NetHeader::default(), &frame);
            let case = format!("features {features:#x}, pieces {pieces:?}, frame of {length}");
            assert!(changed.len() >= length / 4096, "{case}: only {changed:?} changed");
            assert!(changed.is_subset(&marked), "{case}: {changed:x?} changed, {marked:x?} are marked");
            // The kernel writes, and notes, the used ring's flags whenever it is given a ring.
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
        // The first is read for small frames, those behind for large ones.
        for _ in 0..3 {
            let (changed, marked) = receive_one(&rig, &mut device, &log, &header, &segment.bytes);
            assert!(changed.len() >= 15, "only {changed:?} changed");
            assert!(changed.is_subset(&marked), "{changed:x?} changed, {marked:x?} are marked");
        }
    }
}

fn the_used_rings_are_marked_only_where_asked_for_and_where_they_are_said_to_be(datapath: Datapath) {
    /// Used rings have a page of elements before this index, and their event index on a third.
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
                // Flags and index; elements; and what only transmit rings write here, as they alone get empty.
                let event = index == 1 && extra == features::EVENT_IDX;
                let expected: &[_] = if event { &[0, 1, 2] } else { &[0, 1] };
                assert_eq!(found, if wanted { expected } else { &[] }, "vring {index}, features {extra:#x}");
            }
            assert!(!marked.is_empty() && marked.is_subset(&buffers), "{marked:x?}");
        }
    }
}

fn nothing_is_marked_before_it_is_asked_for_nor_after(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(options(BASIC | features::MRG_RXBUF)).unwrap();
    let log = DirtyLog::new(&device.memory).unwrap();
    let traffic = |rig: &mut Rig, device: &mut Device| {
        rig.check_traffic(device).unwrap();
        device.wait_transmitted(0).unwrap();
        device.connection.get_features().unwrap();
    };
    // The log alone, and VRING_F_LOG, are not enough.
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

    // The next log takes the place of the last.
    device.start_log(&log, used_ring).unwrap();
    let next = DirtyLog::new(&device.memory).unwrap();
    device.connection.set_log_base(&next).unwrap();
    log.take();
    traffic(&mut rig, &mut device);
    assert_eq!(log.take(), BTreeSet::new());
    assert_ne!(next.take(), BTreeSet::new());

    // The next session has none, whatever its features say.
    drop(device);
    let mut device = rig.device(options(BASIC | features::LOG_ALL)).unwrap();
    traffic(&mut rig, &mut device);
    assert_eq!((log.take(), next.take()), (BTreeSet::new(), BTreeSet::new()));
    // But in the order of a front-end that begins with the feature it does.
    device.connection.set_log_base(&log).unwrap();
    traffic(&mut rig, &mut device);
    assert_ne!(log.take(), BTreeSet::new());
}

// The kernel waits for ever for room that a frame too large for the ring will never have.
#[test]
fn a_frame_that_is_not_delivered_has_its_pages_marked_too() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let pieces = vec![200];
    for merge in [0, features::MRG_RXBUF] {
        // The frame that is dropped overwrites what the next one is checked against: no canaries.
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
        // One that no ring of this size can hold, and one that tells when it has been dealt with.
        rig.inject(0..1, 1400).unwrap();
        rig.inject(1..2, 60).unwrap();
        wait_used(&device, 0, 1);
        let (changed, marked) = (changed(&device.memory, &before, &device.memory.snapshot()), log.take());
        assert!(changed.is_subset(&marked), "{changed:x?} changed, {marked:x?} are marked");
        rig.expect_in_guest(&mut device, 1..2).unwrap();
    }
}

/// What a front-end does that migrates a guest: copies all memory, then what was marked meanwhile, again and again,
/// and the last time when the device is stopped. The copy must have all that the back-end wrote.
fn a_copy_made_by_the_log_under_traffic_misses_nothing(datapath: Datapath) {
    copies_by_the_log(datapath, false);
}

fn a_copy_made_by_the_log_misses_nothing_while_the_session_moves(datapath: Datapath) {
    copies_by_the_log(datapath, true);
}

/// Copies all that the log says changed while frames arrive, and, if it is to move, while the session is handed on.
fn copies_by_the_log(datapath: Datapath, moving: bool) {
    for features in [BASIC, BASIC | features::MRG_RXBUF | features::EVENT_IDX] {
        // Anew, as frames are left in the TAP.
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        // No canaries: from now on only the back-end writes to the receive buffers.
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
            // While they arrive.
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

fn a_log_that_is_too_small_is_refused(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let end = |memory: &GuestMemory| {
        let last = memory.regions().last().unwrap().place;
        (last.guest_address + last.size).div_ceil(8 * PAGE)
    };
    // There is no other answer than the end.
    let device = rig.device(options(BASIC)).unwrap();
    let small = DirtyLog::with_size(end(&device.memory) - 1).unwrap();
    device.connection.send(&small.message(), &[small.file()]).unwrap();
    device.connection.wait_closed().unwrap();

    // Of the log's file, there is less than the message says.
    let device = rig.device(options(BASIC)).unwrap();
    let large = DirtyLog::with_size(2 * end(&device.memory)).unwrap();
    let short = DirtyLog::with_size(end(&device.memory)).unwrap();
    device.connection.send(&large.message(), &[short.file()]).unwrap();
    device.connection.wait_closed().unwrap();

    // Just large enough; then more memory needs a larger one first.
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

    // A log that is not used does not keep memory from being added, but must be replaced before it is used again.
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

// The kernel's marks just fail then.
#[test]
fn a_log_whose_file_is_cut_off_ends_the_session_only() {
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

fn a_reset_forgets_the_log(datapath: Datapath) {
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
