//! The owner of the device after a process dies, ends or loses its front-end. Only the last owner cleans up.

use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use baton_protocol::control::HandoverState;
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::Connection;
use baton_tests::frames::{self};
use baton_tests::on_both_datapaths;
use nix::sys::signal::Signal;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::{armed, expect_exit, offered, options, take};

on_both_datapaths! {
    source_keeps_device_when_target_dies,
    target_keeps_device_when_source_dies,
}

fn source_keeps_device_when_target_dies(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    target.process.signal(Signal::SIGKILL)?;
    target.process.wait()?;
    let failed = rig.backend.wait_handover(HandoverState::Failed)?;
    ensure!(failed.reason.as_deref() == Some("the target closed the connection"), "{failed:?}");
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    // The source can hand over to another target.
    let mut target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    take(&mut rig, &mut device, target)?;
    rig.check_traffic(&mut device)
}

fn target_keeps_device_when_source_dies(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    rig.backend.process.signal(Signal::SIGKILL)?;
    rig.backend.process.wait()?;
    rig.network.send(&frames::numbered(9, 90))?;
    device.move_to(target.connect()?)?;
    rig.backend = target;
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(frames::number_of(&received) == Some(9));
    rig.check_traffic(&mut device)
}

#[test]
fn source_ends_and_target_keeps_device_when_front_end_leaves() {
    let (mut rig, mut device, mut target) = offered(Datapath::Userspace, 1).unwrap();
    let (end, _other) = UnixStream::pair().unwrap();
    let unconnected = Connection::new(end).unwrap();
    drop(std::mem::replace(&mut device.connection, unconnected));
    expect_exit(&mut rig.backend).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.move_to(target.connect().unwrap()).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn only_the_last_owner_runs_the_downscript() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let mut source = take(&mut rig, &mut device, target).unwrap();
    expect_exit(&mut source).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the source has run the downscript");
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut rig.backend).unwrap();
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn target_runs_the_downscript_of_a_source_that_ended() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.wait_handover(HandoverState::Offered).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut rig.backend).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the source has run the downscript");
    target.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut target).unwrap();
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn source_keeps_device_and_downscript_when_target_ends() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    target.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut target).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the target has run the downscript");
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn source_keeps_device_when_target_has_no_spare_descriptors() {
    let (mut rig, mut device, mut target) = armed(Datapath::Userspace, 4).unwrap();
    // Room for two of the six descriptors that the offer carries.
    let pid = Pid::from_raw(i32::try_from(target.process.pid()).unwrap());
    let limit = target.process.open_fds().unwrap() + 2;
    let maximum = Some(limit as u64);
    prlimit(pid, Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    device.suspend().unwrap();
    let failed = rig.backend.wait_handover(HandoverState::Failed).unwrap();
    assert_eq!(failed.reason.as_deref(), Some("the target closed the connection"));
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    // The target has closed the descriptors that it received.
    let open = target.process.open_fds().unwrap();
    assert!(open < limit, "{:?}", target.process.fd_targets());
    target.check_healthy().unwrap();
    assert!(target.process.log().contains("cannot receive all descriptors of a message"));
}
