//! The inflight region: after a back-end is killed, the next one continues with the chains that it left, in order or
//! not. A front-end that does not use the region is served as well, and an invalid region does no harm.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::sync::atomic::Ordering;
use std::time::Instant;

use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::fake_frontend::{Connection, Device, Inflight, NetHeader, Options, features};
use baton_tests::frames;
use baton_tests::hostile::Random;
use baton_tests::load;
use baton_tests::process::PATIENCE;

const RX: u32 = 0;
const TX: u32 = 1;
const SIZE: u16 = 256;

fn options() -> Options {
    let all = Options::default();
    let protocol_features = all.protocol_features
        | protocol::INFLIGHT_SHMFD
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::RESET_DEVICE;
    Options { features: all.features | features::IN_ORDER, protocol_features, queue_size: SIZE, ..all }
}

/// A device whose front-end has negotiated features and received a region for these vrings.
fn negotiated(connection: Connection, options: Options, vrings: u16, entries: u16) -> Device {
    let mut device = Device::new(connection, options).unwrap();
    device.negotiate().unwrap();
    device.inflight = Some(device.connection.get_inflight(vrings, entries).unwrap());
    device
}

fn region(device: &Device) -> &Inflight {
    device.inflight.as_ref().unwrap()
}

/// Sets up a device with a region, and checks its traffic.
fn working(rig: &mut Rig) -> Device {
    let mut device = negotiated(rig.backend.connect().unwrap(), options(), 2, SIZE);
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    device
}

/// Sends the guest three times as many frames as it has buffers, so each buffer is used. Skips frames of smaller
/// numbers.
fn use_every_buffer(rig: &mut Rig, device: &mut Device, first: u32) {
    let last = first + 3 * u32::from(SIZE);
    let mut next = first;
    let mut frame = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    for number in first..last {
        rig.inject(number..number + 1, 100).unwrap();
        // A few at a time: the TAP's queue is limited.
        while number + 1 == last && next < last || next + 64 < number {
            device.receive_until(0, &mut frame, deadline).unwrap();
            match frames::number_of(&frame) {
                Some(number) if number >= first => {
                    assert_eq!(number, next);
                    next += 1;
                }
                _ => {}
            }
        }
    }
}

#[test]
fn no_chain_is_lost_or_completed_twice_when_back_end_is_killed_under_load() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut random = Random::from_environment();
    let mut device = working(&mut rig);
    let mut number = 1000;
    for round in 0..30 {
        // Does not check canaries: a killed back-end may leave a frame half written.
        device.options.canaries = false;
        for burst in 0..4 {
            rig.inject(number..number + 100, 60 + random.below(1400)).unwrap();
            rig.transmit(&mut device, number..number + 50, 60 + random.below(1400)).unwrap();
            number += 100;
            if burst == 3 {
                // Kills the back-end somewhere in the last burst.
                for _ in 0..random.below(20_000) {
                    std::hint::spin_loop();
                }
            }
        }
        rig.kill_backend().unwrap();
        rig.restart_backend().unwrap();
        let connection = rig.backend.connect().unwrap();
        device.reconnect(connection).unwrap();
        // The queue checks that every chain comes back once and in order.
        device.wait_transmitted(0).unwrap();
        use_every_buffer(&mut rig, &mut device, 1_000_000 * (round + 1));
        assert_eq!(device.ring(RX).queue.outstanding(), usize::from(SIZE));
        rig.network.drain().unwrap();
    }
    rig.backend.check_healthy().unwrap();
}

#[test]
fn region_is_handed_over_with_the_session() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = working(&mut rig);
    let Rig { network, backend, .. } = &mut rig;
    load::run(&mut device, network, 10_000, || {
        for _ in 0..10 {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            backend.become_target(target)?;
        }
        Ok(())
    })
    .unwrap();
    // Kills the last owner under load. The next back-end learns from the region how far that one was.
    device.options.canaries = false;
    rig.inject(1000..1100, 700).unwrap();
    rig.transmit(&mut device, 1000..1100, 700).unwrap();
    rig.kill_backend().unwrap();
    rig.restart_backend().unwrap();
    let connection = rig.backend.connect().unwrap();
    device.reconnect(connection).unwrap();
    device.wait_transmitted(0).unwrap();
    use_every_buffer(&mut rig, &mut device, 1_000_000);
    assert_eq!(device.ring(RX).queue.outstanding(), usize::from(SIZE));
    rig.backend.check_healthy().unwrap();
}

#[test]
fn front_end_that_never_requests_a_region_is_served() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.kill_backend().unwrap();
    rig.restart_backend().unwrap();
    let connection = rig.backend.connect().unwrap();
    device.reconnect(connection).unwrap();
    rig.check_traffic(&mut device).unwrap();
    use_every_buffer(&mut rig, &mut device, 1000);
}

#[test]
fn front_end_that_requests_a_region_but_never_sets_it_is_served() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = negotiated(rig.backend.connect().unwrap(), options(), 2, SIZE);
    let region = device.inflight.take().unwrap();
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    assert!(region.to_vec().iter().all(|&byte| byte == 0), "the region is used before the front-end sets it");
}

