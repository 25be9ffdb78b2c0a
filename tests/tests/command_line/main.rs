//! The back-end's command line: its sockets, its TAPs, its inherited descriptors, its usage errors.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod control;
mod inherited;
mod sockets;
mod taps;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use baton_tests::backend::{Backend, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, NetHeader};
use baton_tests::frames;
use baton_tests::netns::{self, Netns};
use baton_tests::packet_socket::PacketSocket;
use baton_tests::programs;

const TAP_OPTION: &str = "--tap=tap0";

/// Sends a frame each way on a device's first pair.
fn check_traffic(device: &mut Device, network: &mut PacketSocket) {
    let frame = frames::numbered(1, 100);
    device.send(0, &NetHeader::default(), &frame).unwrap();
    assert_eq!(network.receive().unwrap().1, frame);
    network.send(&frame).unwrap();
    assert_eq!(device.receive(0).unwrap().1, frame);
}

/// Checks that a back-end exits with this code after one line on standard error that contains all of these words.
fn assert_refuses(mut backend: Backend, code: i32, words: &[&str]) {
    assert_eq!(backend.process.wait().unwrap().code(), Some(code));
    let log = backend.process.log();
    assert_eq!(log.lines().count(), 1, "{log}");
    for word in words {
        assert!(log.contains(word), "no \"{word}\" in: {log}");
    }
    assert!(!backend.socket.exists() && !backend.control.exists(), "sockets were left behind");
}

#[test]
fn missing_or_forbidden_vhost_net_is_reported() {
    let netns = Netns::enter().unwrap();
    netns.hide_devices().unwrap();
    let missing = ["/dev/vhost-net", "load the module vhost_net"];
    assert_refuses(Backend::listening(Datapath::VhostNet, &[TAP_OPTION], &[]).unwrap(), 1, &missing);
    std::fs::write("/dev/vhost-net", "").unwrap();
    std::fs::set_permissions("/dev/vhost-net", std::fs::Permissions::from_mode(0o600)).unwrap();
    let refused = ["/dev/vhost-net", "not permitted", "--vhost-fds"];
    assert_refuses(Backend::unprivileged(&["--vhost", TAP_OPTION], &[]).unwrap(), 1, &refused);
    assert!(!netns::exists(TAP), "the TAP was created");
}

#[test]
fn usage_errors_are_one_line_with_exit_code_2() {
    let _netns = Netns::enter().unwrap();
    let cases: [&[&str]; 9] = [
        &[],
        &["--queue-pairs=0", TAP_OPTION],
        &["--queue-pairs=129", TAP_OPTION],
        &["--queue-pairs=x", TAP_OPTION],
        &[TAP_OPTION, "--tap-fds=3"],
        &[TAP_OPTION, "--mac=nonsense"],
        &[TAP_OPTION, "--mac=01:00:00:00:00:00"],
        &[TAP_OPTION, "--fd=3"],
        &[TAP_OPTION, "--dance"],
    ];
    for arguments in cases {
        let mut backend = Backend::listening(Datapath::Userspace, arguments, &[]).unwrap();
        assert_eq!(backend.process.wait().unwrap().code(), Some(2), "{arguments:?}");
        let log = backend.process.log();
        assert_eq!(log.lines().count(), 1, "{arguments:?}: {log}");
        assert!(!backend.socket.exists());
    }
    assert!(!netns::exists(TAP), "the TAP was created");
}

#[test]
fn print_capabilities_prints_json() {
    let output = Command::new(programs::backend().unwrap()).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities["type"], "net");
}
