//! A TAP whose send buffer is limited (`--sndbuf`): the guest is held back, and goes on when there is room again.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::process::Command;

use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::frames;
use baton_tests::link::ip;
use baton_tests::netns::wait_running;
use baton_tests::packet_socket::PacketSocket;

/// Frames sent, many times what the send buffer and the transmit ring hold.
const FRAMES: u32 = 600;

/// Bridges the TAP with a slow line and gives its far end. Frames wait in the line's queue, where they still count
/// as the TAP's.
fn slow_line() -> PacketSocket {
    ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"]).unwrap();
    ip(&["link", "add", "bridge", "type", "bridge", "mcast_snooping", "0"]).unwrap();
    for (interface, arguments) in
        [(TAP, &["master", "bridge"][..]), ("near", &["master", "bridge"]), ("far", &[]), ("bridge", &[])]
    {
        ip(&[&["link", "set", interface, "up"], arguments].concat()).unwrap();
    }
    // The kernel drops frames until it has noticed the carrier.
    ["far", "near", "bridge"].into_iter().try_for_each(wait_running).unwrap();
    let limit = ["rate", "8mbit", "burst", "3000", "limit", "4000000"];
    let status =
        Command::new("tc").args(["qdisc", "add", "dev", "near", "root", "tbf"]).args(limit).status().unwrap();
    assert!(status.success(), "tc failed");
    PacketSocket::open("far").unwrap()
}

#[test]
fn a_full_send_buffer_loses_nothing_and_is_used_again_once_it_has_room() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--sndbuf=20000"]).unwrap();
    let mut far = slow_line();
    let mut device = rig.device(Options::default()).unwrap();
    // Nothing comes from the network, so nothing but the room itself can tell the back-end of it.
    rig.transmit(&mut device, 0..FRAMES, 1400).unwrap();
    for number in 0..FRAMES {
        let (_, frame) = far.receive().unwrap();
        assert_eq!(frames::number_of(&frame), Some(number));
    }
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.dropped, Some(0));
}

#[test]
fn the_smallest_send_buffer_is_used_again_once_it_has_room() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--sndbuf=6"]).unwrap();
    let mut far = slow_line();
    let mut device = rig.device(Options::default()).unwrap();
    rig.transmit(&mut device, 0..20, 1400).unwrap();
    for number in 0..20 {
        let (_, frame) = far.receive().unwrap();
        assert_eq!(frames::number_of(&frame), Some(number));
    }
}
