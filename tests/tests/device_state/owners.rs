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
fn a_source_that_dies_leaves_the_device_to_its_target() {
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
fn a_target_that_dies_leaves_the_device_to_its_source() {
    let (mut rig, mut device, target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.process.signal(Signal::SIGKILL).unwrap();
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_front_end_that_was_cut_off_finds_the_device_that_it_brought() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    // The descriptor that must come with it did not get through.
    connection.send(&Message::u64(request::SET_VRING_KICK, 0), &[]).unwrap();
    wait_log(&mut target, "front-end's session ended").unwrap();
    drop(connection);
    let connection = negotiated(&mut target).unwrap();
    // The source keeps its front-end, and so goes on to tell.
    let _old = device.move_to(connection).unwrap();
    rig.backend.wait_handover(HandoverState::HandedOver).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_device_is_dropped_when_the_front_end_that_brought_it_leaves() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    drop(connection);
    // Whoever had it has it again, and the target waits for another.
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
fn a_front_end_that_leaves_before_it_knows_leaves_the_device_behind() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // Without an answer to CHECK_DEVICE_STATE no VM moves, so it comes again.
    drop(device);
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();
    target.check_healthy().unwrap();
}

#[test]
fn a_source_that_is_told_to_end_leaves_the_device_to_its_target() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // Whether the front-end knows of it or not: there is nobody else to have it.
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_front_end_that_leaves_with_an_answer_leaves_the_device_to_the_target() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.connection.stream().shutdown(Shutdown::Both).unwrap();
    // Before the target's first ring.
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_source_that_wakes_to_both_ends_gone_has_the_device() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    rig.backend.process.signal(Signal::SIGSTOP).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(check(&connection).unwrap());
    // The VM has not started there, and both front-ends give their back-ends up.
    drop(connection);
    target.wait_no_handover().unwrap();
    drop(device);
    rig.backend.process.signal(Signal::SIGCONT).unwrap();
    wait_log(&mut rig.backend, "front-end disconnected").unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
}
