//! The sockets on which front-ends and clients of the control socket come.

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
    it_listens_again_after_a_front_end_has_left,
    as_a_client_it_connects_and_reconnects,
    a_connected_socket_is_served_until_it_is_closed,
    its_sockets_are_for_its_owner_alone_and_go_with_it,
}

fn it_listens_again_after_a_front_end_has_left(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let pid = rig.backend.process.pid();
    for _ in 0..10 {
        let mut device = rig.device(Options::default()).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
    rig.backend.check_healthy().unwrap();
    assert_eq!(rig.backend.process.pid(), pid);
}

fn as_a_client_it_connects_and_reconnects(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let mut network = PacketSocket::open(TAP).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("front-end");
    let option = format!("--socket-path={}", path.display());

    // Nobody listens there yet.
    let mut backend = Backend::with_arguments(datapath, &[TAP_OPTION, &option, "--client"], &[]).unwrap();
    assert_eq!(backend.status().unwrap().state, BackendState::Waiting);
    for _ in 0..2 {
        let listener = UnixListener::bind(&path).unwrap();
        for _ in 0..3 {
            let mut device = Device::on_stream(listener.accept().unwrap().0, Options::default()).unwrap();
            check_traffic(&mut device, &mut network);
            assert_eq!(backend.status().unwrap().state, BackendState::Serving);
        }
        // The front-end dies and leaves its socket's file behind; another one comes.
        drop(listener);
        std::fs::remove_file(&path).unwrap();
    }
    backend.check_healthy().unwrap();
}

fn a_connected_socket_is_served_until_it_is_closed(datapath: Datapath) {
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
    // There can be no other front-end.
    assert_eq!(backend.process.wait().unwrap().code(), Some(0));
}

#[test]
fn a_listening_socket_is_served_again_and_again() {
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
    assert!(path.exists(), "a socket that it did not make was removed");
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn its_sockets_are_for_its_owner_alone_and_go_with_it(datapath: Datapath) {
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
fn a_dead_socket_is_replaced_and_a_live_one_refused() {
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

        // Left behind by one that was killed.
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
