//! What else may be going on while a session is handed over: what the front-end says meanwhile and when it leaves, the
//! log of changed pages, the inflight region, a frame in hand; what is refused; what the operator sees and takes back;
//! and which sockets, scripts and settings go along.
#![expect(unsafe_code, reason = "ignores a signal")]

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use baton_control::{ClientError, ControlClient};
use baton_protocol::codec::{HEADER, Message as _};
use baton_protocol::control::{Frontend, HandoverState, Request, SessionReport};
use baton_protocol::handover::wire::message::PROTOCOL;
use baton_protocol::ownership::Owner;
use baton_tests::backend::{Backend, Rig, TAP, WAITS};
use baton_tests::datapath::Datapath;
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::net::{GSO_TCPV4, NetHeader, features};
use baton_tests::fake_frontend::wire::{Message as Said, protocol, request};
use baton_tests::fake_frontend::{Connection, Device, Options};
use baton_tests::frames::{self, Network, Transport, segment};
use baton_tests::load;
use baton_tests::netns::Netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::Process;
use baton_tests::programs;
use baton_tests::session_peer::{Asked, FakeTarget, Relay, STAGED};
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

on_both_datapaths! {
    what_the_front_end_says_meanwhile_the_target_answers,
    a_front_end_that_leaves_on_the_way_is_missed_by_whoever_has_the_session,
    the_targets_own_datapath_counts,
}

/// A device that works.
fn serving(datapath: Datapath, options: Options, arguments: &[&str]) -> Result<(Rig, Device)> {
    let mut rig = Rig::new(datapath, options.queue_pairs, arguments)?;
    let mut device = rig.device(options)?;
    rig.check_traffic(&mut device)?;
    Ok((rig, device))
}

/// A hand-over between a real source and a real target, in the test's hands.
struct Held {
    relay: Relay,
    asked: Asked,
    target: Backend,
    /// Where the source was sent.
    path: PathBuf,
}

impl Held {
    /// One that has just begun.
    fn begin(rig: &Rig, target: Backend) -> Result<Self> {
        let place = FakeTarget::bind(&target.directory().join("held"))?;
        let path = place.path().to_owned();
        let asked = Asked::of(&rig.backend, &path)?;
        let relay = Relay::join(&place, &target.incoming())?;
        Ok(Self { relay, asked, target, path })
    }

    /// One of which the target has staged the session, and the source does not know.
    fn staged(rig: &Rig) -> Result<Self> {
        let held = Self::begin(rig, Backend::waiting_for_session(rig.datapath, &[])?)?;
        held.relay.until_staged()?;
        Ok(held)
    }

    /// Lets it go on from there to its end.
    fn complete(self, rig: &mut Rig) -> Result<()> {
        self.relay.finish()?;
        self.succeed(rig)
    }

    /// It is over, and the session the target's.
    fn succeed(self, rig: &mut Rig) -> Result<()> {
        drop(self.relay);
        let report = self.asked.report()?;
        ensure!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
        rig.backend.is_succeeded_by(self.target)
    }
}

/// Several requests at once, of which the last stop the device.
fn say_a_lot(device: &Device) -> Result<()> {
    let said = [
        Said::empty(request::GET_FEATURES),
        Said::vring_state(request::SET_VRING_ENABLE, 0, 0).with_need_reply(),
        Said::vring_state(request::SET_VRING_ENABLE, 1, 0).with_need_reply(),
        Said::empty(request::GET_PROTOCOL_FEATURES),
        Said::vring_state(request::GET_VRING_BASE, 0, 0),
        Said::vring_state(request::GET_VRING_BASE, 1, 0),
    ];
    for message in &said {
        device.connection.send(message, &[])?;
    }
    Ok(())
}

