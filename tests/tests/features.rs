//! Every feature, alone and in subsets: header sizes, mergeable buffers, long chains, indirect tables, event indices,
//! checksums and segmentation in both directions.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::time::Instant;

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::{self, Datapath, TestResult};
use baton_tests::fake_frontend::net::{
    DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NEEDS_CSUM, NetHeader, features,
};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames::{self, ETHERNET, Network, Transport, checksum_is_right, segment};
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::process::PATIENCE;

on_both_datapaths! {
    short_header_works,
    mergeable_buffers_work_without_version_1,
    long_header_works_without_mergeable_buffers,
    mergeable_frame_spans_many_buffers,
    chains_of_19_descriptors_work,
    indirect_tables_work,
    event_idx_and_in_order_work,
    driver_that_suppresses_calls_gets_none,
    driver_is_called_when_the_used_index_passes_the_event_index,
    kicks_are_requested_only_when_the_ring_is_empty,
    partial_checksums_and_large_segments_reach_the_network_unchanged,
    udp_fragmentation_offload_works_if_offered,
    large_segments_reach_a_guest_that_accepts_them,
    guest_without_segmentation_offload_gets_small_segments,
    guest_without_checksum_offload_gets_complete_checksums,
    offloads_are_set_for_each_session,
    every_subset_of_the_features_works,
}

const BASIC: u64 = features::PROTOCOL_FEATURES | features::VERSION_1;
const GUEST_OFFLOADS: u64 = features::GUEST_CSUM
    | features::GUEST_TSO4
    | features::GUEST_TSO6
    | features::GUEST_ECN
    | features::GUEST_USO4
    | features::GUEST_USO6;
const HOST_OFFLOADS: u64 = features::CSUM
    | features::HOST_TSO4
    | features::HOST_TSO6
    | features::HOST_ECN
    | features::HOST_UFO
    | features::HOST_USO;
/// ORed to a TCP `gso_type`: the segment has ECN set.
const GSO_ECN: u8 = 0x80;

fn with(features: u64) -> Options {
    Options { features, ..Options::default() }
}

/// Polls a ring, as a driver that suppresses calls does, until its used index is `used`.
fn wait_used(device: &Device, index: u32, used: u16) {
    let deadline = Instant::now() + PATIENCE;
    while device.ring(index).queue.used_index() != used {
        assert!(Instant::now() < deadline, "vring {index} does not reach used index {used}");
        std::thread::yield_now();
    }
}

/// Checks that `num_buffers` is 1 without mergeable buffers. The vhost-net of older kernels does not set it.
fn check_single(rig: &Rig, device: &Device, header: &NetHeader) {
    let merges = device.options.features & features::MRG_RXBUF != 0;
    if rig.datapath == Datapath::Userspace && device.header_length() == 12 && !merges {
        assert_eq!(header.num_buffers, 1);
    }
}

/// Checks frames of all sizes both ways, one by one and in bursts.
fn check_sizes(rig: &mut Rig, device: &mut Device, largest: usize) {
    let sizes: Vec<usize> = (60..200).chain((200..largest).step_by(37)).chain([largest]).collect();
    for (number, &size) in (0u32..).zip(&sizes) {
        rig.inject(number..number + 1, size).unwrap();
        let (header, frame) = device.receive(0).unwrap();
        assert_eq!((frames::number_of(&frame), frame.len()), (Some(number), size));
        assert_eq!((header.gso_type, header.flags & NEEDS_CSUM), (GSO_NONE, 0));
        check_single(rig, device, &header);
        rig.transmit(device, number..number + 1, size).unwrap();
        let (_, frame) = rig.network.receive().unwrap();
        assert_eq!((frames::number_of(&frame), frame.len()), (Some(number), size));
    }
    for round in 0..10 {
        let numbers = round * 100..(round + 1) * 100;
        rig.inject(numbers.clone(), 100).unwrap();
        rig.transmit(device, numbers.clone(), 100).unwrap();
        rig.expect_in_guest(device, numbers.clone()).unwrap();
        rig.expect_on_network(numbers).unwrap();
    }
    device.wait_transmitted(0).unwrap();
}

fn short_header_works(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(with(features::PROTOCOL_FEATURES)).unwrap();
    assert_eq!(device.header_length(), 10);
    check_sizes(&mut rig, &mut device, 1514);
}

