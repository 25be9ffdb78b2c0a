//! Where a vring stops and continues: the indices of `GET_VRING_BASE` and `SET_VRING_BASE`, and what happens to a frame
//! in hand.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::time::Instant;

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames;
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;

on_both_datapaths! {
    base_is_the_next_available_index,
    base_of_a_ring_that_never_started_is_the_base_set,
    indices_wrap_around,
    frame_in_hand_is_delivered_after_a_restart,
    ring_without_buffers_continues_when_it_gets_some,
    idle_ring_continues_after_a_restart_without_a_kick,
    no_chain_is_in_flight_when_the_base_is_returned,
    stopping_a_ring_closes_its_kick_and_call_descriptors,
    rings_continue_from_the_used_index_after_a_reconnect,
    used_ring_continues_from_its_used_index_with_base_0,
    frames_that_wait_in_a_ring_survive_a_reconnect,
    frames_survive_a_reconnect_while_their_kick_is_pending,
    crash_repeats_at_most_one_batch_in_order,
}

const RX: u32 = 0;
const TX: u32 = 1;

fn base_is_the_next_available_index(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.transmit(&mut device, 0..13, 100).unwrap();
    rig.expect_on_network(0..13).unwrap();
    rig.inject(0..5, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..5).unwrap();
    device.wait_transmitted(0).unwrap();
    assert_eq!(device.stop_ring(TX).unwrap(), 13);
    assert_eq!(device.stop_ring(RX).unwrap(), 5);
}

fn base_of_a_ring_that_never_started_is_the_base_set(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.connection.set_owner().unwrap();
    device.connection.set_features(device.options.features).unwrap();
    device.connection.set_vring_num(RX, 256).unwrap();
    device.connection.set_vring_base(RX, 42).unwrap();
    assert_eq!(device.stop_ring(RX).unwrap(), 42);
    // GET_VRING_BASE does not change it.
    assert_eq!(device.stop_ring(RX).unwrap(), 42);
}

fn indices_wrap_around(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).queue.start_at(65_530);
        device.set_up_ring(index, 65_530).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    device.fill_receive_rings().unwrap();
    rig.transmit(&mut device, 0..20, 100).unwrap();
    rig.expect_on_network(0..20).unwrap();
    rig.inject(0..20, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..20).unwrap();
    device.wait_transmitted(0).unwrap();
    assert_eq!(device.stop_ring(TX).unwrap(), 14);
    assert_eq!(device.stop_ring(RX).unwrap(), 14);
}

fn frame_in_hand_is_delivered_after_a_restart(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    netns::set_mtu(TAP, 9000).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // The frame needs two buffers, and there is one.
    device.post_receive_buffers(0, 1).unwrap();
    device.pairs[0].receive.kick().unwrap();
    rig.inject(0..1, 3000).unwrap();
    rig.inject(1..4, 100).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    assert!(!device.pairs[0].receive.queue.has_used(), "a part of a frame was delivered");

    let base = device.stop_ring(RX).unwrap();
    assert_eq!(base, 0);
    device.post_receive_buffers(0, 10).unwrap();
    device.restart_ring(RX, base).unwrap();
    rig.expect_in_guest(&mut device, 0..4).unwrap();
    assert_eq!(rig.backend.pair_stats(0).unwrap().rx.dropped.unwrap_or_default(), 0);
}

fn ring_without_buffers_continues_when_it_gets_some(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    device.pairs[0].receive.kick().unwrap();
    rig.inject(0..100, 100).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    device.post_receive_buffers(0, 200).unwrap();
    device.pairs[0].receive.kick().unwrap();
    rig.expect_in_guest(&mut device, 0..100).unwrap();
}

fn idle_ring_continues_after_a_restart_without_a_kick(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // With event indices nothing in memory says that the device suppressed kicks.
    let features = Options::default().features | features::EVENT_IDX;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    rig.backend.wait_started(RX).unwrap();
    assert_eq!(device.stop_ring(RX).unwrap(), 0);
    device.ring_mut(RX).renew_events().unwrap();
    device.set_up_ring(RX, 0).unwrap();
    rig.inject(0..3, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..3).unwrap();
}

fn no_chain_is_in_flight_when_the_base_is_returned(datapath: Datapath) {
    const ROUNDS: u32 = 100;
    const BURST: u32 = 40;
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..ROUNDS {
        let numbers = round * BURST..(round + 1) * BURST;
        rig.inject(numbers.clone(), 100).unwrap();
        rig.transmit(&mut device, numbers.clone(), 100).unwrap();
        // Stops the rings under traffic.
        for index in [RX, TX] {
            let base = device.stop_ring(index).unwrap();
            let before = device.ring(index).queue.raw()[2].to_vec();
            assert_eq!(
                base,
                device.ring(index).queue.used_index(),
                "vring {index} stopped with chains in flight"
            );
            device.connection.get_features().unwrap();
            assert!(device.ring(index).queue.raw()[2].to_vec() == before, "vring {index} continued");
            device.restart_ring(index, base).unwrap();
        }
        rig.expect_in_guest(&mut device, numbers.clone()).unwrap();
        rig.expect_on_network(numbers).unwrap();
        device.wait_transmitted(0).unwrap();
    }
}

