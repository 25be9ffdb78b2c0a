//! When a vring runs, and what the back-end does with it in each state (vhost-user: "Ring states"). Started and enabled
//! are independent of each other.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::os::fd::AsFd;
use std::time::Instant;

use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames;
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;

on_both_datapaths! {
    enabling_is_remembered_while_a_ring_is_stopped,
    disabling_is_remembered_while_a_ring_is_stopped,
    set_vring_kick_starts_a_ring_without_a_kick,
    ring_that_is_enabled_last_runs_without_a_kick,
    ring_with_used_index_wrapped_to_0_continues_without_a_kick,
    no_frame_is_discarded_before_a_ring_is_first_enabled,
    ring_without_a_kick_descriptor_is_polled,
    frames_in_a_started_and_disabled_transmit_ring_are_discarded,
    available_frames_are_sent_when_a_transmit_ring_is_disabled,
    frames_keep_their_order_while_a_transmit_ring_is_disabled_and_enabled,
    started_and_disabled_receive_ring_receives_nothing,
    without_protocol_features_set_features_enables_all_rings,
    with_protocol_features_set_features_keeps_ring_states,
    nothing_is_written_to_guest_memory_while_all_rings_are_disabled,
    set_features_may_arrive_while_rings_run,
    set_mem_table_may_arrive_while_rings_run,
    set_vring_addr_may_arrive_while_rings_run,
    kick_and_call_descriptors_may_be_replaced_while_rings_run,
    suspended_device_writes_nothing_and_still_answers,
}

const RX: u32 = 0;
const TX: u32 = 1;

/// A device that is set up except for `SET_VRING_ENABLE` and kicks.
fn prepared(rig: &mut Rig, options: Options) -> Device {
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.set_up_ring(index, 0).unwrap();
    }
    device
}

fn enabling_is_remembered_while_a_ring_is_stopped(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    // Enables the rings before they are set up.
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.set_up_ring(index, 0).unwrap();
    }
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();

    // Stopping does not disable.
    for index in [RX, TX] {
        let base = device.stop_ring(index).unwrap();
        device.restart_ring(index, base).unwrap();
    }
    rig.check_traffic(&mut device).unwrap();
}

fn disabling_is_remembered_while_a_ring_is_stopped(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    let base = device.stop_ring(RX).unwrap();
    device.connection.set_vring_enable(RX, false).unwrap();
    device.restart_ring(RX, base).unwrap();

    rig.inject(0..3, 100).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    assert!(!device.pairs[0].receive.queue.has_used(), "a disabled ring received a frame");
    device.connection.set_vring_enable(RX, true).unwrap();
    rig.expect_in_guest(&mut device, 0..3).unwrap();
}

/// Makes a frame and receive buffers available to the device, without a kick.
fn make_available_without_kicks(device: &mut Device, number: u32) {
    device.post_receive_buffers(0, 16).unwrap();
    let frame = frames::numbered(number, 100);
    assert!(device.enqueue(0, &NetHeader::default(), &frame).unwrap());
    device.pairs[0].transmit.queue.publish();
}