/// The answers to these, in their order.
fn hear_a_lot(device: &Device) -> Result<()> {
    let mut payloads = Vec::new();
    for expected in [
        request::GET_FEATURES,
        request::SET_VRING_ENABLE,
        request::SET_VRING_ENABLE,
        request::GET_PROTOCOL_FEATURES,
        request::GET_VRING_BASE,
        request::GET_VRING_BASE,
    ] {
        let reply = device.connection.receive()?;
        ensure!(reply.request == expected, "{reply:?} instead of an answer to {expected}");
        payloads.push(reply.payload);
    }
    ensure!(payloads[1] == [0; 8] && payloads[2] == [0; 8], "{payloads:?}");
    // Where the driver has seen them used, for the device stood still.
    for (index, payload) in [0, 1].into_iter().zip(&payloads[4..]) {
        let used = device.ring(index).queue.used_index().to_le_bytes();
        ensure!(payload[4..6] == used, "vring {index}: {payload:?} instead of {used:?}");
    }
    Ok(())
}

fn what_the_front_end_says_meanwhile_the_target_answers(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(datapath, Options::default(), &[])?;
    // Where nothing comes of it, the source answers.
    let held = Held::staged(&rig)?;
    say_a_lot(&device)?;
    rig.backend.status()?;
    device.connection.check_quiet()?;
    ensure!(rig.backend.cancel()? == serde_json::json!({"result": "cancelled"}));
    hear_a_lot(&device)?;
    ensure!(held.asked.failure()? == ("stage".to_owned(), "cancelled".to_owned()));
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;

    // Else the target.
    let held = Held::staged(&rig)?;
    say_a_lot(&device)?;
    // The source has had every opportunity to answer.
    for _ in 0..20 {
        ensure!(rig.backend.status()?.handover.is_some_and(|live| live.state == HandoverState::Staging));
    }
    device.connection.check_quiet()?;
    held.complete(&mut rig)?;
    hear_a_lot(&device)?;
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn a_front_end_that_leaves_on_the_way_is_missed_by_whoever_has_the_session(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(datapath, 1, &[])?;
    for when in 0..4 {
        let mut device = rig.device(Options::default())?;
        rig.check_traffic(&mut device)?;
        let held = Held::begin(&rig, Backend::waiting_for_session(datapath, &[])?)?;
        match when {
            // The source hears it still, and hands over what there is then.
            0 => {
                held.relay.down()?;
                drop(device);
                rig.backend.fds_at_rest()?;
                for said in [held.relay.up()?, held.relay.down()?, held.relay.up()?] {
                    ensure!(["HELLO", "PREPARE", "READY"].contains(&said), "{said}");
                }
                for said in [held.relay.down()?, held.relay.up()?] {
                    ensure!(["STAGE", "STAGED"].contains(&said), "{said}");
                }
            }
            1 => {
                held.relay.until_ready()?;
                let sent = baton_tests::session_peer::hear_stage(&held.relay.source)?;
                drop(device);
                baton_tests::session_peer::send_stage(&held.relay.target, &sent)?;
                held.relay.up()?;
            }
            2 => {
                held.relay.until_staged()?;
                drop(device);
                held.relay.source.say(&STAGED)?;
            }
            _ => {
                held.relay.until_staged()?;
                held.relay.source.say(&STAGED)?;
                let (commit, _) = held.relay.source.hear()?;
                drop(device);
                held.relay.target.say(&commit)?;
            }
        }
        if when < 3 {
            ensure!(held.relay.down()? == "COMMIT");
        }
        ensure!(held.relay.up()? == "ACTIVE");
        held.succeed(&mut rig)?;
        rig.backend.fds_at_rest()?;
        rig.backend.check_healthy()?;
    }
    // And where the source keeps it.
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let held = Held::staged(&rig)?;
    drop(device);
    drop(held.relay);
    held.asked.failure()?;
    rig.backend.fds_at_rest()?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)
}

fn the_targets_own_datapath_counts(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[])?;
    // There and back.
    for datapath in [datapath, Datapath::Userspace] {
        rig.datapath = datapath;
        hand_on(&mut rig, &[])?;
        ensure!(rig.backend.status()?.datapath == datapath);
        rig.check_traffic(&mut device)?;
    }
    Ok(())
}