fn mergeable_buffers_work_without_version_1(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let features = features::PROTOCOL_FEATURES | features::MRG_RXBUF;
    let mut device = rig.device(Options { receive_pieces: vec![256], ..with(features) }).unwrap();
    assert_eq!(device.header_length(), 12);
    check_sizes(&mut rig, &mut device, 1514);
}

fn long_header_works_without_mergeable_buffers(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(with(BASIC)).unwrap();
    check_sizes(&mut rig, &mut device, 1514);
}

fn mergeable_frame_spans_many_buffers(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    netns::set_mtu(TAP, 9000).unwrap();
    let features = BASIC | features::MRG_RXBUF;
    for pieces in [vec![300], vec![12, 100], vec![7, 5, 1, 99], vec![4096]] {
        let mut device = rig.device(Options {
            receive_pieces: pieces,
            queue_size: 1024,
            transmit_pieces: vec![9100],
            ..with(features)
        });
        let device = device.as_mut().unwrap();
        check_sizes(&mut rig, device, 9014);
    }
}

fn chains_of_19_descriptors_work(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    netns::set_mtu(TAP, 9000).unwrap();
    // A separate header and up to 18 pages: what Linux posts without mergeable buffers.
    let pieces: Vec<u32> = std::iter::once(12).chain([512; 18]).collect();
    let options =
        Options { receive_pieces: pieces.clone(), transmit_pieces: pieces, queue_size: 1024, ..with(BASIC) };
    let mut device = rig.device(options).unwrap();
    check_sizes(&mut rig, &mut device, 9014);
}

/// User space only: vhost-net accepts at most 1024 descriptors in a chain (`UIO_MAXIOV`).
#[test]
fn chains_as_long_as_the_queue_work() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 4082).unwrap();
        // A header and a frame of the largest size fill the chain to its last byte.
        for (length, queue_size) in [(1024, 1024), (1025, 2048), (2048, 2048)] {
            let pieces = vec![4; length];
            let largest = 4 * length - 12;
            for merge in [0, features::MRG_RXBUF] {
                let options = Options {
                    receive_pieces: pieces.clone(),
                    transmit_pieces: pieces.clone(),
                    queue_size,
                    ..with(BASIC | merge)
                };
                let mut device = rig.device(options).unwrap();
                for number in 0..4 {
                    let size = if number % 2 == 0 { largest.min(4096) } else { 60 };
                    rig.transmit(&mut device, number..number + 1, size).unwrap();
                    rig.expect_on_network(number..number + 1).unwrap();
                    rig.inject(number..number + 1, size).unwrap();
                    rig.expect_in_guest(&mut device, number..number + 1).unwrap();
                }
            }
        }
    })
}

/// User space only, as above.
#[test]
fn mergeable_frame_spans_chains_of_many_descriptors() -> TestResult {
    datapath::run(Datapath::Userspace, |datapath| {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        netns::set_mtu(TAP, 9000).unwrap();
        let options =
            Options { receive_pieces: vec![2; 700], queue_size: 8192, ..with(BASIC | features::MRG_RXBUF) };
        let mut device = rig.device(options).unwrap();
        for (number, size) in (0..).zip([60, 3000, 9014, 60, 9014]) {
            rig.inject(number..number + 1, size).unwrap();
            rig.expect_in_guest(&mut device, number..number + 1).unwrap();
        }
    })
}

fn indirect_tables_work(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let features = BASIC | features::INDIRECT_DESC;
    for pieces in [vec![2048], vec![12, 2000], vec![100; 19], vec![16; 100]] {
        for merge in [0, features::MRG_RXBUF] {
            let options = Options {
                receive_pieces: pieces.clone(),
                transmit_pieces: pieces.clone(),
                indirect: true,
                ..with(features | merge)
            };
            let mut device = rig.device(options).unwrap();
            check_sizes(&mut rig, &mut device, 1514);
        }
    }
}

fn event_idx_and_in_order_work(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let choices: &[u64] = match datapath {
        Datapath::Userspace => {
            &[features::EVENT_IDX, features::IN_ORDER, features::EVENT_IDX | features::IN_ORDER]
        }
        // vhost-net may not offer IN_ORDER.
        Datapath::VhostNet => &[features::EVENT_IDX],
    };
    for extra in choices {
        let mut device = rig.device(with(BASIC | features::MRG_RXBUF | extra)).unwrap();
        check_sizes(&mut rig, &mut device, 1514);
    }
}

