//! The reference back-end moves frames for a front-end that checks each of them.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::ops::Range;

use baton_tests::fake_frontend::wire::protocol;
use baton_tests::fake_frontend::{Device, NetHeader, Options, features};
use baton_tests::frames;
use baton_tests::netns::Netns;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::reference_backend::Program;

const TAP: &str = "tap0";
/// Frames sent one by one: more than a queue has descriptors, so each descriptor is reused.
const SINGLE: u32 = 300;
/// Frames in flight each way: fewer than the TAP holds, more than the smallest queue has descriptors.
const BURST: u32 = 100;

/// A device without mergeable receive buffers.
fn options(extra: u64, queue_size: u16) -> Options {
    Options {
        features: features::PROTOCOL_FEATURES | features::VERSION_1 | extra,
        protocol_features: protocol::REPLY_ACK,
        queue_size,
        ..Options::default()
    }
}

/// Checks that numbered frames arrive both ways, all of them and in order.
fn check_burst(network: &mut PacketSocket, device: &mut Device, numbers: Range<u32>, length: usize) {
    for number in numbers.clone() {
        let frame = frames::numbered(number, length);
        network.send(&frame).unwrap();
        device.send(0, &NetHeader::default(), &frame).unwrap();
    }
    for number in numbers {
        let (header, frame) = device.receive(0).unwrap();
        assert_eq!((frames::number_of(&frame), frame.len()), (Some(number), length), "in the guest");
        assert_eq!(header.num_buffers, 1);
        let (_, frame) = network.receive().unwrap();
        assert_eq!((frames::number_of(&frame), frame.len()), (Some(number), length), "on the network");
    }
}

/// Checks frames one by one, and in bursts.
fn check_traffic(network: &mut PacketSocket, device: &mut Device) {
    for number in 0..SINGLE {
        check_burst(network, device, number..number + 1, 60);
    }
    for (burst, length) in (0..).zip([60, 100, 1000, 1514]) {
        check_burst(network, device, burst * BURST..(burst + 1) * BURST, length);
    }
    device.wait_transmitted(0).unwrap();
}

#[test]
fn frames_go_both_ways_in_order() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let backend = Program::start(TAP).unwrap();
    let pieces = vec![12, 500, 1500];
    let devices = [
        options(0, 256),
        options(features::EVENT_IDX, 16),
        Options {
            receive_pieces: pieces.clone(),
            transmit_pieces: pieces,
            indirect: true,
            ..options(features::EVENT_IDX | features::INDIRECT_DESC, 256)
        },
    ];
    for options in devices {
        let mut device = Device::connect(&backend.socket, options).unwrap();
        check_traffic(&mut network, &mut device);
    }
}

#[test]
fn frames_wait_until_stopped_rings_restart() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let backend = Program::start(TAP).unwrap();
    let mut device = Device::connect(&backend.socket, options(features::EVENT_IDX, 256)).unwrap();
    check_traffic(&mut network, &mut device);
    let bases = [0, 1].map(|index| device.stop_ring(index).unwrap());
    let frame = frames::numbered(0, 100);
    network.send(&frame).unwrap();
    device.send(0, &NetHeader::default(), &frame).unwrap();
    for (index, base) in (0..).zip(bases) {
        device.restart_ring(index, base).unwrap();
    }
    assert_eq!(device.receive(0).unwrap().1, frame);
    assert_eq!(network.receive().unwrap().1, frame);
    check_traffic(&mut network, &mut device);
}
