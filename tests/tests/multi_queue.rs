//! Several queue pairs: their number, which TAP queues are attached, and that no frame is lost when that changes.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::wire::{Message, request};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames::{self, Network, Transport, segment};
use baton_tests::netns::Netns;
use baton_tests::on_both_datapaths;

on_both_datapaths! {
    get_queue_num_returns_the_number_of_vrings,
    indices_beyond_the_last_vring_are_refused,
    every_pair_carries_frames_both_ways,
    many_pairs_work,
    all_flows_arrive_on_the_enabled_pairs,
    without_mq_all_flows_arrive_on_the_first_pair,
    pairs_enabled_only_by_set_features_get_no_flows,
    pairs_enabled_but_not_set_up_get_no_flows,
    pairs_not_set_up_get_no_flows_after_a_hand_over,
    stopped_and_disabled_pair_gets_no_flows,
    pairs_enabled_before_they_are_set_up_keep_their_frames,
    flows_of_a_disabled_pair_go_to_the_others,
    stopped_pair_keeps_its_frames,
    disabling_and_enabling_all_rings_loses_no_frame,
    stopping_and_restarting_all_rings_loses_no_frame,
    frames_queued_on_the_first_pair_survive_its_disabling,
    transmissions_of_a_disabled_pair_are_discarded,
    single_queue_tap_is_refused_for_two_pairs,
}

fn options(queue_pairs: u16) -> Options {
    let features = Options::default().features | features::MQ;
    Options { queue_pairs, features, ..Options::default() }
}

/// A frame of the UDP flow with this source port, carrying a number.
fn flow(port: u16, number: u32) -> Vec<u8> {
    let mut frame = segment(Network::V4, Transport::Udp, &number.to_be_bytes());
    let place = frame.transport_offset;
    frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
    frame.bytes
}

fn number_in(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[frame.len() - 4..].try_into().unwrap())
}

/// A flow that the kernel puts on queue pair `wanted`.
fn flow_on(rig: &mut Rig, device: &mut Device, wanted: usize) -> u16 {
    for port in 2000..3000 {
        rig.network.send(&flow(port, 0)).unwrap();
        if rig.receive_on_any(device).unwrap().0 == wanted {
            return port;
        }
    }
    panic!("none of a thousand flows arrives on queue pair {wanted}");
}

fn get_queue_num_returns_the_number_of_vrings(datapath: Datapath) {
    for queue_pairs in [1, 3, 128] {
        let mut rig = Rig::new(datapath, queue_pairs, &[]).unwrap();
        let connection = rig.backend.connect().unwrap();
        connection.get_features().unwrap();
        let protocol = connection.get_protocol_features().unwrap();
        connection.set_protocol_features(protocol).unwrap();
        assert_eq!(connection.get_queue_num().unwrap(), 2 * u64::from(queue_pairs));
    }
}

fn indices_beyond_the_last_vring_are_refused(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 3, &[]).unwrap();
    for index in [6, 7, 256, u32::MAX] {
        for request in [
            request::SET_VRING_NUM,
            request::SET_VRING_BASE,
            request::GET_VRING_BASE,
            request::SET_VRING_ENABLE,
        ] {
            let device = rig.device(Options::default()).unwrap();
            let message = Message::vring_state(request, index, 1).with_need_reply();
            device.connection.send(&message, &[]).unwrap();
            if let Some(reply) = device.connection.try_receive().unwrap() {
                assert_eq!(reply.payload.len(), 8);
                assert_ne!(reply.payload, [0; 8], "{message:?} was acknowledged");
            }
        }
    }
    let mut device = rig.device(options(3)).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn every_pair_carries_frames_both_ways(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let mut device = rig.device(options(4)).unwrap();
    for pair in 0..4 {
        let port = flow_on(&mut rig, &mut device, pair);
        for number in 1..100 {
            rig.network.send(&flow(port, number)).unwrap();
            let (_, frame) = device.receive(pair).unwrap();
            assert_eq!(number_in(&frame), number);
            device.send(pair, &NetHeader::default(), &frame).unwrap();
            assert_eq!(rig.network.receive().unwrap().1, frame);
        }
    }
    for pair in 0..4 {
        // The kernel's datapath does not count frames.
        let all = |frames: Option<u64>| frames.is_none_or(|frames| frames >= 99);
        rig.backend.wait_pair_stats(pair, |stats| all(stats.rx.frames) && all(stats.tx.frames)).unwrap();
    }
}