fn stopping_a_ring_closes_its_kick_and_call_descriptors(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let running = rig.backend.process.open_fds().unwrap();
    device.stop_ring(RX).unwrap();
    rig.backend.process.wait_open_fds(running - 2).unwrap();
    let base = device.stop_ring(TX).unwrap();
    rig.backend.process.wait_open_fds(running - 4).unwrap();

    // The back-end no longer watches the old kick descriptor.
    device.ring(TX).kick().unwrap();
    rig.transmit(&mut device, 0..1, 100).unwrap();
    device.connection.get_features().unwrap();
    assert!(device.ring(TX).kick.read().unwrap() >= 1);
    assert_eq!(rig.network.drain().unwrap(), 0);
    device.restart_ring(TX, base).unwrap();
    rig.expect_on_network(0..1).unwrap();
}

/// A device whose rings have been in use.
fn used_device(rig: &mut Rig) -> Device {
    // vhost-net may not offer IN_ORDER, but completes in order all the same.
    let in_order = if rig.datapath == Datapath::Userspace { features::IN_ORDER } else { 0 };
    let features = Options::default().features | in_order;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    for _ in 0..20 {
        rig.check_traffic(&mut device).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    device
}

fn rings_continue_from_the_used_index_after_a_reconnect(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    for round in 0..10 {
        // The new connection waits in the backlog until the old one is closed.
        let connection = rig.backend.connect().unwrap();
        device.reconnect(connection).unwrap();
        rig.inject(round * 10..(round + 1) * 10, 100).unwrap();
        rig.expect_in_guest(&mut device, round * 10..(round + 1) * 10).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn used_ring_continues_from_its_used_index_with_base_0(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    // As virtio-user when its back-end returns: these messages first, then the handshake.
    device.connection = rig.backend.connect().unwrap();
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, false).unwrap();
        device.stop_ring(index).unwrap();
    }
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        assert_ne!(device.ring(index).queue.used_index(), 0);
        device.restart_ring(index, 0).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    for _ in 0..10 {
        rig.check_traffic(&mut device).unwrap();
    }
}

fn frames_that_wait_in_a_ring_survive_a_reconnect(datapath: Datapath) {
    check_frames_survive_a_reconnect(datapath, false);
}

fn frames_survive_a_reconnect_while_their_kick_is_pending(datapath: Datapath) {
    check_frames_survive_a_reconnect(datapath, true);
}

fn check_frames_survive_a_reconnect(datapath: Datapath, kicked: bool) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    rig.kill_backend().unwrap();
    for number in 0..50 {
        let frame = frames::numbered(number, 100);
        assert!(device.enqueue(0, &NetHeader::default(), &frame).unwrap());
    }
    device.pairs[0].transmit.queue.publish();
    if kicked {
        device.ring(TX).kick().unwrap();
    }

    rig.restart_backend().unwrap();
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    // virtio-user enables the rings when all are set up, and does not kick again.
    for index in [RX, TX] {
        if !kicked {
            device.ring_mut(index).renew_events().unwrap();
        }
        device.set_up_ring(index, 0).unwrap();
    }
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    rig.expect_on_network(0..50).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn crash_repeats_at_most_one_batch_in_order(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    // The back-end is killed while it sends these.
    for number in 0..200 {
        let frame = frames::numbered(number, 100);
        assert!(device.enqueue(0, &NetHeader::default(), &frame).unwrap());
    }
    let before = device.pairs[0].transmit.queue.used_index();
    device.flush(0).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while device.pairs[0].transmit.queue.used_index() == before {
        assert!(Instant::now() < deadline, "nothing was transmitted");
        std::hint::spin_loop();
    }
    rig.kill_backend().unwrap();

    rig.restart_backend().unwrap();
    let connection = rig.backend.connect().unwrap();
    device.reconnect(connection).unwrap();
    device.wait_transmitted(0).unwrap();
    let mut received = Vec::new();
    while received.last() != Some(&199) {
        received.push(frames::number_of(&rig.network.receive().unwrap().1).unwrap());
    }
    // At most one batch arrives twice, and in order.
    let mut distinct = received.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct, (0..200).collect::<Vec<_>>());
    let steps_back = received.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(steps_back <= 1, "{received:?}");
    rig.check_traffic(&mut device).unwrap();
}