fn driver_that_suppresses_calls_gets_none(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for extra in [0, features::EVENT_IDX] {
        let mut device = rig.device(with(BASIC | extra)).unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.wait_transmitted(0).unwrap();
        for index in [0, 1] {
            device.ring_mut(index).queue.disable_calls();
        }
        // Until the worker sees the new flags it may still make a call.
        rig.transmit(&mut device, 0..1, 100).unwrap();
        rig.expect_on_network(0..1).unwrap();
        wait_used(&device, 1, device.pairs[0].transmit.queue.next_available());
        device.connection.get_features().unwrap();
        for index in [0, 1] {
            device.ring(index).take_calls().unwrap();
        }

        rig.transmit(&mut device, 0..50, 100).unwrap();
        rig.expect_on_network(0..50).unwrap();
        let used = device.pairs[0].receive.queue.used_index();
        rig.inject(0..50, 100).unwrap();
        wait_used(&device, 0, used.wrapping_add(50));
        device.connection.get_features().unwrap();
        assert_eq!(device.ring(0).take_calls().unwrap(), 0, "calls for received frames");
        assert_eq!(device.ring(1).take_calls().unwrap(), 0, "calls for transmitted frames");
        // The driver is called again once it asks for calls.
        rig.expect_in_guest(&mut device, 0..50).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn driver_is_called_when_the_used_index_passes_the_event_index(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(with(BASIC | features::EVENT_IDX)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    for round in 0..20 {
        let used = device.pairs[0].receive.queue.used_index();
        device.pairs[0].receive.queue.set_used_event(used.wrapping_add(9));
        device.ring(0).take_calls().unwrap();
        rig.inject(round * 10..(round + 1) * 10, 100).unwrap();
        let deadline = Instant::now() + PATIENCE;
        assert!(device.ring(0).wait_call(deadline).unwrap(), "no call in round {round}");
        assert_eq!(device.pairs[0].receive.queue.used_index().wrapping_sub(used), 10, "called too early");
        rig.expect_in_guest(&mut device, round * 10..(round + 1) * 10).unwrap();
    }
}

fn kicks_are_requested_only_when_the_ring_is_empty(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(with(BASIC | features::EVENT_IDX)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.wait_transmitted(0).unwrap();
    wait_kick_wanted(&device);
    // Counts kicks at the eventfd: the device may count a kick late, since it often sees the frame first. A read takes
    // the kick from the device, so the ring must be idle.
    device.ring(1).kick.read().unwrap_or_default();
    // One kick for all of these: the device asks for one at the first frame only.
    for number in 0..200 {
        assert!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 100)).unwrap());
    }
    device.flush(0).unwrap();
    rig.expect_on_network(0..200).unwrap();
    device.wait_transmitted(0).unwrap();
    wait_kick_wanted(&device);
    assert_eq!(device.ring(1).kick.read(), Ok(1));
}

/// Waits until the device asks for a kick with the next frame.
fn wait_kick_wanted(device: &Device) {
    let queue = &device.pairs[0].transmit.queue;
    let deadline = Instant::now() + PATIENCE;
    while queue.available_event() != queue.next_available() {
        assert!(Instant::now() < deadline, "the device does not ask for a kick");
        std::thread::yield_now();
    }
}

/// A payload of this length.
fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|number| u8::try_from(number % 251).unwrap()).collect()
}

fn offered(rig: &mut Rig) -> u64 {
    rig.backend.connect().unwrap().get_features().unwrap()
}