fn many_pairs_work(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 128, &[]).unwrap();
    let mut device = rig.device(Options { queue_size: 16, ..options(128) }).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn all_flows_arrive_on_the_enabled_pairs(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    for port in 2000..2100 {
        rig.network.send(&flow(port, u32::from(port))).unwrap();
        let (_, frame) = rig.receive_on_any(&mut device).unwrap();
        assert_eq!(number_in(&frame), u32::from(port));
    }
}

fn without_mq_all_flows_arrive_on_the_first_pair(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for port in 2000..2100 {
        rig.network.send(&flow(port, u32::from(port))).unwrap();
        let (_, frame) = device.receive(0).unwrap();
        assert_eq!(number_in(&frame), u32::from(port));
    }
}

/// Checks that the first pair gets all of many flows.
fn check_flows(rig: &Rig, device: &mut Device) {
    for port in 2000..2064 {
        rig.network.send(&flow(port, u32::from(port))).unwrap();
        let (_, frame) = device.receive(0).unwrap();
        assert_eq!(number_in(&frame), u32::from(port));
    }
}

/// Without `F_PROTOCOL_FEATURES` there is no `SET_VRING_ENABLE`: `SET_FEATURES` enables all rings, including those of
/// the pairs that the front-end does not use.
fn pairs_enabled_only_by_set_features_get_no_flows(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let features = features::VERSION_1 | features::MRG_RXBUF;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    rig.check_traffic(&mut device).unwrap();
    check_flows(&rig, &mut device);
}

fn pairs_enabled_but_not_set_up_get_no_flows(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    for enabled_first in [true, false] {
        let mut device = Device::new(rig.backend.connect().unwrap(), options(2)).unwrap();
        device.negotiate().unwrap();
        device.connection.set_memory_table(&device.memory).unwrap();
        let enable_all = |device: &Device| {
            (0..8).for_each(|index| device.connection.set_vring_enable(index, true).unwrap());
        };
        if enabled_first {
            enable_all(&device);
        }
        for index in [0, 1] {
            device.set_up_ring(index, 0).unwrap();
        }
        if !enabled_first {
            enable_all(&device);
        }
        device.fill_receive_rings().unwrap();
        rig.transmit(&mut device, 0..1, 100).unwrap();
        rig.expect_on_network(0..1).unwrap();
        check_flows(&rig, &mut device);

        // A pair that is set up later gets flows.
        for index in [2, 3] {
            device.set_up_ring(index, 0).unwrap();
        }
        rig.check_traffic(&mut device).unwrap();
        flow_on(&mut rig, &mut device, 1);
    }
}

/// The hand-over may come before the source detaches their queues.
fn pairs_not_set_up_get_no_flows_after_a_hand_over(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), options(2)).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    let target = Backend::waiting_for_session(datapath, &[]).unwrap();
    (0..8).for_each(|index| device.connection.set_vring_enable(index, true).unwrap());
    for index in [0, 1] {
        device.set_up_ring(index, 0).unwrap();
    }
    rig.backend.become_busy_target(target).unwrap();
    device.fill_receive_rings().unwrap();
    rig.transmit(&mut device, 0..1, 100).unwrap();
    rig.expect_on_network(0..1).unwrap();
    check_flows(&rig, &mut device);
}

fn stopped_and_disabled_pair_gets_no_flows(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    for stopped_first in [true, false] {
        let mut device = rig.device(options(2)).unwrap();
        flow_on(&mut rig, &mut device, 1);
        for index in [2, 3] {
            let disable = || device.connection.set_vring_enable(index, false).unwrap();
            if !stopped_first {
                disable();
            }
            device.stop_ring(index).unwrap();
            if stopped_first {
                disable();
            }
        }
        check_flows(&rig, &mut device);
    }
}