/// The specification's text of May 2026 (proposed by its author, under review): `SET_VRING_KICK` starts a ring,
/// available chains are processed at once, and a back-end should not expect a kick. QEMU, crosvm, rust-vmm and DPDK do
/// so.
fn set_vring_kick_starts_a_ring_without_a_kick(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let features = Options::default().features | features::EVENT_IDX;
    for features in [Options::default().features, features] {
        let mut device =
            Device::new(rig.backend.connect().unwrap(), Options { features, ..Options::default() }).unwrap();
        device.negotiate().unwrap();
        device.connection.set_memory_table(&device.memory).unwrap();
        make_available_without_kicks(&mut device, 7);
        for index in [RX, TX] {
            device.connection.set_vring_enable(index, true).unwrap();
            device.set_up_ring(index, 0).unwrap();
        }
        let vrings = rig.backend.status().unwrap().vrings;
        assert!(vrings.iter().all(|vring| vring.started), "{vrings:?}");
        rig.expect_on_network(7..8).unwrap();
        rig.inject(0..3, 100).unwrap();
        rig.expect_in_guest(&mut device, 0..3).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn ring_that_is_enabled_last_runs_without_a_kick(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = prepared(&mut rig, Options::default());
    make_available_without_kicks(&mut device, 7);
    rig.inject(0..3, 100).unwrap();
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    rig.expect_on_network(7..8).unwrap();
    rig.expect_in_guest(&mut device, 0..3).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

/// Nothing in such a ring shows that it was ever used, and its front-end does not kick it again.
fn ring_with_used_index_wrapped_to_0_continues_without_a_kick(datapath: Datapath) {
    const FRAMES: u16 = 20;
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let start = 0u16.wrapping_sub(FRAMES);
    let features = Options::default().features | features::EVENT_IDX;
    let options = Options { features, ..Options::default() };
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).queue.start_at(start);
        device.set_up_ring(index, start).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    device.fill_receive_rings().unwrap();
    let frames = 0..u32::from(FRAMES);
    rig.transmit(&mut device, frames.clone(), 100).unwrap();
    rig.expect_on_network(frames.clone()).unwrap();
    rig.inject(frames.clone(), 100).unwrap();
    rig.expect_in_guest(&mut device, frames).unwrap();
    device.wait_transmitted(0).unwrap();
    for index in [RX, TX] {
        assert_eq!(device.ring(index).queue.used_index(), 0);
    }

    rig.kill_backend().unwrap();
    rig.restart_backend().unwrap();
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    make_available_without_kicks(&mut device, 7);
    for index in [RX, TX] {
        device.ring_mut(index).renew_events().unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
        device.set_up_ring(index, 0).unwrap();
    }
    rig.expect_on_network(7..8).unwrap();
    rig.inject(0..3, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..3).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn no_frame_is_discarded_before_a_ring_is_first_enabled(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = prepared(&mut rig, Options::default());
    rig.transmit(&mut device, 0..50, 100).unwrap();
    device.ring(TX).kick().unwrap();
    // Neither disabling a disabled ring nor a restart changes that.
    device.connection.set_vring_enable(TX, false).unwrap();
    assert_eq!(device.stop_ring(TX).unwrap(), 0);
    device.restart_ring(TX, 0).unwrap();
    device.connection.set_vring_enable(TX, true).unwrap();
    rig.expect_on_network(0..50).unwrap();
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.discarded, 0);

    device.connection.set_vring_enable(TX, false).unwrap();
    rig.transmit(&mut device, 50..60, 100).unwrap();
    device.wait_transmitted(0).unwrap();
    rig.backend.wait_pair_stats(0, |stats| stats.tx.discarded == 10).unwrap();
}

fn ring_without_a_kick_descriptor_is_polled(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    device.post_receive_buffers(0, 16).unwrap();
    for index in [RX, TX] {
        let ring = device.ring(index);
        device.connection.set_vring_num(index, ring.queue.size()).unwrap();
        device.connection.set_vring_base(index, 0).unwrap();
        device.connection.set_vring_addresses(index, &device.memory, ring.queue.addresses()).unwrap();
        device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
        device.connection.set_vring_kick(index, None).unwrap();
    }
    // These kicks do not reach the back-end.
    rig.transmit(&mut device, 0..5, 100).unwrap();
    rig.expect_on_network(0..5).unwrap();
    rig.inject(0..16, 100).unwrap();
    rig.expect_in_guest(&mut device, 0..16).unwrap();
    // The back-end finds the reposted buffers without a kick, too.
    rig.inject(16..32, 100).unwrap();
    rig.expect_in_guest(&mut device, 16..32).unwrap();
}

fn frames_in_a_started_and_disabled_transmit_ring_are_discarded(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    device.connection.set_vring_enable(TX, false).unwrap();
    rig.transmit(&mut device, 0..300, 100).unwrap();
    device.wait_transmitted(0).unwrap();
    rig.backend.wait_pair_stats(0, |stats| stats.tx.discarded == 300).unwrap();

    device.connection.set_vring_enable(TX, true).unwrap();
    rig.transmit(&mut device, 1000..1003, 100).unwrap();
    rig.expect_on_network(1000..1003).unwrap();
    assert_eq!(rig.network.drain().unwrap(), 0, "a discarded frame reached the TAP");
    // The kernel's datapath does not count frames.
    rig.backend.wait_pair_stats(0, |stats| stats.tx.frames.is_none_or(|frames| frames == 3)).unwrap();
}

/// Cloud Hypervisor pauses its VM like this: the vCPUs first, then `SET_VRING_ENABLE` 0 for each ring, without
/// `GET_VRING_BASE`.
fn available_frames_are_sent_when_a_transmit_ring_is_disabled(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    for round in 0..10 {
        device.wait_transmitted(0).unwrap();
        let numbers = round * 200..(round + 1) * 200;
        for number in numbers.clone() {
            assert!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 100)).unwrap());
        }
        device.pairs[0].transmit.queue.publish();
        // With a kick in every other round.
        if round % 2 == 0 {
            device.ring(TX).kick().unwrap();
        }
        for index in [RX, TX] {
            device.connection.set_vring_enable(index, false).unwrap();
        }
        rig.expect_on_network(numbers).unwrap();
        // Later frames are discarded.
        rig.transmit(&mut device, 0..10, 100).unwrap();
        device.wait_transmitted(0).unwrap();
        let discarded = u64::from(round + 1) * 10;
        rig.backend.wait_pair_stats(0, |stats| stats.tx.discarded == discarded).unwrap();
        for index in [RX, TX] {
            device.connection.set_vring_enable(index, true).unwrap();
        }
    }
    rig.check_traffic(&mut device).unwrap();
    let base = device.stop_ring(TX).unwrap();
    assert_eq!(base, device.ring(TX).queue.used_index());
}