fn partial_checksums_and_large_segments_reach_the_network_unchanged(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let offered = offered(&mut rig);
    let cases = [
        (0, Network::V4, Transport::Tcp, GSO_NONE, 1000),
        (0, Network::V6, Transport::Udp, GSO_NONE, 1000),
        (features::HOST_TSO4, Network::V4, Transport::Tcp, GSO_TCPV4, 60_000),
        (features::HOST_TSO6, Network::V6, Transport::Tcp, GSO_TCPV6, 60_000),
        (features::HOST_TSO4 | features::HOST_ECN, Network::V4, Transport::Tcp, GSO_TCPV4 | GSO_ECN, 60_000),
        (features::HOST_USO, Network::V4, Transport::Udp, GSO_UDP_L4, 60_000),
        (features::HOST_USO, Network::V6, Transport::Udp, GSO_UDP_L4, 60_000),
    ];
    for (feature, network, transport, gso_type, length) in cases {
        let features = BASIC | features::CSUM | feature;
        if features & !offered != 0 {
            // The TAP of this kernel lacks the feature.
            continue;
        }
        let mut device = rig.device(with(features).with_large_frames()).unwrap();
        let segment = segment(network, transport, &payload(length));
        let size = if gso_type == GSO_NONE { 0 } else { 1400 };
        let header = segment.header(gso_type, size);
        device.send(0, &header, &segment.bytes).unwrap();
        let (received, frame) = rig.network.receive().unwrap();
        assert!(frame == segment.bytes, "{network:?} {transport:?} {gso_type:#x}: the frame differs");
        assert_eq!((received.gso_type, received.gso_size), (gso_type, size), "{network:?} {transport:?}");
        assert_ne!(received.flags & NEEDS_CSUM, 0);
        assert_eq!((received.csum_start, received.csum_offset), (header.csum_start, header.csum_offset));
    }
    assert!(offered & HOST_OFFLOADS & !features::HOST_UFO & !features::HOST_USO != 0);
    let large = rig.backend.pair_stats(0).unwrap().tx.large_frames;
    assert!(large.is_none_or(|frames| frames >= 3), "{large:?}");
}

fn udp_fragmentation_offload_works_if_offered(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    if offered(&mut rig) & features::HOST_UFO == 0 {
        return;
    }
    let mut device =
        rig.device(with(BASIC | features::CSUM | features::HOST_UFO).with_large_frames()).unwrap();
    let segment = segment(Network::V4, Transport::Udp, &payload(20_000));
    let before = netns::counters(TAP).unwrap();
    device.send(0, &segment.header(GSO_UDP, 1400), &segment.bytes).unwrap();
    device.wait_transmitted(0).unwrap();
    // Packet sockets do not receive such a frame, but the interface counts it.
    let after = netns::counters(TAP).unwrap();
    assert_eq!((after.rx_packets - before.rx_packets, after.rx_dropped - before.rx_dropped), (1, 0));
}

fn large_segments_reach_a_guest_that_accepts_them(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let offered = offered(&mut rig);
    let uso = features::GUEST_USO4 | features::GUEST_USO6;
    let cases = [
        (features::GUEST_TSO4, Network::V4, Transport::Tcp, GSO_TCPV4),
        (features::GUEST_TSO6, Network::V6, Transport::Tcp, GSO_TCPV6),
        (features::GUEST_TSO4 | features::GUEST_ECN, Network::V4, Transport::Tcp, GSO_TCPV4 | GSO_ECN),
        (uso, Network::V4, Transport::Udp, GSO_UDP_L4),
        (uso, Network::V6, Transport::Udp, GSO_UDP_L4),
    ];
    for (feature, network, transport, gso_type) in cases {
        for merge in [0, features::MRG_RXBUF] {
            let features = BASIC | features::GUEST_CSUM | feature | merge;
            if features & !offered != 0 {
                // The TAP of this kernel lacks the feature.
                continue;
            }
            let mut device = rig.device(with(features).with_large_frames()).unwrap();
            let segment = segment(network, transport, &payload(60_000));
            let header = segment.header(gso_type, 1400);
            rig.network.send_with(&header, &segment.bytes).unwrap();
            let (received, frame) = device.receive(0).unwrap();
            assert!(
                frame == segment.bytes,
                "{network:?} {transport:?}: the frame differs, {} bytes",
                frame.len()
            );
            assert_eq!((received.gso_type, received.gso_size), (gso_type, 1400));
            assert_ne!(received.flags & NEEDS_CSUM, 0);
            assert_eq!((received.csum_start, received.csum_offset), (header.csum_start, header.csum_offset));
            check_single(&rig, &device, &received);
            assert!(merge == 0 || received.num_buffers == 30);
        }
    }
    let large = rig.backend.pair_stats(0).unwrap().rx.large_frames;
    assert!(large.is_none_or(|frames| frames >= 6), "{large:?}");
}