/// QEMU does this. If the start of the first pair detached the queues of the others, frames would be lost or reordered.
fn pairs_enabled_before_they_are_set_up_keep_their_frames(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let port = flow_on(&mut rig, &mut device, 1);
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in 0..4 {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    for number in 0..50 {
        rig.network.send(&flow(port, number)).unwrap();
    }
    for index in 0..4 {
        device.ring_mut(index).renew_events().unwrap();
        device.set_up_ring(index, device.ring(index).queue.used_index()).unwrap();
        device.connection.get_features().unwrap();
    }
    // They arrive on the first pair if the set-up takes too long.
    for number in 0..50 {
        assert_eq!(number_in(&rig.receive_on_any(&mut device).unwrap().1), number);
    }
}

fn flows_of_a_disabled_pair_go_to_the_others(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let port = flow_on(&mut rig, &mut device, 1);
    for round in 0..20 {
        for index in [2, 3] {
            device.connection.set_vring_enable(index, false).unwrap();
        }
        for number in 0..20 {
            rig.network.send(&flow(port, round * 100 + number)).unwrap();
            let (_, frame) = device.receive(0).unwrap();
            assert_eq!(number_in(&frame), round * 100 + number);
        }
        // Enables twice: for the kernel it is an error to attach an attached queue.
        for index in [2, 3, 2, 3] {
            device.connection.set_vring_enable(index, true).unwrap();
        }
        for number in 20..40 {
            rig.network.send(&flow(port, round * 100 + number)).unwrap();
            let (_, frame) = rig.receive_on_any(&mut device).unwrap();
            assert_eq!(number_in(&frame), round * 100 + number);
        }
    }
    flow_on(&mut rig, &mut device, 1);
    rig.check_traffic(&mut device).unwrap();
}

fn stopped_pair_keeps_its_frames(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let port = flow_on(&mut rig, &mut device, 1);
    for round in 0..20 {
        let base = device.stop_ring(2).unwrap();
        for number in 0..50 {
            rig.network.send(&flow(port, round * 100 + number)).unwrap();
        }
        device.connection.get_features().unwrap();
        device.restart_ring(2, base).unwrap();
        for number in 0..50 {
            let (_, frame) = device.receive(1).unwrap();
            assert_eq!(number_in(&frame), round * 100 + number);
        }
    }
}

fn disabling_and_enabling_all_rings_loses_no_frame(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let ports = [flow_on(&mut rig, &mut device, 0), flow_on(&mut rig, &mut device, 1)];
    // Cloud Hypervisor pauses like this, the first pair first. Frames that are in the TAP's queues must stay there.
    for index in 0..4 {
        device.connection.set_vring_enable(index, false).unwrap();
    }
    for number in 0..50 {
        for port in ports {
            rig.network.send(&flow(port, number)).unwrap();
        }
    }
    device.connection.get_features().unwrap();
    for index in 0..4 {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    for pair in [0, 1] {
        for number in 0..50 {
            let (_, frame) = device.receive(pair).unwrap();
            assert_eq!(number_in(&frame), number, "pair {pair}");
        }
    }
}

fn stopping_and_restarting_all_rings_loses_no_frame(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let ports = [flow_on(&mut rig, &mut device, 0), flow_on(&mut rig, &mut device, 1)];
    for round in 0..10 {
        let bases: Vec<_> = (0..4).map(|index| device.stop_ring(index).unwrap()).collect();
        for number in 0..50 {
            for port in ports {
                rig.network.send(&flow(port, number)).unwrap();
            }
        }
        // QEMU enables each pair before it starts it; others leave them enabled.
        for (index, base) in (0..).zip(bases) {
            if round % 2 == 0 {
                device.connection.set_vring_enable(index, true).unwrap();
            }
            device.restart_ring(index, base).unwrap();
        }
        for pair in [0, 1] {
            for number in 0..50 {
                let (_, frame) = device.receive(pair).unwrap();
                assert_eq!(number_in(&frame), number, "pair {pair}");
            }
        }
    }
}

fn frames_queued_on_the_first_pair_survive_its_disabling(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let port = flow_on(&mut rig, &mut device, 0);
    device.connection.set_vring_enable(0, false).unwrap();
    for number in 0..50 {
        rig.network.send(&flow(port, number)).unwrap();
    }
    device.connection.set_vring_enable(0, true).unwrap();
    for number in 0..50 {
        assert_eq!(number_in(&device.receive(0).unwrap().1), number);
    }
}

fn transmissions_of_a_disabled_pair_are_discarded(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    for index in [2, 3] {
        device.connection.set_vring_enable(index, false).unwrap();
    }
    // A detached TAP queue would still accept them.
    for number in 0..10 {
        device.send(1, &NetHeader::default(), &frames::numbered(number, 100)).unwrap();
    }
    device.wait_transmitted(1).unwrap();
    rig.backend.wait_pair_stats(1, |stats| stats.tx.discarded == 10).unwrap();
    rig.transmit(&mut device, 20..21, 100).unwrap();
    rig.expect_on_network(20..21).unwrap();
}

fn single_queue_tap_is_refused_for_two_pairs(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let tap = format!("--tap={TAP}");
    let mut backend = Backend::listening(datapath, &[&tap, "--queue-pairs=2"], &[]).unwrap();
    assert_eq!(backend.process.wait().unwrap().code(), Some(1));
    let log = backend.process.log();
    assert!(log.lines().count() == 1 && log.contains(TAP) && log.contains("multi"), "{log}");
}
