//! A TAP with a limited send buffer (`--sndbuf`): transmission stops while the buffer is full and resumes when it has
//! room.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::process::Command;

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::frames;
use baton_tests::link::ip;
use baton_tests::netns::wait_running;
use baton_tests::packet_socket::PacketSocket;

/// Number of frames sent: many times what the send buffer and the transmit ring hold.
const FRAMES: u32 = 600;

/// Bridges the TAP with a slow line; returns the far end. Frames wait in the line's queue, where they still occupy the
/// TAP's send buffer.
fn slow_line() -> PacketSocket {
    ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"]).unwrap();
    ip(&["link", "add", "bridge", "type", "bridge", "mcast_snooping", "0"]).unwrap();
    for (interface, arguments) in
        [(TAP, &["master", "bridge"][..]), ("near", &["master", "bridge"]), ("far", &[]), ("bridge", &[])]
    {
        ip(&[&["link", "set", interface, "up"], arguments].concat()).unwrap();
    }
    // The kernel drops frames until it notices the carrier.
    ["far", "near", "bridge"].into_iter().try_for_each(wait_running).unwrap();
    let limit = ["rate", "8mbit", "burst", "3000", "limit", "4000000"];
    let status =
        Command::new("tc").args(["qdisc", "add", "dev", "near", "root", "tbf"]).args(limit).status().unwrap();
    assert!(status.success(), "tc failed");
    PacketSocket::open("far").unwrap()
}

#[test]
fn full_send_buffer_loses_no_frame_and_transmission_resumes() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--sndbuf=20000"]).unwrap();
    let mut far = slow_line();
    let mut device = rig.device(Options::default()).unwrap();
    // Nothing arrives from the network, so only the free room can wake the worker.
    rig.transmit(&mut device, 0..FRAMES, 1400).unwrap();
    for number in 0..FRAMES {
        let (_, frame) = far.receive().unwrap();
        assert_eq!(frames::number_of(&frame), Some(number));
    }
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.dropped, Some(0));
}

#[test]
fn transmission_resumes_with_the_smallest_send_buffer() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--sndbuf=6"]).unwrap();
    let mut far = slow_line();
    let mut device = rig.device(Options::default()).unwrap();
    rig.transmit(&mut device, 0..20, 1400).unwrap();
    for number in 0..20 {
        let (_, frame) = far.receive().unwrap();
        assert_eq!(frames::number_of(&frame), Some(number));
    }
}
