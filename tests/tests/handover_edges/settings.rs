//! The sockets, scripts and settings that the target gets from the source, and those that it keeps.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use baton_control::{ClientError, ControlClient};
use baton_protocol::control::{Request, SessionReport};
use baton_tests::backend::{Backend, Rig, TAP, WAITS};
use baton_tests::datapath::Datapath;
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::net::NetHeader;
use baton_tests::fake_frontend::{Connection, Options};
use baton_tests::frames::{self};
use baton_tests::netns::Netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::Process;
use baton_tests::programs;
use baton_tests::session_peer::Asked;
use nix::sys::signal::Signal;

use super::{check_idle, hand_over, serving};

on_both_datapaths! {
    session_runs_with_the_datapath_of_the_target,
}

fn session_runs_with_the_datapath_of_the_target(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[])?;
    // There and back.
    for datapath in [datapath, Datapath::Userspace] {
        rig.datapath = datapath;
        hand_over(&mut rig, &[])?;
        ensure!(rig.backend.status()?.datapath == datapath);
        rig.check_traffic(&mut device)?;
    }
    Ok(())
}

#[test]
fn last_owner_removes_the_socket_and_runs_the_downscript() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    let socket = rig.backend.socket.clone();
    for _ in 0..5 {
        hand_over(&mut rig, &[]).unwrap();
        assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
        assert!(downscript.runs().unwrap().is_empty(), "the downscript ran while the session has an owner");
    }
    rig.check_traffic(&mut device).unwrap();
    drop(device);
    // The listening socket is still the same.
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
    assert!(!socket.exists(), "the last owner left its socket behind");
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn target_gives_up_its_own_socket() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let (own, socket) = (target.socket.clone(), rig.backend.socket.clone());
    // This front-end is connected but has sent nothing: it has no session to lose.
    let silent = UnixStream::connect(&own).unwrap();
    rig.backend.become_target(target).unwrap();
    rig.check_traffic(&mut device).unwrap();
    assert!(!own.exists() && socket.exists());
    Connection::new(silent).unwrap().wait_closed().unwrap();
    drop(device);
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn inherited_sockets_are_handed_over() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let tap = format!("--tap={TAP}");
    for (socket, listens) in [(OwnedFd::from(listener), true), (OwnedFd::from(theirs), false)] {
        let option = format!("--fd={}", socket.as_raw_fd());
        let mut backend =
            Backend::with_arguments(Datapath::Userspace, &[&option, &tap], &[socket.as_fd()]).unwrap();
        drop(socket);
        let connect = || if listens { UnixStream::connect(&path) } else { ours.try_clone() };
        let connection = Connection::new(connect().unwrap()).unwrap();
        let offered = connection.get_features().unwrap();
        for _ in 0..2 {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
            backend.become_target(target).unwrap();
            connection.check_quiet().unwrap();
            assert_eq!(connection.get_features().unwrap(), offered);
        }
        drop(connection);
        if listens {
            let connection = Connection::new(connect().unwrap()).unwrap();
            assert_eq!(connection.get_features().unwrap(), offered);
            backend.process.signal(Signal::SIGTERM).unwrap();
        } else {
            // No other front-end can connect, so the back-end ends.
            ours.shutdown(Shutdown::Both).unwrap();
        }
        assert_eq!(backend.process.wait().unwrap().code(), Some(0));
    }
    assert!(path.exists(), "the back-end removed an inherited socket");
}

#[test]
fn control_socket_is_taken_over_if_the_target_has_the_same_path() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let control = rig.backend.control.clone();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A client that asks all the time always reaches one of the two.
        let client = scope.spawn(|| -> Result<u32> {
            let mut looks = 0;
            while !ended.load(Ordering::Relaxed) {
                match ControlClient::connect(&control)?.call(&Request::Status) {
                    Ok(_) => looks += 1,
                    // The source accepted this connection last: it may be ending, or gone.
                    Err(ClientError::Refused(reason)) if reason == "the back-end is ending" => {}
                    Err(ClientError::Closed | ClientError::Io(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(looks)
        });
        let result = (0..5).try_for_each(|hop| hop_with_same_control(&mut rig, hop));
        ended.store(true, Ordering::Relaxed);
        let looks = client.join().unwrap().unwrap();
        result.unwrap();
        assert!(looks > 0);
    });
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    rig.backend.process.wait().unwrap();
    assert!(!control.exists(), "the last owner left its control socket behind");
}

fn hop_with_same_control(rig: &mut Rig, hop: u32) -> Result<()> {
    let backend = &mut rig.backend;
    let incoming = backend.directory().join(format!("incoming{hop}"));
    let arguments = [
        format!("--incoming-fds={}", incoming.display()).into(),
        format!("--control-socket={}", backend.control.display()).into(),
    ];
    let mut next = Process::start(&programs::backend()?, &arguments, &[])?;
    next.wait_until("it waited", |next| Ok(next.log().contains(WAITS).then_some(())))?;
    let report = Asked::of(backend, &incoming)?.report()?;
    ensure!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
    ensure!(backend.process.wait()?.code() == Some(0));
    backend.process = next;
    backend.forget_client();
    ensure!(backend.status()?.tap == TAP);
    Ok(())
}

#[test]
fn poll_time_is_handed_over_unless_the_target_has_its_own() {
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &["--poll-us=1000000"]).unwrap();
    // Whether the worker finds work without a kick.
    let mut polls = |rig: &mut Rig| {
        let before = rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap();
        for number in 0..50 {
            device.send(0, &NetHeader::default(), &frames::numbered(number, 60)).unwrap();
            rig.expect_on_network(number..number + 1).unwrap();
            if number == 0 {
                // A worker that does not poll sleeps now.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap() <= before + 2
    };
    assert!(polls(&mut rig));
    hand_over(&mut rig, &[]).unwrap();
    assert!(polls(&mut rig), "the poll time was not handed over");
    hand_over(&mut rig, &["--poll-us=0"]).unwrap();
    check_idle(&rig.backend.process).unwrap();
    hand_over(&mut rig, &[]).unwrap();
    check_idle(&rig.backend.process).unwrap();
    let setting = |rig: &Rig| {
        let log = rig.backend.process.log();
        let (_, setting) = log.split_once("took the session").unwrap().1.split_once("poll_us=").unwrap();
        setting.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(setting(&rig), "0");
    hand_over(&mut rig, &["--poll-us=auto"]).unwrap();
    assert_eq!(setting(&rig), "auto");
    hand_over(&mut rig, &[]).unwrap();
    assert_eq!(setting(&rig), "auto");
    check_idle(&rig.backend.process).unwrap();
}

#[test]
fn poll_time_is_adaptive_by_default() {
    let (mut rig, _device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    check_idle(&rig.backend.process).unwrap();
    hand_over(&mut rig, &[]).unwrap();
    assert!(rig.backend.process.log().contains("poll_us=auto"));
}
