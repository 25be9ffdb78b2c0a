//! Several queues of a macvtap (`--tap-fds`). Unlike a TAP, a macvtap keeps its settings per queue rather than per
//! device, and does not report its deletion (Linux: `drivers/net/tap.c`).
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use baton_tests::backend::Backend;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, NetHeader, Options};
use baton_tests::frames::{self, Network, Transport};
use baton_tests::link::ip;
use baton_tests::macvtap::{MACVTAP, Macvtap};
use baton_tests::netns::Netns;

const FLOWS: u16 = 64;

/// Limits the wait of a test that hangs.
const PATIENCE: Duration = Duration::from_secs(120);

fn start(macvtap: &mut Macvtap) -> Backend {
    let numbers: Vec<_> = macvtap.queues.iter().map(|queue| queue.as_raw_fd().to_string()).collect();
    let option = format!("--tap-fds={}", numbers.join(","));
    let fds: Vec<_> = macvtap.queues.iter().map(AsFd::as_fd).collect();
    let mut backend = Backend::listening(Datapath::Userspace, &[&option], &fds).unwrap();
    assert_eq!(backend.status().unwrap().tap, MACVTAP);
    drop(fds);
    macvtap.queues.clear();
    backend
}

/// A frame of the flow with this number.
fn flow(number: u16) -> Vec<u8> {
    let mut frame = frames::segment(Network::V4, Transport::Udp, &[7; 100]).bytes;
    frame[34..36].copy_from_slice(&(1000 + number).to_be_bytes());
    frame
}

/// Sends a frame from each pair, and one frame of each flow to the guest; returns how many frames each pair receives.
fn check_traffic(device: &mut Device, macvtap: &mut Macvtap) -> Vec<usize> {
    for pair in 0..device.pairs.len() {
        let frame = frames::numbered(u32::try_from(pair).unwrap(), 100);
        device.send(pair, &NetHeader::default(), &frame).unwrap();
        assert_eq!(macvtap.network.receive().unwrap().1, frame, "sent by pair {pair}");
    }
    (0..FLOWS).for_each(|number| macvtap.network.send(&flow(number)).unwrap());
    let mut received = vec![0; device.pairs.len()];
    let mut missing: Vec<_> = (0..FLOWS).map(flow).collect();
    let deadline = Instant::now() + PATIENCE;
    let mut frame = Vec::new();
    while !missing.is_empty() {
        assert!(Instant::now() < deadline, "{} flows are missing; received {received:?}", missing.len());
        for (pair, received) in received.iter_mut().enumerate() {
            while device.try_receive(pair, &mut frame).unwrap().is_some() {
                let place = missing.iter().position(|missing| *missing == frame);
                missing.remove(place.unwrap_or_else(|| panic!("pair {pair} received {frame:02x?}")));
                *received += 1;
            }
        }
        std::thread::yield_now();
    }
    received
}

#[test]
fn every_queue_uses_the_negotiated_header() {
    let netns = Netns::enter().unwrap();
    let mut macvtap = Macvtap::create(&netns, 2).unwrap();
    let mut backend = start(&mut macvtap);
    let mut device = backend.device(Options { queue_pairs: 2, ..Options::default() }).unwrap();
    let received = check_traffic(&mut device, &mut macvtap);
    assert!(received.iter().all(|&received| received > 0), "a queue is not used: {received:?}");
}

#[test]
fn disabled_pair_receives_nothing_until_it_is_enabled() {
    let netns = Netns::enter().unwrap();
    let mut macvtap = Macvtap::create(&netns, 3).unwrap();
    let mut backend = start(&mut macvtap);
    let mut device = backend.device(Options { queue_pairs: 3, ..Options::default() }).unwrap();
    for _ in 0..2 {
        device.connection.set_vring_enable(4, false).unwrap();
        device.connection.get_features().unwrap();
        let received = check_traffic(&mut device, &mut macvtap);
        assert_eq!(received[2], 0, "{received:?}");
        device.connection.set_vring_enable(4, true).unwrap();
        device.connection.get_features().unwrap();
        let received = check_traffic(&mut device, &mut macvtap);
        assert!(received[2] > 0, "{received:?}");
    }
}

#[test]
fn session_is_handed_over_with_all_queues() {
    let netns = Netns::enter().unwrap();
    let mut macvtap = Macvtap::create(&netns, 2).unwrap();
    let mut backend = start(&mut macvtap);
    let mut device = backend.device(Options { queue_pairs: 2, ..Options::default() }).unwrap();
    check_traffic(&mut device, &mut macvtap);
    for _ in 0..2 {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
        backend.become_busy_target(target).unwrap();
        check_traffic(&mut device, &mut macvtap);
    }
}

#[test]
fn back_end_ends_when_its_macvtap_is_deleted() {
    let netns = Netns::enter().unwrap();
    let mut macvtap = Macvtap::create(&netns, 2).unwrap();
    let mut backend = start(&mut macvtap);
    let mut device = backend.device(Options { queue_pairs: 2, ..Options::default() }).unwrap();
    check_traffic(&mut device, &mut macvtap);
    ip(&["link", "del", MACVTAP]).unwrap();
    assert_eq!(backend.process.wait().unwrap().code(), Some(1));
    let log = backend.process.log();
    assert!(log.lines().last().unwrap().contains("the TAP was deleted"), "{log}");
}
