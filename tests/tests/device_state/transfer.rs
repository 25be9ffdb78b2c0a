//! Transfers that succeed, over each kind of socket or pipe, and with either datapath at the target.

use std::fs::File;
use std::io::Read;

use anyhow::{Result, ensure};
use baton_protocol::control::{BackendState, HandoverState};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, check, negotiated, options, pair, pipe, set_state_fd, stopped, transfer, wait_log,
};
use baton_tests::fake_frontend::wire::protocol;
use baton_tests::frames;
use baton_tests::on_both_datapaths;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::process::until;
use nix::sys::socket::SockType;

use super::{load, save};

on_both_datapaths! {
    device_moves_over_a_packet_socket,
    state_without_descriptors_moves_over_a_stream,
    ring_start_at_the_source_takes_the_device_back,
    state_without_descriptors_moves_over_a_pipe,
    state_of_the_other_datapath_loads,
}

fn device_moves_over_a_packet_socket(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target, connection) = stopped(datapath, 2)?;
    transfer(&device, &connection)?;
    ensure!(target.status()?.tap.is_empty(), "the target has taken the device without a ring");
    ensure!(rig.backend.status()?.state == BackendState::HandingOver);
    rig.network.send(&frames::numbered(3, 99))?;
    let source_connection = device.move_to(connection)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(frames::number_of(&received) == Some(3));
    drop(source_connection);
    let status = rig.backend.process.wait()?;
    ensure!(status.success(), "{status}");
    rig.backend = target;
    rig.check_traffic(&mut device)?;
    ensure!(rig.backend.status()?.tap == TAP);
    // The second hop.
    device.suspend()?;
    let mut third = Backend::waiting(datapath, &[])?;
    let connection = negotiated(&mut third)?;
    transfer(&device, &connection)?;
    device.move_to(connection)?;
    rig.backend = third;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn ring_start_at_the_source_takes_the_device_back(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target, connection) = stopped(datapath, 2)?;
    for number in 0..3 {
        transfer(&device, &connection)?;
        rig.network.send(&frames::numbered(number, 77))?;
        device.restart_rings()?;
        let (_, received) = rig.receive_on_any(&mut device)?;
        ensure!(frames::number_of(&received) == Some(number));
        rig.check_traffic(&mut device)?;
        device.suspend()?;
        target.wait_no_handover()?;
    }
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    target.check_healthy()
}

fn state_without_descriptors_moves_over_a_pipe(datapath: Datapath) -> Result<()> {
    check_state_without_descriptors_moves(datapath, pipe)
}

/// Cloud Hypervisor passes one end of a `UnixStream::pair`, and stores what it reads from the other.
fn state_without_descriptors_moves_over_a_stream(datapath: Datapath) -> Result<()> {
    check_state_without_descriptors_moves(datapath, || {
        let (ours, theirs) = pair(SockType::Stream)?;
        Ok((ours.into(), theirs.into()))
    })
}

fn check_state_without_descriptors_moves(
    datapath: Datapath,
    channel: impl Fn() -> Result<(File, File)>,
) -> Result<()> {
    let (mut rig, mut device, mut target, _connection) = stopped(datapath, 1)?;
    // First without a hand-over, then with one that the operator armed.
    save(&device, &channel)?;
    rig.backend.wait_no_handover()?;
    rig.backend.arm(&target.incoming())?;
    target.wait_handover(HandoverState::Adopted)?;
    let state = save(&device, &channel)?;
    rig.backend.wait_handover(HandoverState::Offered)?;
    // The source keeps everything.
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;

    // A back-end with its own TAP loads the state, whatever the number of its queue pairs.
    for (tap, queue_pairs) in [("tap1", 1), ("tap2", 2)] {
        let (mut other, network) = with_tap(&rig, datapath, tap, queue_pairs)?;
        let connection = negotiated(&mut other)?;
        load(&connection, &state, &channel)?;
        other.wait_no_handover()?;
        device.move_to(connection)?;
        (rig.backend, rig.network) = (other, network);
        rig.check_traffic(&mut device)?;
        device.suspend()?;
    }
    Ok(())
}

/// A back-end with another TAP, and the network side of that TAP.
fn with_tap(rig: &Rig, datapath: Datapath, tap: &str, queue_pairs: u16) -> Result<(Backend, PacketSocket)> {
    rig.netns.create_persistent_tap(tap, queue_pairs > 1)?;
    let options = [format!("--tap={tap}"), format!("--queue-pairs={queue_pairs}")];
    let mut backend = Backend::listening(datapath, &options.each_ref().map(String::as_str), &[])?;
    backend.status()?;
    Ok((backend, PacketSocket::open(tap)?))
}

/// The protocol features that the source negotiated on its connection do not concern a target with another datapath.
fn state_of_the_other_datapath_loads(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[])?;
    let mut options = options(2);
    options.protocol_features |= protocol::INFLIGHT_SHMFD;
    let mut device = rig.device(options)?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;
    let state = save(&device, &pipe)?;
    let (mut other, network) = with_tap(&rig, datapath, "tap1", 2)?;
    device.options.protocol_features &= !protocol::INFLIGHT_SHMFD;
    let connection = negotiated(&mut other)?;
    load(&connection, &state, &pipe)?;
    let _source_connection = device.move_to(connection)?;
    (rig.backend, rig.network) = (other, network);
    rig.check_traffic(&mut device)
}

#[test]
fn state_moves_over_a_pipe_after_a_hand_over_on_suspend() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let (read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
    drop(write);
    assert!(check(&device.connection).unwrap());
    assert!(check(&connection).unwrap());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

/// The front-end does not know that it has another back-end, and asks that one for the result of the transfer.
#[test]
fn result_of_a_transfer_is_handed_over_with_the_session() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, 1).unwrap();
    // The hand-over is refused until the transfer is over.
    let hand_over = |rig: &mut Rig| {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let incoming = target.incoming();
        let over = |backend: &mut Backend| match backend.hand_over_to(&incoming, false) {
            Err(error) if error.to_string().contains("is moving device state") => Ok(false),
            answer => answer.map(|_| true),
        };
        until("the transfer was over, and the session handed over", || over(&mut rig.backend))?;
        rig.backend.is_succeeded_by(target)
    };
    let (mut read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    drop(write);
    read.read_to_end(&mut Vec::new()).unwrap();
    hand_over(&mut rig).unwrap();
    assert!(check(&device.connection).unwrap());
    // The result is reported once.
    assert!(!check(&device.connection).unwrap());

    let (read, write) = pipe().unwrap();
    drop(read);
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    hand_over(&mut rig).unwrap();
    hand_over(&mut rig).unwrap();
    assert!(!check(&device.connection).unwrap());
    wait_log(&mut rig.backend, "the transfer failed before the session was handed over").unwrap();

    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}
