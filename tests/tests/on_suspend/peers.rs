//! Peers that are slow, silent or unknown.

use std::os::fd::{AsRawFd, OwnedFd};

use baton_channel::bound_socket::BoundSocket;
use baton_control::ControlClient;
use baton_protocol::control::{HandoverState, Request};
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::session_peer::FakeTarget;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use super::{options, take};

#[test]
fn slow_target_holds_up_no_other_request() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let silent = FakeTarget::bind(&rig.backend.directory().join("silent")).unwrap();
    let mut operator = ControlClient::connect(&rig.backend.control).unwrap();
    let path = Some(silent.path().display().to_string());
    let request = Request::Handover { path, on_suspend: true, dry_run: false, cancel: false };
    let asked = std::thread::spawn(move || operator.call(&request));
    let link = silent.accept().unwrap();
    let state = rig.backend.status().unwrap().handover.map(|handover| handover.state);
    assert_eq!(state, Some(HandoverState::Checking));
    let answer = rig.backend.cancel().unwrap();
    assert_eq!(answer, serde_json::json!({"result": "cancelled"}));
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("cancel"), "{error}");
    drop(link);
}

#[test]
fn silent_peer_is_given_up() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let silent = BoundSocket::bind_packets(&rig.backend.directory().join("silent")).unwrap();
    let error = rig.backend.arm(silent.path()).unwrap_err();
    assert_eq!(error.to_string(), "the target does not answer");
    rig.check_traffic(&mut device).unwrap();

    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let stranger = stranger(&target);
    target.wait_handover(HandoverState::Checking).unwrap();
    // Until the silent source times out, the target refuses any other.
    let error = rig.backend.arm(&target.incoming()).unwrap_err();
    assert_eq!(error.to_string(), "the target refuses: busy: the target is in another hand-over");
    target.wait_no_handover().unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    drop(stranger);
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, target).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

/// A source that has not sent anything yet.
fn stranger(target: &Backend) -> OwnedFd {
    let kind = SockType::SeqPacket;
    let stranger = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    let address = UnixAddr::new(&target.incoming()).expect("a short path");
    connect(stranger.as_raw_fd(), &address).expect("a listening target");
    stranger
}

#[test]
fn unknown_peers_do_not_disturb_a_waiting_target() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    let mut packets: Vec<Vec<u8>> = vec![vec![0; 40], vec![0xff; 16], b"BATH".to_vec()];
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/tests/golden/handover-v1");
    for entry in std::fs::read_dir(golden).unwrap() {
        packets.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    for packet in packets {
        let stranger = stranger(&target);
        send(stranger.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
        // The target has read the packet once it answers or closes the connection.
        let _ = recv(stranger.as_raw_fd(), &mut [0; 1000], MsgFlags::empty());
        drop(stranger);
        target.wait_no_handover().unwrap();
        target.process.wait_open_fds(at_rest).unwrap();
    }
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, target).unwrap();
    rig.check_traffic(&mut device).unwrap();
}
