//! Hand-overs that do not complete: cancelled by the operator, or ended by a process that is told to end or fails. None
//! leaves anything behind.

use anyhow::{Result, ensure};
use baton_protocol::control::{Frontend, HandoverState};
use baton_protocol::ownership::Owner;
use baton_tests::backend::{Backend, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::wire::{Message, request};
use nix::sys::signal::Signal;

use super::{Held, at_rest, check_idle, serving};

#[test]
fn cancelled_hand_over_leaves_no_trace() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let before = at_rest(&rig.backend.process).unwrap();
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let waiting = at_rest(&target.process).unwrap();
    for _ in 0..3 {
        let mut held = Held::begin(&rig, target).unwrap();
        held.relay.until_staged().unwrap();
        let status = rig.backend.status().unwrap();
        let live = status.handover.unwrap();
        assert_eq!(live.state, HandoverState::Staging);
        assert_eq!(live.peer, held.path.display().to_string());
        assert_eq!(status.frontend, Frontend::Connected);
        let status = held.target.status().unwrap();
        assert_eq!(
            (status.handover.unwrap().state, status.frontend),
            (HandoverState::Adopted, Frontend::Disconnected)
        );
        rig.check_traffic(&mut device).unwrap();
        rig.backend.cancel().unwrap();
        assert_eq!(rig.backend.status().unwrap().handover.unwrap().state, HandoverState::Cancelled);
        assert_eq!(rig.backend.cancel().unwrap_err().to_string(), "no hand-over is under way");
        drop(held.relay);
        held.asked.failure().unwrap();
        target = held.target;
        wait_rest(&mut target, waiting).unwrap();
        wait_rest(&mut rig.backend, before).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
    rig.backend.become_target(target).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

/// Waits until a process has as many descriptors and threads as before, and no hand-over under way.
fn wait_rest(backend: &mut Backend, expected: (usize, usize)) -> Result<()> {
    // A thread may remain that waits for the next session.
    backend.process.wait_open_fds(expected.0)?;
    ensure!(at_rest(&backend.process)?.1 <= expected.1 + 1);
    let state = backend.status()?.handover.map(|live| live.state);
    ensure!(matches!(state, None | Some(HandoverState::Cancelled)), "{state:?}");
    Ok(())
}

#[test]
fn session_stays_with_source_when_either_process_is_told_to_end() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    // The target is told to end.
    let mut held = Held::staged(&rig).unwrap();
    held.target.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(held.target.process.wait().unwrap().code(), Some(0));
    drop(held.relay);
    let (_, reason) = held.asked.failure().unwrap();
    assert_eq!(reason, "the target closed the connection");
    assert!(downscript.runs().unwrap().is_empty());
    rig.check_traffic(&mut device).unwrap();

    // The source is told to end. Its session ends with it, since it has not committed.
    let mut held = Held::staged(&rig).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
    assert!(!rig.backend.socket.exists());
    drop(held.relay);
    held.target.wait_no_handover().unwrap();
    held.target.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(held.target.process.wait().unwrap().code(), Some(0));
    assert_eq!(downscript.runs().unwrap(), [TAP], "once, by the source");
    device.connection.wait_closed().unwrap();
}

#[test]
fn source_that_fails_aborts_the_hand_over_first() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, _device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let held = Held::begin(&rig, target).unwrap();
    let sent = held.relay.until_staged().unwrap();
    let status = std::process::Command::new("ip").args(["link", "delete", TAP]).status().unwrap();
    assert!(status.success());
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(1));
    // With a word that is not aborted the target would take the session without a TAP, and run the downscript as well.
    assert_eq!(sent.word().unwrap().load().unwrap().owner, Owner::Aborted);
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn finished_hand_over_keeps_no_back_end_busy() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    // The target dies after the dry run.
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let answer = rig.backend.hand_over_to(&target.incoming(), true).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    target.process.signal(Signal::SIGKILL).unwrap();
    target.process.wait().unwrap();
    check_idle(&rig.backend.process).unwrap();
    rig.check_traffic(&mut device).unwrap();
    drop(device);

    // A front-end that connects during a hand-over is served by the back-end that ends up with the session.
    rig.backend.fds_at_rest().unwrap();
    for completed in [false, true] {
        let held = Held::staged(&rig).unwrap();
        let connection = rig.backend.connect().unwrap();
        connection.send(&Message::empty(request::GET_FEATURES), &[]).unwrap();
        check_idle(&rig.backend.process).unwrap();
        connection.check_quiet().unwrap();
        if completed {
            held.complete(&mut rig).unwrap();
        } else {
            rig.backend.cancel().unwrap();
        }
        assert_eq!(connection.receive().unwrap().request, request::GET_FEATURES);
        drop(connection);
        rig.backend.fds_at_rest().unwrap();
    }
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}
