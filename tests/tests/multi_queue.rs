//! Several queue pairs: how many there are, how the TAP's queues follow them, and that no frame is lost on the way.
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
    get_queue_num_gives_the_number_of_vrings,
    indices_beyond_the_last_vring_are_refused,
    every_pair_carries_frames_both_ways,
    many_pairs_work,
    a_device_that_enables_fewer_pairs_receives_everything_on_those,
    without_multi_queue_everything_is_received_on_the_first_pair,
    pairs_that_are_enabled_by_set_features_alone_get_no_flows,
    pairs_that_are_enabled_and_not_set_up_get_no_flows,
    pairs_that_are_not_set_up_get_no_flows_from_the_next_back_end_either,
    a_pair_that_is_stopped_and_disabled_gets_no_flows,
    pairs_that_are_enabled_first_and_set_up_one_by_one_keep_their_frames,
    a_disabled_pairs_flows_go_to_the_others,
    a_stopped_pair_keeps_its_frames,
    a_pause_of_all_rings_keeps_every_frame,
    a_stop_of_all_rings_keeps_every_frame,
    frames_that_wait_on_the_first_pair_survive_its_disabling,
    transmissions_of_a_disabled_pair_are_discarded,
    a_tap_of_one_queue_is_refused_for_two_pairs,
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
    panic!("no flow of a thousand is on queue pair {wanted}");
}

fn get_queue_num_gives_the_number_of_vrings(datapath: Datapath) {
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
        // Where they are counted.
        let all = |frames: Option<u64>| frames.is_none_or(|frames| frames >= 99);
        rig.backend.wait_pair_stats(pair, |stats| all(stats.rx.frames) && all(stats.tx.frames)).unwrap();
    }
}

fn many_pairs_work(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 128, &[]).unwrap();
    let mut device = rig.device(Options { queue_size: 16, ..options(128) }).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn a_device_that_enables_fewer_pairs_receives_everything_on_those(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    for port in 2000..2100 {
        rig.network.send(&flow(port, u32::from(port))).unwrap();
        let (_, frame) = rig.receive_on_any(&mut device).unwrap();
        assert_eq!(number_in(&frame), u32::from(port));
    }
}

fn without_multi_queue_everything_is_received_on_the_first_pair(datapath: Datapath) {
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

/// Without `F_PROTOCOL_FEATURES` there is no `SET_VRING_ENABLE`: all rings are enabled, the one pair and those that the
/// front-end does not know.
fn pairs_that_are_enabled_by_set_features_alone_get_no_flows(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 4, &[]).unwrap();
    let features = features::VERSION_1 | features::MRG_RXBUF;
    let mut device = rig.device(Options { features, ..Options::default() }).unwrap();
    rig.check_traffic(&mut device).unwrap();
    check_flows(&rig, &mut device);
}

fn pairs_that_are_enabled_and_not_set_up_get_no_flows(datapath: Datapath) {
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

        // A pair that comes later gets its share.
        for index in [2, 3] {
            device.set_up_ring(index, 0).unwrap();
        }
        rig.check_traffic(&mut device).unwrap();
        flow_on(&mut rig, &mut device, 1);
    }
}

/// A hand-over may come before their queues are detached.
fn pairs_that_are_not_set_up_get_no_flows_from_the_next_back_end_either(datapath: Datapath) {
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

fn a_pair_that_is_stopped_and_disabled_gets_no_flows(datapath: Datapath) {
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

/// As QEMU does it: a queue that lost its frames to the first pair's start would lose or reorder them.
fn pairs_that_are_enabled_first_and_set_up_one_by_one_keep_their_frames(datapath: Datapath) {
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
    // On the first pair if this took very long.
    for number in 0..50 {
        assert_eq!(number_in(&rig.receive_on_any(&mut device).unwrap().1), number);
    }
}

fn a_disabled_pairs_flows_go_to_the_others(datapath: Datapath) {
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
        // Twice is once: attaching an attached queue is an error to the kernel.
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

fn a_stopped_pair_keeps_its_frames(datapath: Datapath) {
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

fn a_pause_of_all_rings_keeps_every_frame(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let ports = [flow_on(&mut rig, &mut device, 0), flow_on(&mut rig, &mut device, 1)];
    // Cloud Hypervisor pauses like this, the first pair first; frames that are in the TAP's queues by then must stay.
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

fn a_stop_of_all_rings_keeps_every_frame(datapath: Datapath) {
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

fn frames_that_wait_on_the_first_pair_survive_its_disabling(datapath: Datapath) {
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
    // A detached TAP queue would still take them.
    for number in 0..10 {
        device.send(1, &NetHeader::default(), &frames::numbered(number, 100)).unwrap();
    }
    device.wait_transmitted(1).unwrap();
    rig.backend.wait_pair_stats(1, |stats| stats.tx.discarded == 10).unwrap();
    rig.transmit(&mut device, 20..21, 100).unwrap();
    rig.expect_on_network(20..21).unwrap();
}

fn a_tap_of_one_queue_is_refused_for_two_pairs(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let tap = format!("--tap={TAP}");
    let mut backend = Backend::listening(datapath, &[&tap, "--queue-pairs=2"], &[]).unwrap();
    assert_eq!(backend.process.wait().unwrap().code(), Some(1));
    let log = backend.process.log();
    assert!(log.lines().count() == 1 && log.contains(TAP) && log.contains("multi"), "{log}");
}
