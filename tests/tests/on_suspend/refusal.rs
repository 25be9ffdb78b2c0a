//! Hand-overs that are refused or cancelled, and dry runs.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use baton_protocol::control::{HandoverState, Request};
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::wire::protocol;
use baton_tests::on_both_datapaths;

use super::{expect_exit, options, take};

on_both_datapaths! {
    device_runs_with_the_datapath_of_the_target,
    protocol_feature_that_the_targets_datapath_lacks_is_refused,
}

fn device_runs_with_the_datapath_of_the_target(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[])?;
    let mut device = rig.device(options(2))?;
    // There and back.
    for datapath in [datapath, Datapath::Userspace] {
        rig.check_traffic(&mut device)?;
        let mut target = Backend::waiting(datapath, &[])?;
        rig.backend.arm(&target.incoming())?;
        device.suspend()?;
        target.wait_handover(HandoverState::Adopted)?;
        let mut source = take(&mut rig, &mut device, target)?;
        expect_exit(&mut source)?;
        ensure!(rig.backend.status()?.datapath == datapath);
    }
    rig.check_traffic(&mut device)
}

fn protocol_feature_that_the_targets_datapath_lacks_is_refused(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let options =
        Options { protocol_features: options(1).protocol_features | protocol::INFLIGHT_SHMFD, ..options(1) };
    let mut device = rig.device(options)?;
    let target = Backend::waiting(datapath, &[])?;
    let refused = rig.backend.arm(&target.incoming()).err().map(|error| error.to_string());
    let expected = match datapath {
        Datapath::Userspace => None,
        Datapath::VhostNet => Some(
            "the target refuses: protocol-features: the target does not support the negotiated protocol features \
             0x1000; use a target with the same datapath and version"
                .to_owned(),
        ),
    };
    ensure!(refused == expected, "{refused:?}");
    rig.check_traffic(&mut device)
}

#[test]
fn cancelled_hand_over_leaves_device_with_source() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    // The count includes the control client's connection.
    rig.backend.status().unwrap();
    let open = rig.backend.process.open_fds().unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    assert_eq!(rig.backend.cancel().unwrap(), serde_json::json!({"result": "cancelled"}));
    rig.backend.wait_handover(HandoverState::Cancelled).unwrap();
    rig.backend.process.wait_open_fds(open).unwrap();
    device.suspend().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();

    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.cancel().unwrap();
    let connection = target.connect().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();
    drop(connection);

    let error = rig.backend.cancel().unwrap_err();
    assert_eq!(error.to_string(), "no hand-over is under way");
}

#[test]
fn dry_run_changes_nothing() {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let request = |path: PathBuf| Request::Handover {
        path: Some(path.display().to_string()),
        on_suspend: true,
        dry_run: true,
        cancel: false,
    };
    let answer = rig.backend.ask(&request(target.incoming())).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    device.suspend().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();

    let other = Backend::waiting(Datapath::Userspace, &["--queue-pairs=3"]).unwrap();
    let error = rig.backend.ask(&request(other.incoming())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the target refuses: queue-pairs: the source has 2 queue pairs, the target 3; start the target \
         with the same --queue-pairs, or without the option"
    );
}

#[test]
fn refusals_give_the_reason_and_leave_the_source_serving() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let refused = |backend: &mut Backend, path: &Path| backend.arm(path).unwrap_err().to_string();

    let missing = rig.backend.directory().join("missing");
    let why = refused(&mut rig.backend, &missing);
    assert!(why.starts_with(&format!("cannot connect to {}: ", missing.display())), "{why}");

    let wrong = rig.backend.control.clone();
    let why = refused(&mut rig.backend, &wrong);
    assert!(why.contains("cannot connect to"), "{why}");

    let mut waiting = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let incoming = waiting.incoming();
    assert_eq!(refused(&mut waiting, &incoming), "this back-end has no TAP to hand over");

    rig.backend.arm(&incoming).unwrap();
    let why = refused(&mut rig.backend, &incoming);
    assert_eq!(
        why,
        format!("a hand-over to {} is under way; end it with handover --cancel", incoming.display())
    );
    // A second source.
    let tap = rig.netns.create_tap("tap1", 1).unwrap();
    drop(tap);
    let mut second = Backend::listening(Datapath::Userspace, &["--tap=tap1"], &[]).unwrap();
    second.status().unwrap();
    assert_eq!(
        refused(&mut second, &incoming),
        "the target refuses: busy: the target is in another hand-over"
    );

    // A target that has a device, and a back-end that is to hand over to itself.
    device.suspend().unwrap();
    waiting.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, waiting).unwrap();
    assert_eq!(
        refused(&mut second, &incoming),
        "the target refuses: already-initialised: the target already has a TAP and cannot receive another; start \
         a target with --incoming-fds"
    );
    assert_eq!(
        refused(&mut rig.backend, &incoming),
        "the target is this back-end itself; use the path of another one"
    );
    rig.check_traffic(&mut device).unwrap();
}