fn frames_keep_their_order_while_a_transmit_ring_is_disabled_and_enabled(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..100 {
        let numbers = round * 20..(round + 1) * 20;
        rig.transmit(&mut device, numbers.clone(), 200).unwrap();
        for enabled in [false, true] {
            device.connection.set_vring_enable(TX, enabled).unwrap();
        }
        rig.expect_on_network(numbers).unwrap();
    }
    assert_eq!(rig.network.drain().unwrap(), 0);
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.discarded, 0);
}

fn started_and_disabled_receive_ring_receives_nothing(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    device.connection.set_vring_enable(RX, false).unwrap();
    rig.inject(0..50, 100).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    assert!(!device.pairs[0].receive.queue.has_used(), "a disabled ring received a frame");
    device.connection.set_vring_enable(RX, true).unwrap();
    rig.expect_in_guest(&mut device, 0..50).unwrap();
}

fn without_protocol_features_set_features_enables_all_rings(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let features = features::VERSION_1 | features::MRG_RXBUF;
    let mut device = prepared(&mut rig, Options { features, ..Options::default() });
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn with_protocol_features_set_features_keeps_ring_states(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = prepared(&mut rig, Options::default());
    device.fill_receive_rings().unwrap();
    // Neither ring is enabled.
    rig.inject(0..1, 100).unwrap();
    rig.transmit(&mut device, 0..1, 100).unwrap();
    device.connection.set_features(device.options.features).unwrap();
    assert!(!device.pairs[0].receive.queue.has_used());
    assert!(!device.pairs[0].transmit.queue.has_used());

    // SET_FEATURES leaves each ring as it is.
    device.connection.set_vring_enable(TX, true).unwrap();
    device.connection.set_features(device.options.features).unwrap();
    rig.expect_on_network(0..1).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    assert!(!device.pairs[0].receive.queue.has_used());
    device.connection.set_vring_enable(RX, true).unwrap();
    device.connection.set_features(device.options.features).unwrap();
    rig.expect_in_guest(&mut device, 0..1).unwrap();
}

fn nothing_is_written_to_guest_memory_while_all_rings_are_disabled(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.wait_transmitted(0).unwrap();
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, false).unwrap();
    }
    // The worker has nothing left to write once it has discarded this frame.
    rig.transmit(&mut device, 0..1, 100).unwrap();
    device.wait_transmitted(0).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !device.ring(TX).queue.wants_kicks() {
        assert!(Instant::now() < deadline, "the device does not ask for a kick");
        std::thread::yield_now();
    }
    let before = device.memory.snapshot();
    device.pairs[0].receive.take_calls().unwrap();

    rig.inject(0..100, 100).unwrap();
    // A kick without a buffer makes the worker look at its rings.
    for index in [RX, TX] {
        device.ring(index).kick().unwrap();
    }
    if datapath == Datapath::Userspace {
        rig.backend.wait_pair_stats(0, |stats| stats.tx.kicks >= Some(2)).unwrap();
    }
    device.connection.get_features().unwrap();
    assert!(device.memory.snapshot() == before, "guest memory was written while all rings were disabled");
    assert_eq!(device.pairs[0].receive.take_calls().unwrap(), 0);

    for index in [RX, TX] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    rig.expect_in_guest(&mut device, 0..100).unwrap();
}