/// The head of the chain at a place of the available ring.
fn available_head(device: &Device, index: u32, place: u16) -> u16 {
    let offset = 4 + 2 * usize::from(place);
    device.ring(index).queue.raw()[1].load_u16(offset, Ordering::Acquire)
}

/// Plays another back-end on a vring: returns the chains at the places `given_back`, in this order, and leaves the
/// others of the first `taken` in flight.
fn leave_out_of_order(device: &Device, index: u32, taken: u16, given_back: &[u16]) {
    let queue = &device.ring(index).queue;
    let [_, _, used] = queue.raw();
    let head = |place| available_head(device, index, place);
    for (nth, &place) in given_back.iter().enumerate() {
        used.write_u32(4 + 8 * nth, head(place).into());
        used.write_u32(8 + 8 * nth, 0);
    }
    let count = u16::try_from(given_back.len()).unwrap();
    used.store_u16(2, count, Ordering::Release);
    let region = region(device);
    let vring = u16::try_from(index).unwrap();
    region.set_queue(vring, count);
    for place in (0..taken).filter(|place| !given_back.contains(place)) {
        region.set_chain(vring, head(place), 100 + u64::from(place));
    }
}

#[test]
fn chains_left_out_of_order_come_first() {
    leftovers_come_first(|_, used| Some(used));
}

#[test]
fn chains_left_in_flight_come_first_if_the_base_is_the_available_index() {
    leftovers_come_first(|available, _| Some(available));
}

#[test]
fn chains_left_in_flight_come_first_without_a_base() {
    leftovers_come_first(|_, _| None);
}

fn leftovers_come_first(base: impl Fn(u16, u16) -> Option<u16>) {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    // A back-end that completes chains out of order does not offer IN_ORDER.
    let options = Options { features: Options::default().features, canaries: false, ..options() };
    let mut device = negotiated(rig.backend.connect().unwrap(), options, 2, SIZE);
    for number in 0..8 {
        let frame = frames::numbered(number, 100);
        assert!(device.enqueue(0, &NetHeader::default(), &frame).unwrap());
    }
    device.ring_mut(TX).queue.publish();
    device.post_receive_buffers(0, 6).unwrap();
    leave_out_of_order(&device, TX, 6, &[3, 1]);
    leave_out_of_order(&device, RX, 5, &[2]);
    let heads: Vec<_> = (0..6).map(|place| available_head(&device, RX, place)).collect();

    let share = |device: &Device| {
        device.connection.set_memory_table(&device.memory).unwrap();
        device.connection.set_inflight(region(device)).unwrap();
    };
    share(&device);
    // Stops and restarts the receive ring while some of these chains are still in flight.
    let base = |device: &Device, index| {
        base(device.ring(index).queue.next_available(), device.ring(index).queue.used_index())
    };
    let (rx_base, tx_base) = (base(&device, RX), base(&device, TX));
    device.connection.set_vring_enable(RX, true).unwrap();
    device.set_up_ring_with(RX, rx_base).unwrap();
    device.ring(RX).kick().unwrap();
    rig.inject(0..1, 100).unwrap();
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(1)).unwrap();
    // The base lies after all chains that the other back-end took, since these do not complete in ring order.
    assert_eq!(device.stop_ring(RX).unwrap(), 5);
    device.restart_ring(RX, 5).unwrap();
    rig.inject(1..5, 100).unwrap();
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(5)).unwrap();
    let order: Vec<_> = (0..6).map(|place| device.ring(RX).queue.used_entry(place).head).collect();
    assert_eq!(order, [2, 0, 1, 3, 4, 5].map(|place: usize| heads[place]));

    device.connection.set_vring_enable(TX, true).unwrap();
    device.set_up_ring_with(TX, tx_base).unwrap();
    device.ring(TX).kick().unwrap();
    for number in [0, 2, 4, 5, 6, 7] {
        rig.expect_on_network(number..number + 1).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    // The other back-end returned this chain empty.
    device.ring_mut(RX).queue.pop().unwrap();
    rig.expect_in_guest(&mut device, 0..5).unwrap();
    for index in [RX, TX] {
        let base = device.stop_ring(index).unwrap();
        assert_eq!(base, device.ring(index).queue.used_index(), "vring {index}");
    }
}

#[test]
fn rings_continue_from_any_base_if_no_chain_is_in_flight() {
    type Base = fn(u16, u16) -> Option<u16>;
    let bases: [Base; 4] =
        [|used, _| Some(used), |_, available| Some(available), |_, _| Some(0), |_, _| None];
    for base in bases {
        let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
        let mut device = working(&mut rig);
        device.wait_transmitted(0).unwrap();
        rig.kill_backend().unwrap();
        rig.restart_backend().unwrap();
        device.connection = rig.backend.connect().unwrap();
        device.negotiate().unwrap();
        device.connection.set_memory_table(&device.memory).unwrap();
        device.connection.set_inflight(region(&device)).unwrap();
        for index in [RX, TX] {
            let queue = &device.ring(index).queue;
            let base = base(queue.used_index(), queue.next_available());
            device.set_up_ring_with(index, base).unwrap();
            device.connection.set_vring_enable(index, true).unwrap();
            device.ring(index).kick().unwrap();
        }
        for _ in 0..3 {
            rig.check_traffic(&mut device).unwrap();
        }
        device.wait_transmitted(0).unwrap();
        for index in [RX, TX] {
            assert_eq!(device.stop_ring(index).unwrap(), device.ring(index).queue.used_index());
        }
    }
}

