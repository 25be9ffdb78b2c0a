//! Sessions one after the other: nothing is left of the last session, the message orders of real front-ends work, and a
//! worker that fails ends the back-end.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use baton_protocol::control::{BackendState, Frontend};
use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::fake_frontend::{Device, Options, features};
use baton_tests::on_both_datapaths;
use baton_tests::process::Process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

on_both_datapaths! {
    new_connection_is_a_new_session,
    rings_of_the_last_session_do_not_run_in_the_next,
    connection_closed_without_a_byte_is_ignored,
    second_front_end_waits_until_the_first_leaves,
    silent_connection_gives_way_to_a_waiting_front_end,
    incomplete_message_gives_way_to_a_waiting_front_end,
    incomplete_negotiation_gives_way_to_a_waiting_front_end,
    negotiated_front_end_gives_way_to_no_other,
    set_vring_enable_before_set_features_takes_effect,
    set_vring_enable_before_set_features_is_acknowledged_and_takes_effect,
    front_end_may_renegotiate_on_the_same_connection,
    failed_worker_ends_the_back_end,
    noisy_front_end_neither_fills_the_log_nor_hides_other_lines,
    front_end_is_served_once_a_descriptor_is_free,
}

fn new_connection_is_a_new_session(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let at_rest = rig.backend.fds_at_rest().unwrap();
    let features = Options::default().features | features::MQ | features::EVENT_IDX;
    let mut device = rig.device(Options { queue_pairs: 2, features, ..Options::default() }).unwrap();
    rig.check_traffic(&mut device).unwrap();
    drop(device);
    assert_eq!(rig.backend.fds_at_rest().unwrap(), at_rest);
    let status = rig.backend.status().unwrap();
    assert_eq!(status.state, BackendState::Waiting);
    assert_eq!((status.features.as_str(), status.protocol_features.as_str()), ("0x0", "0x0"));
    assert!(
        status.vrings.iter().all(|vring| !vring.started && !vring.enabled && vring.size == 0),
        "{:?}",
        status.vrings
    );

    // Other features, another header, fewer rings, other memory.
    let features = features::PROTOCOL_FEATURES;
    let mut device =
        rig.device(Options { features, protocol_features: 0, queue_size: 64, ..Options::default() }).unwrap();
    device.connection.get_features().unwrap();
    let status = rig.backend.status().unwrap();
    assert_eq!((status.state, status.frontend), (BackendState::Serving, Frontend::Connected));
    assert_eq!(status.features, "0x40000000");
    rig.check_traffic(&mut device).unwrap();
}

fn rings_of_the_last_session_do_not_run_in_the_next(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let connection = rig.backend.connect().unwrap();
    drop(std::mem::replace(&mut device.connection, connection));
    // The new session has begun once this is answered.
    device.connection.get_features().unwrap();
    let before = device.memory.snapshot();
    rig.inject(0..10, 100).unwrap();
    device.ring(0).kick().unwrap();
    device.ring(1).kick().unwrap();
    device.connection.get_features().unwrap();
    assert!(device.memory.snapshot() == before, "the memory of the last session was written");
}

fn connection_closed_without_a_byte_is_ignored(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for _ in 0..20 {
        drop(rig.backend.connect().unwrap());
    }
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn second_front_end_waits_until_the_first_leaves(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut first = rig.device(Options::default()).unwrap();
    let second = rig.backend.connect().unwrap();
    second.send(&Message::empty(1), &[]).unwrap();
    rig.check_traffic(&mut first).unwrap();
    drop(first);
    assert_eq!(second.receive().unwrap().request, 1);
    drop(second);
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

/// Checks that connections that send only these bytes keep no front-end out.
fn silent_connections_give_way(datapath: Datapath, count: usize, bytes: &[u8]) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let silent: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = UnixStream::connect(&rig.backend.socket).unwrap();
            stream.write_all(bytes).unwrap();
            stream
        })
        .collect();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    drop(silent);
    // A negotiated session gives way to no other front-end.
    let waiting = rig.backend.connect().unwrap();
    rig.check_traffic(&mut device).unwrap();
    drop(device);
    waiting.get_features().unwrap();
}

fn silent_connection_gives_way_to_a_waiting_front_end(datapath: Datapath) {
    silent_connections_give_way(datapath, 3, &[]);
}

fn incomplete_message_gives_way_to_a_waiting_front_end(datapath: Datapath) {
    silent_connections_give_way(datapath, 3, &[1, 0, 0, 0, 1]);
}

fn incomplete_negotiation_gives_way_to_a_waiting_front_end(datapath: Datapath) {
    let query = Message::empty(request::GET_FEATURES).encode();
    silent_connections_give_way(datapath, 1, &query);
}

