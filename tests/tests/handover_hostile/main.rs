//! Hostile, broken and silent peers of a session's hand-over. Whatever a target does before it has taken the session,
//! the source serves on and loses nothing. Whatever a source does, a waiting target waits on and leaks nothing.
//! Afterwards an honest peer is served.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use baton_channel::ownership::SharedWord;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{Request, SessionReport};
use baton_protocol::handover::wire::message::{Message, OWNERSHIP_FD};
use baton_protocol::ownership::Word;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::load;
use baton_tests::process::{Process, until};
use baton_tests::session_peer::{Asked, FakeTarget, Relay, Sent, hear_stage, hello_of, send_stage};
use nix::sys::memfd::{MFdFlags, memfd_create};

mod impossible;
mod sources;
mod targets;

/// Frames a second each way.
const RATE: u32 = 5_000;

/// A back-end that serves, and a socket on which the test plays targets.
fn serving() -> Result<(Rig, Device, FakeTarget)> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let place = FakeTarget::bind(&rig.backend.directory().join("fake"))?;
    Ok((rig, device, place))
}

/// Attacks under load, then hands the session over to an honest target. No frame may be lost.
fn while_serving(attack: impl FnOnce(&mut Backend, &FakeTarget) -> Result<()>) -> Result<()> {
    let (mut rig, mut device, place) = serving()?;
    let Rig { network, backend, .. } = &mut rig;
    load::run(&mut device, network, RATE, || {
        attack(backend, &place)?;
        backend.check_healthy()?;
        let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        backend.become_target(target)
    })?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

/// How many descriptors and shared mappings a waiting target has.
#[derive(Debug, PartialEq)]
struct Rest {
    fds: usize,
    shared: usize,
}

impl Rest {
    fn of(process: &Process) -> Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid()))?;
        let shared = maps.lines().filter(|line| line.contains("memfd:")).count();
        Ok(Self { fds: process.open_fds()?, shared })
    }

    /// Waits until the target waits again and has no more than that.
    fn check(&self, target: &mut Backend, what: &str) -> Result<()> {
        let waits = |target: &mut Backend| -> Result<bool> {
            Ok(target.status()?.handover.is_none() && Self::of(&target.process)? == *self)
        };
        until(&format!("the target was as before {what}"), || waits(target)).with_context(|| {
            format!("{:?} instead of {self:?}: {:#?}", Self::of(&target.process), target.process.fd_targets())
        })
    }
}

