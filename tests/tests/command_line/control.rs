//! The control socket and its client.

use std::os::unix::net::UnixStream;
use std::process::Command;

use baton_protocol::control::{BackendState, BackendStatus, Done, QueuePairStats, Request};
use baton_tests::backend::{Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Connection, Options};
use baton_tests::on_both_datapaths;
use baton_tests::programs;
use nix::sys::signal::Signal;

on_both_datapaths! {
    control_socket_reports_status_and_statistics,
}

fn control_socket_reports_status_and_statistics(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &[]).unwrap();
    let status = rig.backend.status().unwrap();
    assert_eq!(
        (status.state, status.tap.as_str(), status.queue_pairs, status.datapath, status.vrings.len()),
        (BackendState::Waiting, TAP, 2, datapath, 4)
    );
    let mut device = rig.device(Options::default()).unwrap();
    rig.transmit(&mut device, 0..7, 100).unwrap();
    rig.expect_on_network(0..7).unwrap();
    rig.inject(0..5, 200).unwrap();
    rig.expect_in_guest(&mut device, 0..5).unwrap();
    let counted = |frames, bytes| match datapath {
        Datapath::Userspace => (Some(frames), Some(bytes), Some(0)),
        // The kernel's datapath does not count frames.
        Datapath::VhostNet => (None, None, None),
    };
    rig.backend
        .wait_pair_stats(0, |QueuePairStats { rx, tx }| {
            (tx.frames, tx.bytes, tx.dropped) == counted(7, 700)
                && (rx.frames, rx.bytes, rx.dropped) == counted(5, 1000)
        })
        .unwrap();
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.discarded, 0);
    let status = rig.backend.status().unwrap();
    assert_eq!(status.state, BackendState::Serving);
    assert_eq!(status.features, format!("{:#x}", device.options.features));
    assert!(status.vrings[..2].iter().all(|vring| vring.started && vring.enabled && vring.size == 256));
    assert!(status.vrings[2..].iter().all(|vring| !vring.started && vring.size == 0));
    // A command for a VMM.
    let error = rig.backend.ask(&Request::Pause).unwrap_err();
    assert!(error.to_string().contains("back-end"), "{error}");
}

#[test]
fn json_is_asked_for_before_or_after_the_command() {
    let rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let control = rig.backend.control.to_str().unwrap();
    for arguments in [["--json", control, "status"], [control, "status", "--json"]] {
        let output = Command::new(programs::batonctl().unwrap()).args(arguments).output().unwrap();
        serde_json::from_slice::<BackendStatus>(&output.stdout).unwrap();
    }
}

#[test]
fn batonctl_quit_ends_the_back_end() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let connection = rig.backend.connect().unwrap();
    connection.get_features().unwrap();
    let mut batonctl = Command::new(programs::batonctl().unwrap());
    let output = batonctl.arg("--json").arg(&rig.backend.control).arg("quit").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(serde_json::from_slice::<Done>(&output.stdout).unwrap(), Done::DONE);
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
    assert!(!rig.backend.socket.exists() && !rig.backend.control.exists(), "sockets were left behind");
    connection.wait_closed().unwrap();
}

#[test]
fn silent_control_client_and_silent_front_end_block_no_other_client() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let _silent = UnixStream::connect(&rig.backend.control).unwrap();
    // An incomplete message.
    let front_end = Connection::connect(&rig.backend.socket).unwrap();
    front_end.send_bytes(&[1, 0, 0, 0, 1, 0], &[]).unwrap();
    for _ in 0..10 {
        rig.backend.status().unwrap();
    }
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
}
