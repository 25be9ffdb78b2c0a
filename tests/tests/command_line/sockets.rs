//! The sockets for front-ends, and the control socket.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use baton_protocol::control::BackendState;
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::netns::Netns;
use baton_tests::on_both_datapaths;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::programs;
use nix::sys::signal::Signal;

use super::{TAP_OPTION, check_traffic};

on_both_datapaths! {
    next_front_end_is_served_after_the_first_leaves,
    client_connects_and_reconnects,
    inherited_connected_socket_is_served_until_it_is_closed,
    sockets_are_private_to_the_owner_and_removed_at_the_end,
}

fn next_front_end_is_served_after_the_first_leaves(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let pid = rig.backend.process.pid();
    for _ in 0..10 {
        let mut device = rig.device(Options::default()).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
    rig.backend.check_healthy().unwrap();
    assert_eq!(rig.backend.process.pid(), pid);
}

fn client_connects_and_reconnects(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("front-end");
    let option = format!("--socket-path={}", path.display());

    // No front-end listens there yet.
    let mut backend = Backend::with_arguments(datapath, &[TAP_OPTION, &option, "--client"], &[]).unwrap();
    assert_eq!(backend.status().unwrap().state, BackendState::Waiting);
    for _ in 0..2 {
        let listener = UnixListener::bind(&path).unwrap();
        for _ in 0..3 {
            let mut device = Device::on_stream(listener.accept().unwrap().0, Options::default()).unwrap();
            check_traffic(&mut device, &mut network);
            assert_eq!(backend.status().unwrap().state, BackendState::Serving);
        }
        // The front-end ends; the next one binds its socket at the same path.
        drop(listener);
        std::fs::remove_file(&path).unwrap();
    }
    backend.check_healthy().unwrap();
}

fn inherited_connected_socket_is_served_until_it_is_closed(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let option = format!("--fd={}", theirs.as_raw_fd());
    let mut backend = Backend::with_arguments(datapath, &[TAP_OPTION, &option], &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let mut device = Device::on_stream(ours, Options::default()).unwrap();
    check_traffic(&mut device, &mut network);
    drop(device);
    // No other front-end can connect, so the back-end ends.
    assert_eq!(backend.process.wait().unwrap().code(), Some(0));
}

#[test]
fn inherited_listening_socket_serves_several_front_ends() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("inherited");
    let listener = UnixListener::bind(&path).unwrap();
    let option = format!("--fd={}", listener.as_raw_fd());
    let mut backend =
        Backend::with_arguments(Datapath::Userspace, &[TAP_OPTION, &option], &[listener.as_fd()]).unwrap();
    drop(listener);
    for _ in 0..3 {
        let mut device = Device::connect(&path, Options::default()).unwrap();
        check_traffic(&mut device, &mut network);
    }
    backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(backend.process.wait().unwrap().code(), Some(0));
    assert!(path.exists(), "the back-end removed an inherited socket");
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn sockets_are_private_to_the_owner_and_removed_at_the_end(datapath: Datapath) {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut rig = Rig::new(datapath, 1, &[]).unwrap();
        let device = rig.device(Options::default()).unwrap();
        assert_eq!((mode(&rig.backend.socket), mode(&rig.backend.control)), (0o600, 0o600));
        rig.backend.process.signal(signal).unwrap();
        assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
        assert!(!rig.backend.socket.exists() && !rig.backend.control.exists(), "sockets were left behind");
        device.connection.wait_closed().unwrap();
    }
}

#[test]
fn stale_socket_is_replaced_and_live_socket_is_refused() {
    let netns = Netns::enter().unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (option, name) in [("--socket-path", "vhost-user"), ("--control-socket", "control")] {
        let path = directory.path().join(name);
        let socket = format!("{option}={}", path.display());
        let other = format!("--socket-path={}", directory.path().join("other").display());
        let mut arguments = vec![TAP_OPTION, &socket];
        if option == "--control-socket" {
            arguments.push(&other);
        }
        let run = || Command::new(programs::backend().unwrap()).args(&arguments).output().unwrap();

        let live = UnixListener::bind(&path).unwrap();
        let output = run();
        assert_eq!(output.status.code(), Some(1));
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(log.lines().count() == 1 && log.contains(path.to_str().unwrap()), "{log}");
        UnixStream::connect(&path).unwrap();
        drop(live);

        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(run().status.code(), Some(1));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();

        // A stale socket, as a killed back-end leaves it.
        drop(UnixListener::bind(&path).unwrap());
        let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
        let program = programs::backend().unwrap();
        let mut process = baton_tests::process::Process::start(&program, &arguments, &[]).unwrap();
        process.connect(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        process.signal(Signal::SIGTERM).unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(0));
        assert!(!path.exists());
    }
    drop(netns);
}