fn file(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("strange", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("a size");
    file.into()
}

fn pipe() -> OwnedFd {
    nix::unistd::pipe().expect("a pipe").0
}

fn directory() -> OwnedFd {
    File::open("/").expect("a directory").into()
}

/// Replaces the ownership word by another one, which has gone through these values.
fn replace_word(sent: &mut Sent, values: &[Word]) -> Result<()> {
    let other = SharedWord::create()?;
    let mut now = Word::INITIAL;
    for next in values {
        other.swap(now, *next).must_win()?;
        now = *next;
    }
    sent.replace(OWNERSHIP_FD, other.as_fd().try_clone_to_owned()?)
}

/// Packets that are no message, malformed HELLOs, and one valid packet of each message.
fn packets() -> Result<Vec<Vec<u8>>> {
    let mut packets = vec![vec![0], vec![0; 40], vec![0xff; 16], b"BATH".to_vec(), vec![0; 200_000]];
    let mut messages = Vec::new();
    for folder in ["handover-v1", "session-v1"] {
        let folder =
            PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/tests/golden")).join(folder);
        for entry in std::fs::read_dir(folder)? {
            messages.push(std::fs::read(entry?.path())?);
        }
    }
    ensure!(messages.len() == 17, "{} messages", messages.len());
    let hello = Message::Hello(hello_of("x")).encode()?;
    let header = |at: usize, bytes: &[u8]| {
        let mut packet = hello.clone();
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        packet
    };
    packets.extend([
        // Only future versions, only past versions, then invalid kind, flags and lengths.
        header(4, &[9, 0, 9, 0]),
        header(4, &[0, 0, 0, 0]),
        header(8, &[0xe7, 3]),
        header(10, &[1]),
        header(12, &[0xff; 4]),
        header(12, &[0; 4]),
        hello[..hello.len() - 1].to_vec(),
        [hello.as_slice(), &[0xc0]].concat(),
    ]);
    packets.extend(messages);
    Ok(packets)
}

#[test]
fn another_user_can_neither_give_nor_get_a_session() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let tap = rig.netns.create_tap("tap1", 1).unwrap();
    let option = format!("--tap-fds={}", tap[0].as_raw_fd());
    let mut unprivileged = Backend::unprivileged(&[&option], &[tap[0].as_fd()]).unwrap();
    unprivileged.status().unwrap();
    // The permissions of a socket's file are not what keeps other users out.
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    open(target.directory());
    open(&target.incoming());
    let rest = Rest::of(&target.process).unwrap();
    let (phase, reason) = Asked::of(&unprivileged, &target.incoming()).unwrap().failure().unwrap();
    assert_eq!(
        (phase.as_str(), reason.as_str()),
        (
            "greet",
            "the target refuses: user: the peer runs as user 65534; only user 0 and root may hand over here"
        )
    );
    rest.check(&mut target, "another user's source").unwrap();

    // The other way round.
    let place = FakeTarget::bind_as(&unprivileged.directory().join("fake"), 65533).unwrap();
    open(place.path());
    let error = unprivileged.hand_over_to(place.path(), false).unwrap_err().to_string();
    assert_eq!(error, "the peer runs as user 65533; user 65534 may hand over only to itself and root");
    unprivileged.check_healthy().unwrap();

    // Root does not hand over to a user at a path that any user could have created.
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let directory = tempfile::tempdir().unwrap();
    open(directory.path());
    let incoming = directory.path().join("incoming");
    let mut target =
        Backend::unprivileged(&[&format!("--incoming-fds={}", incoming.display())], &[]).unwrap();
    target.status().unwrap();
    let rest = Rest::of(&target.process).unwrap();
    let squatted = format!("the peer runs as user 65534 and may have created {} without", incoming.display());
    for on_suspend in [false, true] {
        let path = Some(incoming.display().to_string());
        let request = Request::Handover { path, on_suspend, dry_run: false, cancel: false };
        let error = rig.backend.ask(&request).unwrap_err().to_string();
        assert!(error.starts_with(&squatted), "{error}");
    }
    rest.check(&mut target, "a squatter").unwrap();
    rig.check_traffic(&mut device).unwrap();

    // In a directory that only root may write root hands over to any user, who then serves without privileges.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let report = Asked::of(&rig.backend, &incoming).unwrap().report().unwrap();
    assert!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
    rig.backend.process.wait().unwrap();
    let _old = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn memory_truncated_during_a_hand_over_ends_only_the_session() {
    for staged in [false, true] {
        let (mut rig, device, place) = serving().unwrap();
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
        let rest = Rest::of(&target.process).unwrap();
        let mut source_backend = None;
        let asked = Asked::of(&rig.backend, place.path()).unwrap();
        let relay = Relay::join(&place, &target.incoming()).unwrap();
        let truncate = || device.memory.regions().iter().for_each(|region| region.truncate(0).unwrap());
        if staged {
            relay.until_staged().unwrap();
            truncate();
            relay.finish().unwrap();
            drop(relay);
            let report = asked.report().unwrap();
            assert!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
            rig.backend.process.wait().unwrap();
            target.socket.clone_from(&rig.backend.socket);
            // Keeps the directory of the socket.
            source_backend = Some(std::mem::replace(&mut rig.backend, target));
            // The target's first access to a ring finds the memory truncated.
            device.connection.wait_closed().unwrap();
        } else {
            relay.until_ready().unwrap();
            let sent = hear_stage(&relay.source).unwrap();
            truncate();
            send_stage(&relay.target, &sent).unwrap();
            let Some(Message::Refuse(refuse)) = relay.target.hear_end().unwrap() else {
                panic!("no refusal")
            };
            assert_eq!(refuse.reasons.0[0].name, "unusable", "{}", refuse.reasons);
            drop((relay, sent));
            rest.check(&mut target, "truncated memory").unwrap();
            target.check_healthy().unwrap();
            asked.failure().unwrap();
            // The source has not accessed the memory yet.
            device.ring(1).kick().unwrap();
            device.connection.wait_closed().unwrap();
        }
        drop(device);
        let mut device = rig.device(Options::default()).unwrap();
        rig.check_traffic(&mut device).unwrap();
        rig.backend.check_healthy().unwrap();
        assert!(rig.backend.process.log().contains("truncated the memory"), "{}", rig.backend.process.log());
        drop(source_backend);
    }
}
