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
    a_target_that_dies_leaves_the_device_to_its_source,
    a_source_that_dies_leaves_the_device_to_its_target,
}

fn a_target_that_dies_leaves_the_device_to_its_source(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    target.process.signal(Signal::SIGKILL)?;
    target.process.wait()?;
    let failed = rig.backend.wait_handover(HandoverState::Failed)?;
    ensure!(failed.reason.as_deref() == Some("the target closed the connection"), "{failed:?}");
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    // Another one may come.
    let mut target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    take(&mut rig, &mut device, target)?;
    rig.check_traffic(&mut device)
}

fn a_source_that_dies_leaves_the_device_to_its_target(datapath: Datapath) -> Result<()> {
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
fn a_source_whose_front_end_leaves_ends_and_leaves_the_device_to_the_target() {
    let (mut rig, mut device, mut target) = offered(Datapath::Userspace, 1).unwrap();
    let (end, _other) = UnixStream::pair().unwrap();
    let nobody = Connection::new(end).unwrap();
    drop(std::mem::replace(&mut device.connection, nobody));
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
fn a_target_that_a_source_has_left_the_device_to_cleans_up_for_it() {
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
fn a_target_that_ends_leaves_device_and_downscript_to_its_source() {
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
fn a_target_without_descriptors_to_spare_leaves_the_device_to_its_source() {
    let (mut rig, mut device, mut target) = armed(Datapath::Userspace, 4).unwrap();
    // Room for two of the six that come.
    let pid = Pid::from_raw(i32::try_from(target.process.pid()).unwrap());
    let limit = target.process.open_fds().unwrap() + 2;
    let maximum = Some(limit as u64);
    prlimit(pid, Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    device.suspend().unwrap();
    let failed = rig.backend.wait_handover(HandoverState::Failed).unwrap();
    assert_eq!(failed.reason.as_deref(), Some("the target closed the connection"));
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    // Those that had come are closed.
    let open = target.process.open_fds().unwrap();
    assert!(open < limit, "{:?}", target.process.fd_targets());
    target.check_healthy().unwrap();
    assert!(target.process.log().contains("not all descriptors of a message could be taken"));
}