/// Sends `change` again and again while frames go both ways: no frame may be lost or reordered.
fn under_traffic(datapath: Datapath, change: impl Fn(&Device)) {
    const ROUNDS: u32 = 100;
    const BURST: u32 = 20;
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..ROUNDS {
        let numbers = round * BURST..(round + 1) * BURST;
        rig.inject(numbers.clone(), 200).unwrap();
        rig.transmit(&mut device, numbers.clone(), 200).unwrap();
        change(&device);
        rig.expect_in_guest(&mut device, numbers.clone()).unwrap();
        rig.expect_on_network(numbers).unwrap();
    }
    assert_eq!(rig.network.drain().unwrap(), 0);
}

fn set_features_may_arrive_while_rings_run(datapath: Datapath) {
    under_traffic(datapath, |device| device.connection.set_features(device.options.features).unwrap());
}

fn set_mem_table_may_arrive_while_rings_run(datapath: Datapath) {
    under_traffic(datapath, |device| device.connection.set_memory_table(&device.memory).unwrap());
}

fn set_vring_addr_may_arrive_while_rings_run(datapath: Datapath) {
    under_traffic(datapath, |device| {
        for index in [RX, TX] {
            let addresses = device.ring(index).queue.addresses();
            device.connection.set_vring_addresses(index, &device.memory, addresses).unwrap();
        }
    });
}

fn kick_and_call_descriptors_may_be_replaced_while_rings_run(datapath: Datapath) {
    under_traffic(datapath, |device| {
        for index in [RX, TX] {
            let ring = device.ring(index);
            device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
            device.connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
        }
    });
}

fn suspended_device_writes_nothing_and_still_answers(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let features = Options::default().features | features::MQ;
    let options = Options { queue_pairs: 2, features, ..Options::default() };
    let mut device = rig.device(options).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let bases: Vec<_> = (0..4).map(|index| device.stop_ring(index).unwrap()).collect();
    let before = device.memory.snapshot();
    for index in 0..4 {
        device.ring(index).take_calls().unwrap();
    }

    rig.inject(0..50, 100).unwrap();
    for index in 0..4 {
        device.ring(index).kick().unwrap();
    }
    for _ in 0..20 {
        // Each of these fails if the back-end sends an unsolicited message.
        device.connection.get_features().unwrap();
        device.connection.get_protocol_features().unwrap();
        assert_eq!(device.connection.get_queue_num().unwrap(), 4);
        device.connection.set_features(device.options.features).unwrap();
    }
    assert!(device.memory.snapshot() == before, "guest memory was written while suspended");
    for index in 0..4 {
        assert_eq!(device.ring(index).take_calls().unwrap(), 0, "vring {index} was called");
    }

    for (index, &base) in (0..).zip(&bases) {
        device.restart_ring(index, base).unwrap();
    }
    // The frames have waited in the TAP. They are of one flow, and so in one queue.
    for number in 0..50 {
        let (_, frame) = rig.receive_on_any(&mut device).unwrap();
        assert_eq!(frames::number_of(&frame), Some(number));
    }
}