fn guest_without_segmentation_offload_gets_small_segments(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let everything = GUEST_OFFLOADS & offered(&mut rig);
    let network_side = PacketSocket::open_queued(TAP).unwrap();
    let tcp6 = (Network::V6, Transport::Tcp, GSO_TCPV6);
    let tcp4 = (Network::V4, Transport::Tcp, GSO_TCPV4);
    let cases = [
        // No offload at all, not even partial checksums.
        (0, tcp4),
        (features::GUEST_CSUM, tcp4),
        (features::GUEST_CSUM, tcp6),
        // All offloads except those for this segment.
        (everything & !features::GUEST_TSO4 & !features::GUEST_ECN, tcp4),
        (everything & !features::GUEST_TSO6 & !features::GUEST_ECN, tcp6),
        // Segmentation offload has no effect without partial checksums.
        (everything & !features::GUEST_CSUM, tcp4),
    ];
    for (guest, (network, transport, gso_type)) in cases {
        let mut device = rig.device(with(BASIC | features::MRG_RXBUF | guest)).unwrap();
        let payload = payload(14_000);
        let segment = segment(network, transport, &payload);
        network_side.send_with(&segment.header(gso_type, 1400), &segment.bytes).unwrap();
        let mut joined = Vec::new();
        for _ in 0..10 {
            let (header, frame) = device.receive(0).unwrap();
            assert_eq!(header.gso_type, GSO_NONE, "guest features {guest:#x}");
            assert_eq!(frame.len(), segment.payload_offset + 1400);
            joined.extend_from_slice(&frame[segment.payload_offset..]);
            if guest & features::GUEST_CSUM == 0 {
                assert_eq!(header.flags & (NEEDS_CSUM | DATA_VALID), 0, "guest features {guest:#x}");
            }
            if header.flags & NEEDS_CSUM == 0 {
                assert!(checksum_is_right(&frame), "guest features {guest:#x}");
            }
        }
        assert!(joined == payload);
    }
}

fn guest_without_checksum_offload_gets_complete_checksums(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for guest in [0, features::GUEST_CSUM] {
        let mut device = rig.device(with(BASIC | guest)).unwrap();
        let segment = segment(Network::V4, Transport::Udp, &payload(500));
        rig.network.send_with(&segment.header(GSO_NONE, 0), &segment.bytes).unwrap();
        let (header, frame) = device.receive(0).unwrap();
        assert_eq!(frame.len(), segment.bytes.len());
        if guest == 0 {
            assert_eq!(header.flags, 0);
            assert!(checksum_is_right(&frame));
        } else {
            assert_ne!(header.flags & NEEDS_CSUM, 0);
            assert!(frame == segment.bytes);
        }
    }
}

fn offloads_are_set_for_each_session(datapath: Datapath) {
    // The TAP must not keep the offloads of the last session.
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let all = BASIC | features::MRG_RXBUF | features::GUEST_CSUM | features::GUEST_TSO4;
    let segment = segment(Network::V4, Transport::Tcp, &payload(14_000));
    let network_side = PacketSocket::open_queued(TAP).unwrap();
    for round in 0..4 {
        let accepts_large = round % 2 == 0;
        let features = if accepts_large { all } else { features::PROTOCOL_FEATURES };
        let mut device = rig.device(with(features)).unwrap();
        network_side.send_with(&segment.header(GSO_TCPV4, 1400), &segment.bytes).unwrap();
        let (_, frame) = device.receive(0).unwrap();
        let expected = if accepts_large { segment.bytes.len() } else { ETHERNET + 40 + 1400 };
        assert_eq!(frame.len(), expected, "round {round}");
        let rest = if accepts_large { 0 } else { 9 };
        for _ in 0..rest {
            device.receive(0).unwrap();
        }
        rig.check_traffic(&mut device).unwrap();
    }
}

fn every_subset_of_the_features_works(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &["--mac=02:00:00:00:00:05", "--mtu=1500"]).unwrap();
    let offered = offered(&mut rig);
    let optional = [
        features::VERSION_1,
        features::MRG_RXBUF,
        features::EVENT_IDX,
        features::INDIRECT_DESC,
        features::IN_ORDER,
        GUEST_OFFLOADS,
        HOST_OFFLOADS | features::GUEST_CSUM,
        features::MQ | features::CTRL_VQ | features::GUEST_ANNOUNCE,
        features::MAC | features::MTU | features::STATUS,
    ];
    for choice in 0..1u32 << optional.len() {
        let chosen = (0..).zip(optional).filter(|(bit, _)| choice >> bit & 1 != 0);
        let features = chosen.fold(features::PROTOCOL_FEATURES, |all, (_, some)| all | some) & offered;
        let mut device = rig.device(Options { queue_size: 32, ..with(features) }).unwrap();
        rig.check_traffic(&mut device).unwrap_or_else(|error| panic!("features {features:#x}: {error:#}"));
    }
}