#[test]
fn garbage_in_the_region_does_no_harm() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut random = Random::from_environment();
    let mut device = working(&mut rig);
    for round in 0..50u32 {
        // Overwrites the region before the session, and again while the rings run.
        let scribble = |device: &Device, random: &mut Random| {
            let region = region(device);
            match round % 4 {
                0 => region.fill(0xff),
                1 => region.fill(1),
                _ => region.scribble(|| random.next_u64().to_le_bytes()[0]),
            }
        };
        scribble(&device, &mut random);
        let connection = rig.backend.connect().unwrap();
        device.reconnect(connection).unwrap();
        rig.check_traffic(&mut device).unwrap();
        scribble(&device, &mut random);
        rig.check_traffic(&mut device).unwrap();
        device.wait_transmitted(0).unwrap();
    }
    rig.backend.check_healthy().unwrap();
}

#[test]
fn invalid_region_is_refused() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = working(&mut rig);
    let good = region(&device);
    let set = request::SET_INFLIGHT_FD;
    let size = 2 * u64::from(SIZE + 1) * 16 + 2 * 48;
    for (size, offset, queues, entries) in [
        (size - 1, 0, 2, SIZE),
        (size, 0, 3, SIZE),
        (size, 0, 2, SIZE + 4),
        (size, 4096, 2, SIZE),
        (size, 64, 2, SIZE),
        (size, u64::MAX - 4095, 2, SIZE),
        (u64::MAX, 0, u16::MAX, u16::MAX),
        (0, 0, 1, 1),
    ] {
        let message = Message::inflight(set, size, offset, queues, entries);
        assert_ne!(device.connection.acknowledge(&message, &[good.file()]).unwrap(), 0, "{message:?}");
    }
    rig.check_traffic(&mut device).unwrap();
    drop(device);
    // The back-end can only answer these by closing the connection.
    for (queues, entries) in [(3, SIZE), (2, 32769), (0, SIZE), (2, 0), (u16::MAX, u16::MAX)] {
        let mut device = Device::new(rig.backend.connect().unwrap(), options()).unwrap();
        device.negotiate().unwrap();
        let message = Message::inflight(request::GET_INFLIGHT_FD, 0, 0, queues, entries);
        device.connection.send(&message, &[]).unwrap();
        device.connection.wait_closed().unwrap();
    }
    rig.backend.check_healthy().unwrap();
}

#[test]
fn truncated_region_ends_only_the_session() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = negotiated(rig.backend.connect().unwrap(), options(), 2, SIZE);
    // The back-end's own region cannot be truncated.
    let own = device.inflight.replace(Inflight::in_memory(2, SIZE).unwrap()).unwrap();
    assert!(own.truncate().is_err());
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    region(&device).truncate().unwrap();
    rig.inject(0..1, 100).unwrap();
    device.connection.wait_closed().unwrap();
    drop(device);
    let mut device = working(&mut rig);
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn vring_without_room_in_the_region_runs_without_it() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    for (vrings, entries) in [(1, SIZE), (2, SIZE / 2)] {
        let mut device = negotiated(rig.backend.connect().unwrap(), options(), vrings, entries);
        device.set_up().unwrap();
        device.fill_receive_rings().unwrap();
        for _ in 0..3 {
            rig.check_traffic(&mut device).unwrap();
            rig.kill_backend().unwrap();
            rig.restart_backend().unwrap();
            let connection = rig.backend.connect().unwrap();
            device.reconnect(connection).unwrap();
        }
        rig.check_traffic(&mut device).unwrap();
    }
}

#[test]
fn region_is_discarded_with_the_session_and_by_reset_device() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let device = working(&mut rig);
    device.connection.tell(&Message::empty(request::RESET_DEVICE), &[]).unwrap();
    region(&device).fill(0);
    let Device { connection, inflight, .. } = device;
    let mut device = Device::new(connection, options()).unwrap();
    device.connection.set_features(device.options.features).unwrap();
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    let unused = |region: &Inflight| region.to_vec().iter().all(|&byte| byte == 0);
    assert!(unused(inflight.as_ref().unwrap()), "the region is used after a reset");

    drop(device);
    let mut device = working(&mut rig);
    region(&device).fill(0);
    let inflight = device.inflight.take().unwrap();
    let connection = rig.backend.connect().unwrap();
    device.reconnect(connection).unwrap();
    rig.check_traffic(&mut device).unwrap();
    assert!(unused(&inflight), "the region is used in the next session");
}
