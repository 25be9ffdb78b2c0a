//! Where a vring stops and goes on: the indices of `GET_VRING_BASE` and `SET_VRING_BASE`, and what happens to a
//! frame in hand.
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
    the_base_is_the_next_available_index,
    the_base_of_a_ring_that_was_never_started_is_the_one_it_was_given,
    indices_wrap_around,
    a_frame_read_but_not_delivered_is_delivered_after_a_restart,
    a_ring_that_ran_out_of_buffers_goes_on_when_it_is_given_some,
    a_ring_that_ran_without_work_goes_on_without_a_kick,
    nothing_is_in_flight_when_the_base_is_given,
    stopping_a_ring_drops_its_kick_and_call_descriptors,
    a_reconnecting_front_end_goes_on_from_the_used_index,
    a_ring_in_use_that_is_given_base_0_goes_on_from_its_used_index,
    frames_that_wait_in_a_ring_survive_a_reconnect,
    frames_survive_a_reconnect_although_their_kick_is_still_there,
    completion_in_order_replays_right_after_a_crash,
}

const RX: u32 = 0;
const TX: u32 = 1;

fn the_base_is_the_next_available_index(datapath: Datapath) {
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

fn the_base_of_a_ring_that_was_never_started_is_the_one_it_was_given(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.connection.set_owner().unwrap();
    device.connection.set_features(device.options.features).unwrap();
    device.connection.set_vring_num(RX, 256).unwrap();
    device.connection.set_vring_base(RX, 42).unwrap();
    assert_eq!(device.stop_ring(RX).unwrap(), 42);
    // Nor does asking change it.
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

fn a_frame_read_but_not_delivered_is_delivered_after_a_restart(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    netns::set_mtu(TAP, 9000).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // One buffer, where this frame needs two.
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

fn a_ring_that_ran_out_of_buffers_goes_on_when_it_is_given_some(datapath: Datapath) {
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

fn a_ring_that_ran_without_work_goes_on_without_a_kick(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // With event indices nothing in memory tells that the driver was asked not to kick.
    let features = Options::default().features | features::EVENT_IDX;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    rig.backend.wait_started(RX).unwrap();
    assert_eq!(device.stop_ring(RX).unwrap(), 0);
    device.ring_mut(RX).renew_events().unwrap();
    device.set_up_ring(RX, 0).unwrap();
    rig.inject(0..3, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..3).unwrap();
}

fn nothing_is_in_flight_when_the_base_is_given(datapath: Datapath) {
    const ROUNDS: u32 = 100;
    const BURST: u32 = 40;
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..ROUNDS {
        let numbers = round * BURST..(round + 1) * BURST;
        rig.inject(numbers.clone(), 100).unwrap();
        rig.transmit(&mut device, numbers.clone(), 100).unwrap();
        // In the middle of it all.
        for index in [RX, TX] {
            let base = device.stop_ring(index).unwrap();
            let before = device.ring(index).queue.raw()[2].to_vec();
            assert_eq!(
                base,
                device.ring(index).queue.used_index(),
                "vring {index} stopped with chains in hand"
            );
            device.connection.get_features().unwrap();
            assert!(device.ring(index).queue.raw()[2].to_vec() == before, "vring {index} went on");
            device.restart_ring(index, base).unwrap();
        }
        rig.expect_in_guest(&mut device, numbers.clone()).unwrap();
        rig.expect_on_network(numbers).unwrap();
        device.wait_transmitted(0).unwrap();
    }
}

fn stopping_a_ring_drops_its_kick_and_call_descriptors(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let running = rig.backend.process.open_fds().unwrap();
    device.stop_ring(RX).unwrap();
    rig.backend.process.wait_open_fds(running - 2).unwrap();
    let base = device.stop_ring(TX).unwrap();
    rig.backend.process.wait_open_fds(running - 4).unwrap();

    // Nobody listens to the old kick any more.
    device.ring(TX).kick().unwrap();
    rig.transmit(&mut device, 0..1, 100).unwrap();
    device.connection.get_features().unwrap();
    assert!(device.ring(TX).kick.read().unwrap() >= 1);
    assert_eq!(rig.network.drain().unwrap(), 0);
    device.restart_ring(TX, base).unwrap();
    rig.expect_on_network(0..1).unwrap();
}

/// A device that has received and sent something, and has given frames to a back-end which is not there any more.
fn used_device(rig: &mut Rig) -> Device {
    // The kernel does not promise to complete in order, but does so all the same.
    let in_order = if rig.datapath == Datapath::Userspace { features::IN_ORDER } else { 0 };
    let features = Options::default().features | in_order;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    for _ in 0..20 {
        rig.check_traffic(&mut device).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    device
}

fn a_reconnecting_front_end_goes_on_from_the_used_index(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    for round in 0..10 {
        // It waits in the backlog until the old connection has gone.
        let connection = rig.backend.connect().unwrap();
        device.reconnect(connection).unwrap();
        rig.inject(round * 10..(round + 1) * 10, 100).unwrap();
        rig.expect_in_guest(&mut device, round * 10..(round + 1) * 10).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn a_ring_in_use_that_is_given_base_0_goes_on_from_its_used_index(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    // A virtio-user front-end whose back-end comes back: these first, then the handshake.
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
    frames_wait_for_a_reconnect(datapath, false);
}

fn frames_survive_a_reconnect_although_their_kick_is_still_there(datapath: Datapath) {
    frames_wait_for_a_reconnect(datapath, true);
}

fn frames_wait_for_a_reconnect(datapath: Datapath, kicked: bool) {
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
    // virtio-user enables when all is set up, and kicks no more.
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

fn completion_in_order_replays_right_after_a_crash(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    // Killed somewhere in the middle of these.
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
    // At most the batch in hand came twice, and that in order.
    let mut distinct = received.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct, (0..200).collect::<Vec<_>>());
    let steps_back = received.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(steps_back <= 1, "{received:?}");
    rig.check_traffic(&mut device).unwrap();
}