/// Hands the rig's session on to a target with these arguments.
fn hand_on(rig: &mut Rig, arguments: &[&str]) -> Result<SessionReport> {
    let target = Backend::waiting_for_session(rig.datapath, arguments)?;
    rig.backend.become_target(target)
}

#[test]
fn sockets_and_scripts_are_the_last_owners() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    let socket = rig.backend.socket.clone();
    for _ in 0..5 {
        hand_on(&mut rig, &[]).unwrap();
        assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
        assert!(downscript.runs().unwrap().is_empty(), "a downscript was run while there is an owner");
    }
    rig.check_traffic(&mut device).unwrap();
    drop(device);
    // The same listening socket still.
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
    assert!(!socket.exists(), "the last owner leaves its socket");
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

/// What a process has of its own.
fn at_rest(process: &Process) -> Result<(usize, usize)> {
    Ok((process.open_fds()?, process.threads()?))
}

#[test]
fn a_hand_over_that_is_cancelled_leaves_no_trace() {
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

/// Waits until a process has as much as before, and nothing under way.
fn wait_rest(backend: &mut Backend, expected: (usize, usize)) -> Result<()> {
    // Threads that wait for the next session cost nothing.
    backend.process.wait_open_fds(expected.0)?;
    ensure!(at_rest(&backend.process)?.1 <= expected.1 + 1);
    let state = backend.status()?.handover.map(|live| live.state);
    ensure!(matches!(state, None | Some(HandoverState::Cancelled)), "{state:?}");
    Ok(())
}

#[test]
fn whoever_is_told_to_end_on_the_way_leaves_the_session_to_the_source() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    // The target.
    let mut held = Held::staged(&rig).unwrap();
    held.target.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(held.target.process.wait().unwrap().code(), Some(0));
    drop(held.relay);
    let (_, reason) = held.asked.failure().unwrap();
    assert_eq!(reason, "the target closed the connection");
    assert!(downscript.runs().unwrap().is_empty());
    rig.check_traffic(&mut device).unwrap();

    // The source: its session ends with it, for the target has been told of nothing.
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
fn a_source_that_fails_on_the_way_ends_it_first() {
    let downscript = Downscript::new().unwrap();
    let (mut rig, _device) =
        serving(Datapath::Userspace, Options::default(), &[&downscript.option()]).unwrap();
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let held = Held::begin(&rig, target).unwrap();
    let sent = held.relay.until_staged().unwrap();
    let status = std::process::Command::new("ip").args(["link", "delete", TAP]).status().unwrap();
    assert!(status.success());
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(1));
    // Had it left that open, the target would take what there is no more, and clean up for it, too.
    assert_eq!(sent.word().unwrap().load().unwrap().owner, Owner::Aborted);
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

/// Processor time that a process has used, in ticks of 10 ms.
fn ticks(process: &Process) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
    let fields: Vec<_> = stat.rsplit(')').next().context("a line of stat")?.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// That a process waits, rather than looks for something again and again.
fn check_idle(process: &Process) -> Result<()> {
    let before = ticks(process)?;
    std::thread::sleep(Duration::from_millis(400));
    let used = ticks(process)? - before;
    ensure!(used < 10, "it used {used} ticks in 400 ms");
    Ok(())
}

#[test]
fn nothing_of_a_hand_over_that_is_past_keeps_a_back_end_busy() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    // The target dies when it is over.
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let answer = rig.backend.hand_over_to(&target.incoming(), true).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    target.process.signal(Signal::SIGKILL).unwrap();
    target.process.wait().unwrap();
    check_idle(&rig.backend.process).unwrap();
    rig.check_traffic(&mut device).unwrap();
    drop(device);

    // A front-end comes on the way: it is for whoever has the session.
    rig.backend.fds_at_rest().unwrap();
    for completed in [false, true] {
        let held = Held::staged(&rig).unwrap();
        let connection = rig.backend.connect().unwrap();
        connection.send(&Said::empty(request::GET_FEATURES), &[]).unwrap();
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

#[test]
fn what_cannot_be_handed_over_now_is_said_and_nothing_changes() {
    let options = Options {
        protocol_features: Options::default().protocol_features | protocol::DEVICE_STATE,
        ..Options::default()
    };
    let (mut rig, mut device) = serving(Datapath::Userspace, options, &[]).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let refused =
        |backend: &mut Backend, path: &Path| backend.hand_over_to(path, false).unwrap_err().to_string();
    let nobody = rig.backend.directory().join("nobody");
    assert!(refused(&mut rig.backend, &nobody).contains("cannot connect to"));
    assert_eq!(refused(&mut target, &nobody), "this back-end has no TAP to hand over");

    // Another one is under way, of a session or of a device.
    let under_way = |path: &Path| {
        format!("a hand-over to {} is under way; end it with handover --cancel", path.display())
    };
    let held = Held::staged(&rig).unwrap();
    assert_eq!(refused(&mut rig.backend, &target.incoming()), under_way(&held.path));
    assert_eq!(rig.backend.arm(&target.incoming()).unwrap_err().to_string(), under_way(&held.path));
    rig.backend.cancel().unwrap();
    drop(held);
    rig.backend.arm(&target.incoming()).unwrap();
    assert_eq!(refused(&mut rig.backend, &nobody), under_way(&target.incoming()));
    rig.backend.cancel().unwrap();

    // The front-end is moving device state.
    device.suspend().unwrap();
    let (read, write) = nix::unistd::pipe().unwrap();
    let answer = device.connection.ask_with(&Said::device_state(false), &[read.as_fd()]).unwrap();
    assert_eq!(answer, 0x100u64.to_le_bytes());
    let moving = "the front-end is moving device state; try again when it has";
    assert_eq!(refused(&mut rig.backend, &target.incoming()), moving);
    drop((read, write));
    device.connection.ask_u64(&Said::empty(request::CHECK_DEVICE_STATE)).unwrap();
    // Or begins to while the target makes up its mind.
    let held = Held::begin(&rig, Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap()).unwrap();
    let said = [held.relay.down(), held.relay.up(), held.relay.down()].map(Result::unwrap);
    assert_eq!(said, ["HELLO", "HELLO", "PREPARE"]);
    let (read, write) = nix::unistd::pipe().unwrap();
    let answer = device.connection.ask_with(&Said::device_state(false), &[read.as_fd()]).unwrap();
    assert_eq!(answer, 0x100u64.to_le_bytes());
    assert_eq!(held.relay.up().unwrap(), "READY");
    let (phase, reason) = held.asked.failure().unwrap();
    assert_eq!(phase, "stage");
    assert!(reason.ends_with(moving), "{reason}");
    drop((read, write));
    device.connection.ask_u64(&Said::empty(request::CHECK_DEVICE_STATE)).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();

    // To itself.
    rig.backend.become_target(target).unwrap();
    let own = rig.backend.incoming();
    assert_eq!(
        refused(&mut rig.backend, &own),
        "this is the same back-end: it cannot hand anything over to itself"
    );
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn a_dry_run_names_all_that_is_against_it_and_changes_nothing() {
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
            "the target refuses: front-end: the target has a front-end of its own and cannot take another's session; \
             start one without; queue-pairs: the source has 1 queue pairs, the target 3; give it the same \
             --queue-pairs, or none"
        );
        device.connection.check_quiet().unwrap();
        target.process.wait_open_fds(waiting.0).unwrap();
        rig.backend.process.wait_open_fds(before.0).unwrap();
        assert_eq!(rig.backend.stats().unwrap(), stats);
        assert_eq!(rig.backend.status().unwrap().handover.unwrap().state, HandoverState::Failed);
    }
    // One that would do.
    let other = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let answer = rig.backend.hand_over_to(&other.incoming(), true).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    assert_eq!(rig.backend.stats().unwrap(), stats);
    // The target's own front-end was not disturbed.
    connection.get_protocol_features().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_target_gives_up_a_socket_of_its_own() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let (own, socket) = (target.socket.clone(), rig.backend.socket.clone());
    // Connected, but without a word: there is no session to lose.
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
fn inherited_sockets_go_along() {
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
            // There will be no other.
            ours.shutdown(Shutdown::Both).unwrap();
        }
        assert_eq!(backend.process.wait().unwrap().code(), Some(0));
    }
    assert!(path.exists(), "somebody else's file was removed");
}

