//! The owner of the device after a process dies or ends, or after a front-end leaves.

use std::net::Shutdown;

use baton_protocol::control::HandoverState;
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, check, negotiated, options, pair, set_state_fd, stopped, transfer, wait_log,
};
use baton_tests::fake_frontend::wire::{Message, request};
use nix::sys::signal::Signal;
use nix::sys::socket::SockType;

#[test]
fn target_keeps_device_when_source_dies() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    rig.backend.process.signal(Signal::SIGKILL).unwrap();
    rig.backend.process.wait().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn source_keeps_device_when_target_dies() {
    let (mut rig, mut device, target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.process.signal(Signal::SIGKILL).unwrap();
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn front_end_that_was_cut_off_finds_its_device_again() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    // As if the message had lost its descriptor on the way.
    connection.send(&Message::u64(request::SET_VRING_KICK, 0), &[]).unwrap();
    wait_log(&mut target, "front-end's session ended").unwrap();
    drop(connection);
    let connection = negotiated(&mut target).unwrap();
    // The source keeps its front-end, so it still reports its state.
    let _source_connection = device.move_to(connection).unwrap();
    rig.backend.wait_handover(HandoverState::HandedOver).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn target_drops_device_when_its_front_end_leaves() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    drop(connection);
    // The source has the device again, and the target waits for another one.
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    let connection = negotiated(&mut target).unwrap();
    target.process.wait_open_fds(at_rest).unwrap();
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn source_keeps_device_when_front_end_leaves_without_checking_the_save() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // Without an answer to CHECK_DEVICE_STATE no VM moves, so the front-end comes back to the source.
    drop(device);
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();
    target.check_healthy().unwrap();
}

#[test]
fn target_keeps_device_when_source_is_told_to_end() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // No process but the target can keep the device, whether or not the front-end has checked the save.
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn target_keeps_device_when_source_front_end_leaves_after_checking_the_save() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.connection.stream().shutdown(Shutdown::Both).unwrap();
    // The source ends before the target's first ring starts.
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn source_has_device_when_it_wakes_after_both_front_ends_left() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    rig.backend.process.signal(Signal::SIGSTOP).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(check(&connection).unwrap());
    // The VM has not started at the target, and both front-ends leave.
    drop(connection);
    target.wait_no_handover().unwrap();
    drop(device);
    rig.backend.process.signal(Signal::SIGCONT).unwrap();
    wait_log(&mut rig.backend, "front-end disconnected").unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
}
