//! Hand-overs that are refused, by the source or after a dry run.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Result;
use baton_protocol::control::HandoverState;
use baton_tests::backend::Backend;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::session_peer::Asked;

use super::{Held, at_rest, serving};

#[test]
fn refused_hand_overs_give_the_reason_and_change_nothing() {
    let options = Options {
        protocol_features: Options::default().protocol_features | protocol::DEVICE_STATE,
        ..Options::default()
    };
    let (mut rig, mut device) = serving(Datapath::Userspace, options, &[]).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let refused =
        |backend: &mut Backend, path: &Path| backend.hand_over_to(path, false).unwrap_err().to_string();
    let missing = rig.backend.directory().join("missing");
    assert!(refused(&mut rig.backend, &missing).contains("cannot connect to"));
    assert_eq!(refused(&mut target, &missing), "this back-end has no TAP to hand over");

    // Another hand-over is under way, of a session or of a device.
    let under_way = |path: &Path| {
        format!("a hand-over to {} is under way; end it with handover --cancel", path.display())
    };
    let held = Held::staged(&rig).unwrap();
    assert_eq!(refused(&mut rig.backend, &target.incoming()), under_way(&held.path));
    assert_eq!(rig.backend.arm(&target.incoming()).unwrap_err().to_string(), under_way(&held.path));
    rig.backend.cancel().unwrap();
    drop(held);
    rig.backend.arm(&target.incoming()).unwrap();
    assert_eq!(refused(&mut rig.backend, &missing), under_way(&target.incoming()));
    rig.backend.cancel().unwrap();

    // The front-end is moving device state.
    device.suspend().unwrap();
    let (read, write) = nix::unistd::pipe().unwrap();
    let answer = device.connection.ask_with(&Message::device_state(false), &[read.as_fd()]).unwrap();
    assert_eq!(answer, 0x100u64.to_le_bytes());
    let moving = "the front-end is moving device state; try again later";
    assert_eq!(refused(&mut rig.backend, &target.incoming()), moving);
    drop((read, write));
    device.connection.ask_u64(&Message::empty(request::CHECK_DEVICE_STATE)).unwrap();
    // The front-end begins to move device state while the target judges.
    let held = Held::begin(&rig, Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap()).unwrap();
    let names = [held.relay.down(), held.relay.up(), held.relay.down()].map(Result::unwrap);
    assert_eq!(names, ["HELLO", "HELLO", "PREPARE"]);
    let (read, write) = nix::unistd::pipe().unwrap();
    let answer = device.connection.ask_with(&Message::device_state(false), &[read.as_fd()]).unwrap();
    assert_eq!(answer, 0x100u64.to_le_bytes());
    assert_eq!(held.relay.up().unwrap(), "READY");
    let (phase, reason) = held.asked.failure().unwrap();
    assert_eq!(phase, "stage");
    assert!(reason.ends_with(moving), "{reason}");
    drop((read, write));
    device.connection.ask_u64(&Message::empty(request::CHECK_DEVICE_STATE)).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();

    // A hand-over to itself.
    rig.backend.become_target(target).unwrap();
    let own = rig.backend.incoming();
    assert_eq!(
        refused(&mut rig.backend, &own),
        "the target is this back-end itself; use the path of another one"
    );
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn dry_run_names_every_refusal_and_changes_nothing() {
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &["--downscript=no"]).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &["--queue-pairs=3"]).unwrap();
    let connection = target.connect().unwrap();
    connection.get_features().unwrap();
    let before = at_rest(&rig.backend.process).unwrap();
    let waiting = at_rest(&target.process).unwrap();
    let stats = rig.backend.stats().unwrap();
    for dry_run in [true, false] {
        let error = if dry_run {
            rig.backend.hand_over_to(&target.incoming(), true).unwrap_err().to_string()
        } else {
            Asked::of(&rig.backend, &target.incoming()).unwrap().failure().unwrap().1
        };
        assert_eq!(
            error,
            "the target refuses: front-end: the target already has a front-end and cannot take another session; \
             start a target without one; queue-pairs: the source has 1 queue pairs, the target 3; start the target \
             with the same --queue-pairs, or without the option"
        );
        device.connection.check_quiet().unwrap();
        target.process.wait_open_fds(waiting.0).unwrap();
        rig.backend.process.wait_open_fds(before.0).unwrap();
        assert_eq!(rig.backend.stats().unwrap(), stats);
        assert_eq!(rig.backend.status().unwrap().handover.unwrap().state, HandoverState::Failed);
    }
    // A target that would accept the session.
    let other = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let answer = rig.backend.hand_over_to(&other.incoming(), true).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    assert_eq!(rig.backend.stats().unwrap(), stats);
    // The target's own front-end is not disturbed.
    connection.get_protocol_features().unwrap();
    rig.check_traffic(&mut device).unwrap();
}