#[test]
fn the_control_socket_goes_along_where_the_target_has_the_same_path() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let control = rig.backend.control.clone();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Somebody who looks all the time always finds one of the two.
        let looker = scope.spawn(|| -> Result<u32> {
            let mut looks = 0;
            while !ended.load(Ordering::Relaxed) {
                match ControlClient::connect(&control)?.call(&Request::Status) {
                    Ok(_) => looks += 1,
                    // The last one that the old process let in: it may find it ending, or gone.
                    Err(ClientError::Refused(reason)) if reason == "the back-end is ending" => {}
                    Err(ClientError::Closed | ClientError::Io(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(looks)
        });
        let result = (0..5).try_for_each(|hop| hop_with_same_control(&mut rig, hop));
        ended.store(true, Ordering::Relaxed);
        let looks = looker.join().unwrap().unwrap();
        result.unwrap();
        assert!(looks > 0);
    });
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    rig.backend.process.wait().unwrap();
    assert!(!control.exists(), "the last owner leaves its control socket");
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
fn a_frame_in_hand_is_delivered_first() {
    let options = Options {
        features: Options::default().features | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..Options::default()
    };
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // One buffer: the next frame begins there, and does not fit.
    device.post_receive_buffers(0, 1).unwrap();
    device.ring(0).kick().unwrap();
    rig.network.send(&frames::numbered(1, 1400)).unwrap();
    rig.expect_in_guest(&mut device, 1..2).unwrap();
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    rig.network.send_with(&large.header(GSO_TCPV4, 1400), &large.bytes).unwrap();
    rig.network.send(&frames::numbered(2, 100)).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    // Nobody can deliver it, so it is passed on each time.
    for _ in 0..3 {
        hand_on(&mut rig, &[]).unwrap();
        rig.worker_rounds(&mut device, 0).unwrap();
    }
    device.post_receive_buffers(0, usize::MAX).unwrap();
    device.ring(0).kick().unwrap();
    let (_, first) = device.receive(0).unwrap();
    assert!(first == large.bytes, "another frame, of {} bytes", first.len());
    rig.expect_in_guest(&mut device, 2..3).unwrap();
    // Counted once, wherever.
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(3)).unwrap();
}

#[test]
fn a_frame_in_hand_that_cannot_be_kept_stops_no_other_queue_pair() {
    // Who may write no file gets a signal for trying, unless that is ignored, which programs inherit.
    // SAFETY: nothing is called then.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    let options = Options {
        queue_pairs: 2,
        features: Options::default().features | features::MQ | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..Options::default()
    };
    // Nor could it write a log.
    let mut rig = Rig::new(Datapath::Userspace, 2, &["--log-level=error"]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // As above, on whichever of the two queues the kernel chooses.
    for pair in 0..2 {
        device.post_receive_buffers(pair, 1).unwrap();
        device.ring(2 * u32::try_from(pair).unwrap()).kick().unwrap();
        device.send(pair, &NetHeader::default(), &frames::numbered(0, 60)).unwrap();
        rig.expect_on_network(0..1).unwrap();
    }
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    for _ in 0..2 {
        rig.network.send_with(&large.header(GSO_TCPV4, 1400), &large.bytes).unwrap();
    }
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.worker_rounds(&mut device, 1).unwrap();
    let held = Held::staged(&rig).unwrap();
    let pid = Pid::from_raw(i32::try_from(rig.backend.process.pid()).unwrap());
    let none = Rlimit { current: Some(0), maximum: None };
    let before = prlimit(pid, Resource::Fsize, none).unwrap();
    held.relay.source.say(&STAGED).unwrap();
    let (phase, reason) = held.asked.failure().unwrap();
    assert_eq!(phase, "freeze");
    assert!(reason.starts_with("source: the source cannot give a frame in hand"), "{reason}");
    prlimit(pid, Resource::Fsize, before).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.worker_rounds(&mut device, 1).unwrap();
    // Nor is the frame lost.
    for pair in 0..2 {
        device.post_receive_buffers(pair, usize::MAX).unwrap();
        device.ring(2 * u32::try_from(pair).unwrap()).kick().unwrap();
    }
    for _ in 0..2 {
        let (_, frame) = rig.receive_on_any(&mut device).unwrap();
        assert!(frame == large.bytes, "another frame, of {} bytes", frame.len());
    }
    rig.backend.check_healthy().unwrap();
}

#[test]
fn the_poll_time_goes_along_unless_the_target_has_its_own() {
    let (mut rig, mut device) =
        serving(Datapath::Userspace, Options::default(), &["--poll-us=1000000"]).unwrap();
    // Whether its worker looks for work without being told.
    let mut polls = |rig: &mut Rig| {
        let before = rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap();
        for number in 0..50 {
            device.send(0, &NetHeader::default(), &frames::numbered(number, 60)).unwrap();
            rig.expect_on_network(number..number + 1).unwrap();
            if number == 0 {
                // Then it waits, if it does not look.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap() <= before + 2
    };
    assert!(polls(&mut rig));
    hand_on(&mut rig, &[]).unwrap();
    assert!(polls(&mut rig), "the poll time did not go along");
    hand_on(&mut rig, &["--poll-us=0"]).unwrap();
    check_idle(&rig.backend.process).unwrap();
    hand_on(&mut rig, &[]).unwrap();
    check_idle(&rig.backend.process).unwrap();
}

/// A packet as a later version would send it: it says so, and has a field that this one does not know.
fn of_later_version(packet: &[u8]) -> Result<Vec<u8>> {
    let (header, body) = packet.split_at(HEADER);
    let mut later = header.to_vec();
    later[4..6].copy_from_slice(&(PROTOCOL.versions.newest + 1).to_le_bytes());
    // A MessagePack map of up to 15 fields, and one more: "later": [1, nil].
    let fields = *body.first().context("a body")?;
    ensure!((0x80..0x8f).contains(&fields), "{fields:#x} begins no small map");
    let more = [&[0xa5], b"later".as_slice(), &[0x92, 1, 0xc0]].concat();
    let length = u32::try_from(body.len() + more.len())?;
    later[12..16].copy_from_slice(&length.to_le_bytes());
    later.push(fields + 1);
    later.extend_from_slice(&body[1..]);
    later.extend(more);
    Ok(later)
}

#[test]
fn a_session_goes_to_a_later_version_and_back() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let Rig { network, backend, .. } = &mut rig;
    load::run(&mut device, network, 5_000, || {
        // One of the two speaks as a build of the next version.
        for later in [Later::Target, Later::Source, Later::Target, Later::Source] {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            let place = FakeTarget::bind(&target.directory().join("later"))?;
            let asked = Asked::of(backend, place.path())?;
            let relay = Relay::join(&place, &target.incoming())?;
            let mut said = Vec::new();
            for down in [true, false, true, false, true, false, true, false] {
                let (from, to) =
                    if down { (&relay.source, &relay.target) } else { (&relay.target, &relay.source) };
                let (message, fds) = from.hear()?;
                let packet = message.encode()?;
                let packet =
                    if down == (later == Later::Source) { of_later_version(&packet)? } else { packet };
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                to.say_bytes(&packet, &fds)?;
                said.push(message.name());
            }
            ensure!(
                said == ["HELLO", "HELLO", "PREPARE", "READY", "STAGE", "STAGED", "COMMIT", "ACTIVE"],
                "{said:?}"
            );
            drop(relay);
            let report = asked.report()?;
            ensure!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
            backend.is_succeeded_by(target)?;
        }
        Ok(())
    })
    .unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

/// Who is of a later version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Later {
    Source,
    Target,
}