/// QEMU is in this state until its guest's driver comes up.
fn negotiated_front_end_gives_way_to_no_other(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let idle = rig.backend.connect().unwrap();
    idle.get_features().unwrap();
    let protocol = idle.get_protocol_features().unwrap();
    idle.set_protocol_features(protocol).unwrap();
    idle.set_owner().unwrap();
    let waiting = rig.backend.connect().unwrap();
    waiting.send(&Message::empty(request::GET_FEATURES), &[]).unwrap();
    // Longer than the time that a front-end has to negotiate.
    let timeout = PollTimeout::from(6000u16);
    let answered = poll(&mut [PollFd::new(waiting.stream().as_fd(), PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(answered, 0);
    idle.get_features().unwrap();
    drop(idle);
    assert_eq!(waiting.receive().unwrap().request, request::GET_FEATURES);
}

/// The message order of QEMU 7.2, and with acknowledgements that of QEMU 10.0.
fn enabled_before_set_features(datapath: Datapath, acknowledged: bool) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.connection.get_features().unwrap();
    device.connection.get_protocol_features().unwrap();
    device.connection.set_protocol_features(protocol::MQ | protocol::REPLY_ACK).unwrap();
    device.connection.set_owner().unwrap();
    device.connection.acknowledged = acknowledged;
    for index in [0, 1] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    device.connection.set_features(device.options.features).unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [0, 1] {
        // Kick before call, as QEMU does.
        device.set_up_ring(index, 0).unwrap();
    }
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn set_vring_enable_before_set_features_takes_effect(datapath: Datapath) {
    enabled_before_set_features(datapath, false);
}

fn set_vring_enable_before_set_features_is_acknowledged_and_takes_effect(datapath: Datapath) {
    enabled_before_set_features(datapath, true);
}

fn front_end_may_renegotiate_on_the_same_connection(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // As virtio-user reconfigures: ENABLE 0, GET_VRING_BASE, CALL, other features, another memory table.
    let features = Options::default().features;
    let choices = [
        features,
        features & !features::MRG_RXBUF,
        features::PROTOCOL_FEATURES,
        features | features::EVENT_IDX,
    ];
    let mut device = rig.device(Options::default()).unwrap();
    for features in choices {
        for index in [0, 1] {
            device.connection.set_vring_enable(index, false).unwrap();
            device.stop_ring(index).unwrap();
        }
        let Device { connection, .. } = device;
        device = Device::new(connection, Options { features, ..Options::default() }).unwrap();
        for index in [0, 1] {
            let ring = device.ring(index);
            device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
        }
        device.connection.set_features(features).unwrap();
        for pair in &mut device.pairs {
            for ring in [&mut pair.receive, &mut pair.transmit] {
                ring.queue.negotiated(features & features::EVENT_IDX != 0, false);
            }
        }
        device.set_up().unwrap();
        device.fill_receive_rings().unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn failed_worker_ends_the_back_end(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    // Without its TAP the worker cannot continue.
    assert!(Command::new("ip").args(["link", "delete", TAP]).status().unwrap().success());
    let status = rig.backend.process.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let log = rig.backend.process.log();
    assert!(log.lines().last().unwrap().contains("the TAP was deleted"), "{log}");
    assert!(!rig.backend.socket.exists() && !rig.backend.control.exists(), "sockets were left behind");
}

fn noisy_front_end_neither_fills_the_log_nor_hides_other_lines(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for _ in 0..300 {
        let connection = rig.backend.connect().unwrap();
        connection.get_features().unwrap();
        // The back-end rejects and logs this message, and continues the session.
        connection.send(&Message::vring_state(request::SET_VRING_NUM, 0, 3), &[]).unwrap();
        connection.get_features().unwrap();
    }
    let connection = rig.backend.connect().unwrap();
    connection.send(&Message::empty(request::GET_FEATURES).with_size(1 << 20), &[]).unwrap();
    let logged = |process: &Process| Ok(process.log().contains("message 1 of 1048576 bytes").then_some(()));
    rig.backend.process.wait_until("it logged the long message", logged).unwrap();
    let log = rig.backend.process.log();
    for line in ["front-end connected", "front-end disconnected", "request rejected"] {
        assert!(log.contains(line), "{log}");
    }
    assert!(log.lines().count() < 300, "{} lines", log.lines().count());
}

/// Limits the numbers of the back-end's new descriptors (`RLIMIT_NOFILE`).
fn limit_fds(rig: &Rig, limit: usize) {
    let pid = rig.backend.process.pid().to_string();
    let limit = format!("--nofile={limit}:");
    assert!(Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap().success());
}

fn front_end_is_served_once_a_descriptor_is_free(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // Descriptors 0 to 2 are in use.
    limit_fds(&rig, 3);
    let stream = UnixStream::connect(&rig.backend.socket).unwrap();
    let logged = |process: &Process| Ok(process.log().contains("cannot accept").then_some(()));
    rig.backend.process.wait_until("it failed to accept", logged).unwrap();
    limit_fds(&rig, 1024);
    let mut device = Device::on_stream(stream, Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}
