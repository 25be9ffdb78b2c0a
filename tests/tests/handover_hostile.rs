//! Hostile, broken and silent peers of a session's hand-over. Whatever a target does that has not taken the session, the
//! live back-end serves on and loses nothing; whatever a source does, a waiting target waits on, with nothing left over.
//! Afterwards an honest peer is served.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use baton_channel::ownership::SharedWord;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{HandoverState, SessionReport};
use baton_protocol::handover::message::{
    Active, Commit, FRAMES_FD, FRONTEND_FD, LISTENER_FD, Message, OWNERSHIP_FD, ReadyToTake, Refuse, call_fd,
    kick_fd, memory_fd, tap_fd,
};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::handover::state::QueuePairState;
use baton_protocol::ownership::Word;
use baton_protocol::session::state::{
    AddressesState, EndpointKind, LogState, PairNow, RegionState, TakeTimes, VringNow, VringState,
};
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::load;
use baton_tests::process::Process;
use baton_tests::session_peer::{
    Asked, FakeTarget, Link, Relay, STAGED, Sent, greet, hear_stage, hello_of, prepare, send_stage,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

/// Frames a second each way.
const RATE: u32 = 5_000;

/// A back-end that serves, and a place for targets of the test's own.
fn serving() -> Result<(Rig, Device, FakeTarget)> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let place = FakeTarget::bind(&rig.backend.directory().join("fake"))?;
    Ok((rig, device, place))
}

/// Does all this under load, then hands the session to a good target, under load still; nothing may be lost.
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

/// What a waiting target has of its own, and nothing else.
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

    /// That the target is again as it was.
    fn check(&self, target: &mut Backend, what: &str) -> Result<()> {
        let waits = |target: &mut Backend| -> Result<bool> {
            Ok(target.status()?.handover.is_none() && Self::of(&target.process)? == *self)
        };
        let deadline = std::time::Instant::now() + baton_tests::process::PATIENCE;
        while !waits(target)? {
            ensure!(
                std::time::Instant::now() < deadline,
                "after {what} the target has {:?} instead of {self:?}: {:#?}",
                Self::of(&target.process)?,
                target.process.fd_targets()?
            );
        }
        Ok(())
    }
}

fn file(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("strange", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("a size");
    file.into()
}

fn sealed(size: u64) -> OwnedFd {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("strange", flags).expect("a memfd"));
    file.set_len(size).expect("a size");
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    file.into()
}

fn read_only() -> OwnedFd {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(1 << 30).expect("a size");
    File::open(file.path()).expect("a file").into()
}

fn pipe() -> OwnedFd {
    nix::unistd::pipe().expect("a pipe").0
}

fn directory() -> OwnedFd {
    File::open("/").expect("a directory").into()
}

fn vring(sent: &mut Sent) -> &mut VringState {
    &mut sent.stage.session.vrings[0]
}

fn addresses(sent: &mut Sent) -> &mut AddressesState {
    vring(sent).addresses.as_mut().expect("a vring that is set up")
}

fn region(sent: &mut Sent) -> &mut RegionState {
    &mut sent.stage.session.regions[0]
}

/// Puts another word in the word's place, which has been through these values.
fn replace_word(sent: &mut Sent, values: &[Word]) -> Result<()> {
    let other = SharedWord::create()?;
    let mut now = Word::INITIAL;
    for next in values {
        other.swap(now, *next)?;
        now = *next;
    }
    sent.replace(OWNERSHIP_FD, other.as_fd().try_clone_to_owned()?)
}

/// Puts something else in the place of what belongs to a session: the refusal of it.
type Swap = (&'static str, fn(&mut Sent) -> Result<()>, &'static str);

/// Descriptors that are not what they should be.
const SWAPS: &[Swap] = &[
    ("a pipe as guest memory", |sent| sent.replace(&memory_fd(0), pipe()), "unusable"),
    ("a directory as guest memory", |sent| sent.replace(&memory_fd(0), directory()), "unusable"),
    ("memory that may only be read", |sent| sent.replace(&memory_fd(0), read_only()), "unusable"),
    ("a file shorter than its region", |sent| sent.replace(&memory_fd(1), file(4096)), "unusable"),
    ("a file for the word", |sent| sent.replace(OWNERSHIP_FD, file(4096)), "ownership"),
    ("a pipe for the word", |sent| sent.replace(OWNERSHIP_FD, pipe()), "ownership"),
    ("a file for the frames", |sent| sent.replace(FRAMES_FD, file(1 << 20)), "unusable"),
    (
        "a sealed file that is too small for the frames",
        |sent| sent.replace(FRAMES_FD, sealed(4096)),
        "unusable",
    ),
    (
        "a sealed file that is too large for the word",
        |sent| sent.replace(OWNERSHIP_FD, sealed(8192)),
        "ownership",
    ),
    ("a pipe for the frames", |sent| sent.replace(FRAMES_FD, pipe()), "unusable"),
    ("a pipe for a kick", |sent| sent.replace(&kick_fd(0), pipe()), "unusable"),
    ("a directory for a call", |sent| sent.replace(&call_fd(1), directory()), "unusable"),
    ("a pipe for the TAP", |sent| sent.replace(&tap_fd(0), pipe()), "tap"),
    ("a TAP without a queue", |sent| sent.replace(&tap_fd(0), File::open("/dev/net/tun")?), "tap"),
    ("a pipe for the front-end", |sent| sent.replace(FRONTEND_FD, pipe()), "unusable"),
    ("a directory for the front-end", |sent| sent.replace(FRONTEND_FD, directory()), "unusable"),
    (
        "a socket that is not connected for the front-end",
        |sent| {
            let listener = sent.fd(LISTENER_FD)?.try_clone()?;
            sent.replace(FRONTEND_FD, listener)
        },
        "unusable",
    ),
    ("a pipe for the listener", |sent| sent.replace(LISTENER_FD, pipe()), "endpoint"),
    (
        "the front-end for the listener",
        |sent| {
            let frontend = sent.fd(FRONTEND_FD)?.try_clone()?;
            sent.replace(LISTENER_FD, frontend)
        },
        "endpoint",
    ),
    (
        "a word that is settled",
        |sent| {
            let offered = Word::INITIAL.offered().context("a word")?;
            let taken = offered.taken().context("a word")?;
            replace_word(sent, &[offered, taken, taken.settled().context("a word")?])
        },
        "ownership",
    ),
    (
        "a word that was aborted",
        |sent| replace_word(sent, &[Word::INITIAL.aborted().context("a word")?]),
        "ownership",
    ),
    (
        "a word that offers something already",
        |sent| replace_word(sent, &[Word::INITIAL.offered().context("a word")?]),
        "ownership",
    ),
];

/// Changes what is said of a session: the refusals of it.
type Change = (&'static str, fn(&mut Sent), &'static [&'static str]);

/// What is said of a session that cannot be.
const CHANGES: &[Change] = &[
    ("no descriptor", |sent| sent.fds.clear(), &["descriptors"]),
    ("no memory", |sent| sent.fds.retain(|(name, _)| *name != memory_fd(1)), &["descriptors"]),
    ("no kick", |sent| sent.fds.retain(|(name, _)| *name != kick_fd(1)), &["descriptors"]),
    ("no TAP", |sent| sent.fds.retain(|(name, _)| *name != tap_fd(0)), &["descriptors"]),
    ("one too many", |sent| sent.fds.push(("log".to_owned(), pipe())), &["descriptors"]),
    ("a name twice", |sent| sent.fds.push((kick_fd(0), pipe())), &["descriptors"]),
    ("a name that is none", |sent| sent.fds.push(("\n".to_owned(), pipe())), &["descriptors"]),
    ("a region without end", |sent| region(sent).size = u64::MAX, &["memory-region"]),
    ("a region that is empty", |sent| region(sent).size = 0, &["memory-region"]),
    ("a region at the end", |sent| region(sent).guest_address = u64::MAX, &["memory-region"]),
    ("a region behind its file", |sent| region(sent).file_offset = 1 << 62, &["unusable"]),
    ("a region from the middle of a page", |sent| region(sent).file_offset += 1, &["unusable"]),
    ("a region that is there 0 times", |sent| region(sent).count = 0, &["memory-region"]),
    (
        "a region twice",
        |sent| {
            let regions = &mut sent.stage.session.regions;
            regions[1] = regions[0];
        },
        &["memory-region"],
    ),
    (
        "a log without end",
        |sent| {
            sent.stage.session.log = Some(LogState { offset: 1, size: u64::MAX });
            sent.fds.push(("log".to_owned(), file(4096)));
        },
        &["region"],
    ),
    (
        "a log behind its file",
        |sent| {
            sent.stage.session.log = Some(LogState { offset: 0, size: 1 << 40 });
            sent.fds.push(("log".to_owned(), file(4096)));
        },
        &["unusable"],
    ),
    ("a vring of 3", |sent| vring(sent).size = Some(3), &["vring-size"]),
    ("a vring of 0", |sent| vring(sent).size = Some(0), &["vring-size"]),
    ("a vring of 65535", |sent| vring(sent).size = Some(u16::MAX), &["vring-size"]),
    ("rings at the end of all addresses", |sent| addresses(sent).used = !3, &["vring-address"]),
    ("rings that are not aligned", |sent| addresses(sent).descriptors += 1, &["vring-address"]),
    ("no vring", |sent| sent.stage.session.vrings.clear(), &["vrings"]),
    ("one vring more", |sent| sent.stage.session.vrings.push(VringState::default()), &["vrings"]),
    (
        "256 vrings of one queue pair",
        |sent| sent.stage.session.vrings.resize(256, VringState::default()),
        &["vrings"],
    ),
    (
        "128 queue pairs that do not agree",
        |sent| {
            let pair = sent.stage.device.queue_pairs[0];
            sent.stage.device.queue_pairs.resize(128, QueuePairState { host_vnet_hdr_len: 11, ..pair });
        },
        &["vrings", "mixed-queues"],
    ),
    ("no queue pair", |sent| sent.stage.device.queue_pairs.clear(), &["vrings", "queue-pair-range"]),
    ("features of nobody", |sent| sent.stage.device.features |= 1 << 63, &["features"]),
    ("protocol features of nobody", |sent| sent.stage.device.protocol_features = !0, &["protocol-features"]),
    ("another TAP's name", |sent| sent.stage.device.tap = "lo".to_owned(), &["tap"]),
    ("a name that no TAP has", |sent| sent.stage.device.tap = "a/b".repeat(9), &["tap-name"]),
    ("a script of no place", |sent| sent.stage.device.downscript = Some("x".to_owned()), &["downscript"]),
    (
        "a path of nobody's socket",
        |sent| sent.stage.session.endpoint.path = Some("/etc/passwd".to_owned()),
        &["endpoint"],
    ),
    ("a path without a root", |sent| sent.stage.session.endpoint.path = Some("x".to_owned()), &["endpoint"]),
    ("no path", |sent| sent.stage.session.endpoint.path = None, &["endpoint"]),
    (
        "an endpoint of a later version",
        |sent| sent.stage.session.endpoint.kind = EndpointKind::Other,
        &["endpoint"],
    ),
];

#[test]
fn a_session_that_cannot_be_is_refused_by_name_and_leaves_nothing() {
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    let rest = Rest::of(&target.process).unwrap();
    let (mut rig, mut device, place) = serving().unwrap();
    let Rig { network, backend, .. } = &mut rig;
    load::run(&mut device, network, RATE, || {
        let mut refused =
            |what: &str, change: &dyn Fn(&mut Sent) -> Result<()>, names: &[&str]| -> Result<()> {
                let asked = Asked::of(backend, place.path())?;
                let relay = Relay::join(&place, &target.incoming())?;
                relay.until_ready()?;
                let mut sent = hear_stage(&relay.source)?;
                change(&mut sent)?;
                send_stage(&relay.target, &sent)?;
                let last = relay.target.hear_end()?;
                let Some(Message::Refuse(refuse)) = last else { bail!("{last:?} instead of a refusal") };
                for name in names {
                    let has = refuse.reasons.0.iter().any(|reason| reason.name == *name);
                    ensure!(has, "{name} is not among {}", refuse.reasons);
                }
                drop((sent, relay));
                rest.check(&mut target, what)?;
                let (phase, _) = asked.failure()?;
                ensure!(phase == "stage", "{phase}");
                Ok(())
            };
        for (what, swap, name) in SWAPS {
            refused(what, swap, &[name]).context(*what)?;
        }
        for (what, change, names) in CHANGES {
            let change = |sent: &mut Sent| {
                change(sent);
                Ok(())
            };
            refused(what, &change, names).context(*what)?;
        }
        target.check_healthy()?;
        backend.become_target(target)
    })
    .unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

/// How far a source of the test's own has come with a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// It has connected.
    Fresh,
    /// HELLO was answered.
    Greeted,
    /// PREPARE was.
    Ready,
    /// STAGE has said that more will come.
    Gathering,
    /// STAGED has been said.
    Staged,
}

const ALL: [At; 5] = [At::Fresh, At::Greeted, At::Ready, At::Gathering, At::Staged];

/// A source of the test's own, with a session that another one would have handed over.
#[derive(Debug)]
struct FakeSource {
    prepare: Message,
    sent: Sent,
}

impl FakeSource {
    /// What `backend` would hand over.
    fn record(backend: &Backend, place: &FakeTarget) -> Result<Self> {
        let asked = Asked::of(backend, place.path())?;
        let source = place.accept()?;
        greet(&source)?;
        let (said, _) = source.hear()?;
        let prepare = said.clone();
        source.say(&Message::Ready(ReadyToTake {}))?;
        let sent = hear_stage(&source)?;
        drop(source);
        asked.failure()?;
        Ok(Self { prepare, sent })
    }

    /// Brings a fresh connection to where it is wanted, with an ownership word of its own.
    fn bring(&mut self, incoming: &Path, at: At) -> Result<Link> {
        let link = Link::connect(incoming)?;
        if at == At::Fresh {
            return Ok(link);
        }
        link.say(&Message::Hello(hello_of("fake")))?;
        let (Message::Hello(_), _) = link.hear()? else { bail!("no HELLO") };
        if at == At::Greeted {
            return Ok(link);
        }
        link.say(&self.prepare)?;
        let (Message::Ready(_), _) = link.hear()? else { bail!("no READY") };
        if at == At::Ready {
            return Ok(link);
        }
        replace_word(&mut self.sent, &[])?;
        self.sent.stage.more = u16::from(at == At::Gathering);
        send_stage(&link, &self.sent)?;
        if at == At::Staged {
            let (said, _) = link.hear()?;
            ensure!(said == STAGED, "{said:?}");
        }
        Ok(link)
    }

    /// The source has the session for good.
    fn abort(&self) -> Result<()> {
        Ok(self.sent.word()?.swap(Word::INITIAL, Word::INITIAL.aborted().context("a word")?)?)
    }
}

/// What is no message, and every message there is, well-formed and not.
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
        // Only versions to come, only versions of the past, and a kind, flags, lengths that are none.
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
fn what_a_source_may_not_say_costs_a_waiting_target_nothing() {
    while_serving(|backend, place| {
        let mut source = FakeSource::record(backend, place)?;
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &["--log-level=error"])?;
        let rest = Rest::of(&target.process)?;
        let packets = packets()?;
        let strange = [pipe(), directory(), file(4096)];
        let strange: Vec<_> = strange.iter().map(AsFd::as_fd).collect();
        for at in ALL {
            for (number, packet) in packets.iter().enumerate() {
                let what = format!("packet {number} at {at:?}");
                let link = source.bring(&target.incoming(), at).with_context(|| what.clone())?;
                let fds = if number % 2 == 0 { &strange[..] } else { &[] };
                link.say_bytes(packet, fds).with_context(|| what.clone())?;
                // It is answered, or the connection closed: either way it was heard.
                let _ = link.hear();
                drop(link);
                if at == At::Staged {
                    // A commit of what is not offered has shown the target that it has nothing.
                    let _ = source.abort();
                }
                rest.check(&mut target, &what)?;
            }
        }
        target.check_healthy()?;
        // Closed without a word, wherever.
        for at in ALL {
            drop(source.bring(&target.incoming(), at)?);
            if at == At::Staged {
                source.abort()?;
            }
            rest.check(&mut target, &format!("the end at {at:?}"))?;
        }
        backend.become_target(target).map(drop)
    })
    .unwrap();
}

#[test]
fn a_commit_that_cannot_be_is_not_taken() {
    while_serving(|backend, place| {
        let mut source = FakeSource::record(backend, place)?;
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let rest = Rest::of(&target.process)?;
        let offered = Word::INITIAL.offered().context("a word")?;
        let vrings = vec![VringNow::default(); 2];
        let pair = PairNow::default();
        let with_frame = |frame| PairNow { frame: Some(frame), ..pair.clone() };
        let good = Commit { epoch: 1, vrings, pairs: vec![pair.clone()], ..Commit::default() };
        let commits = [
            ("commit", Commit { epoch: 0, ..good.clone() }),
            ("commit", Commit { epoch: 2, ..good.clone() }),
            ("commit", Commit { epoch: u64::MAX, ..good.clone() }),
            ("commit", Commit { vrings: Vec::new(), ..good.clone() }),
            ("commit", Commit { vrings: vec![VringNow::default(); 256], ..good.clone() }),
            ("commit", Commit { pairs: Vec::new(), ..good.clone() }),
            ("commit", Commit { pairs: vec![pair.clone(); 128], ..good.clone() }),
            ("frame-in-hand", Commit { pairs: vec![with_frame(u32::MAX)], ..good.clone() }),
            ("frame-in-hand", Commit { pairs: vec![with_frame(0)], ..good.clone() }),
            ("frame-in-hand", Commit { pairs: vec![with_frame(1 << 17)], ..good.clone() }),
        ];
        for (name, commit) in commits {
            let what = format!("{commit:?}");
            let link = source.bring(&target.incoming(), At::Staged)?;
            source.sent.word()?.swap(Word::INITIAL, offered)?;
            link.say(&Message::Commit(commit))?;
            let last = link.hear_end()?;
            let Some(Message::Refuse(refuse)) = last else { bail!("{what}: {last:?}") };
            ensure!(refuse.reasons.0.iter().any(|reason| reason.name == name), "{what}: {}", refuse.reasons);
            // Nobody has taken it.
            source.sent.word()?.swap(offered, offered.aborted().context("a word")?)?;
            rest.check(&mut target, &what)?;
        }
        // Not offered, or no more.
        for now in [Word::INITIAL, offered] {
            let link = source.bring(&target.incoming(), At::Staged)?;
            if now == offered {
                source.sent.word()?.swap(Word::INITIAL, offered)?;
                source.sent.word()?.swap(offered, offered.aborted().context("a word")?)?;
            }
            link.say(&Message::Commit(good.clone()))?;
            ensure!(link.hear_end()?.is_none());
            rest.check(&mut target, &format!("a commit of {now:?}"))?;
        }
        target.check_healthy()?;
        backend.become_target(target).map(drop)
    })
    .unwrap();
}

#[test]
fn what_was_said_in_an_earlier_hand_over_does_nothing_in_another() {
    while_serving(|backend, place| {
        let mut b = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let asked = Asked::of(backend, place.path())?;
        let relay = Relay::join(place, &b.incoming())?;
        let old = relay.until_staged()?;
        relay.source.say(&STAGED)?;
        let (commit, _) = relay.source.hear()?;
        relay.target.say(&commit)?;
        let (active, _) = relay.target.hear()?;
        relay.source.say(&active)?;
        drop(relay);
        let SessionReport::Completed { .. } = asked.report()? else { bail!("not handed over") };
        backend.process.wait()?;
        b.socket.clone_from(&backend.socket);
        let a = std::mem::replace(backend, b);

        // To its source, now another process: at any time.
        for at in 0..3 {
            let asked = Asked::of(backend, place.path())?;
            let source = place.accept()?;
            greet(&source)?;
            if at > 0 {
                prepare(&source)?;
                hear_stage(&source)?;
            }
            if at > 1 {
                source.say(&STAGED)?;
                let (Message::Commit(_), _) = source.hear()? else { bail!("no COMMIT") };
            }
            source.say(&active)?;
            let (_, reason) = asked.failure()?;
            let expected = match at {
                0 | 1 => "the target sent ACTIVE at the wrong time",
                _ => "the target said that it had taken the session, but had not",
            };
            ensure!(reason == expected, "{reason}");
        }
        // To a target: the whole session with its word, and its COMMIT for another.
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let rest = Rest::of(&target.process)?;
        let mut source = FakeSource::record(backend, place)?;
        let link = source.bring(&target.incoming(), At::Ready)?;
        send_stage(&link, &old)?;
        let last = link.hear_end()?;
        let Some(Message::Refuse(refuse)) = last else { bail!("{last:?}") };
        ensure!(refuse.reasons.0[0].name == "ownership", "{}", refuse.reasons);
        rest.check(&mut target, "an old STAGE")?;
        let link = source.bring(&target.incoming(), At::Staged)?;
        link.say(&commit)?;
        ensure!(link.hear_end()?.is_none());
        rest.check(&mut target, "an old COMMIT")?;
        drop(a);
        backend.become_target(target).map(drop)
    })
    .unwrap();
}

/// How far a target of the test's own lets a source come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// HELLO.
    Hello,
    /// PREPARE.
    Prepare,
    /// STAGE.
    Stage,
    /// COMMIT: nobody serves.
    Commit,
}

const POINTS: [Point; 4] = [Point::Hello, Point::Prepare, Point::Stage, Point::Commit];

impl Point {
    /// The phase in which the source is then.
    fn phase(self) -> &'static str {
        match self {
            Self::Hello => "greet",
            Self::Prepare => "check",
            Self::Stage => "stage",
            Self::Commit => "commit",
        }
    }

    /// Lets the source come so far; gives what it has sent.
    fn reach(self, source: &Link) -> Result<Option<Sent>> {
        if self == Self::Hello {
            source.hear()?;
            return Ok(None);
        }
        greet(source)?;
        if self == Self::Prepare {
            source.hear()?;
            return Ok(None);
        }
        prepare(source)?;
        let sent = hear_stage(source)?;
        if self == Self::Commit {
            source.say(&STAGED)?;
            let (Message::Commit(_), _) = source.hear()? else { bail!("no COMMIT") };
        }
        Ok(Some(sent))
    }
}

#[test]
fn whatever_a_target_says_that_has_not_taken_the_session_its_source_serves_on() {
    while_serving(|backend, place| {
        let at_rest = backend.process.open_fds()?;
        let packets = packets()?;
        let strange = [pipe(), directory(), file(4096)];
        let strange: Vec<_> = strange.iter().map(AsFd::as_fd).collect();
        for point in POINTS {
            for (number, packet) in packets.iter().enumerate() {
                let what = format!("packet {number} at {point:?}");
                let asked = Asked::of(backend, place.path())?;
                let source = place.accept()?;
                let sent = point.reach(&source).with_context(|| what.clone())?;
                let fds = if number % 2 == 0 { &strange[..] } else { &[] };
                source.say_bytes(packet, fds).with_context(|| what.clone())?;
                // Had it been what was awaited, it is all that comes.
                drop((source, sent));
                asked.failure().with_context(|| what.clone())?;
                backend.process.wait_open_fds(at_rest).context(what)?;
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn what_a_target_has_done_is_told() {
    while_serving(|backend, place| {
        let word = |sent: Option<&Sent>| -> Result<SharedWord> { sent.context("a session")?.word() };
        let told = |point: Point, act: &dyn Fn(&Link, Option<&Sent>) -> Result<()>| -> Result<String> {
            let asked = Asked::of(backend, place.path())?;
            let source = place.accept()?;
            let sent = point.reach(&source)?;
            act(&source, sent.as_ref())?;
            drop(source);
            let (phase, reason) = asked.failure()?;
            ensure!(phase == point.phase(), "{phase} at {point:?}");
            Ok(reason)
        };
        for point in POINTS {
            ensure!(told(point, &|_, _| Ok(()))? == "the target closed the connection");
            let reasons = Refusal::Busy.into();
            let refuse = Message::Refuse(Refuse { reasons });
            let reason = told(point, &|source, _| source.say(&refuse))?;
            ensure!(reason == "the target refuses: busy: the target is in another hand-over", "{reason}");
            // Not even this is believed without its having been done.
            let active = Message::Active(Active { epoch: 1, times: TakeTimes::default() });
            let reason = told(point, &|source, _| source.say(&active))?;
            ensure!(
                reason.contains("ACTIVE at the wrong time") || reason.contains("but had not"),
                "{reason}"
            );
            if matches!(point, Point::Hello | Point::Prepare) {
                continue;
            }
            // The word is only changed as it may be.
            let reason = told(point, &|_, sent| {
                let fd = sent.context("a session")?.fd(OWNERSHIP_FD)?.try_clone()?;
                Ok(std::os::unix::fs::FileExt::write_all_at(&File::from(fd), &[0xff; 8], 0)?)
            })?;
            ensure!(reason == "the ownership word was not what it must be", "{reason}");
            let reason = told(point, &|_, sent| {
                let word = word(sent)?;
                let now = word.load()?;
                Ok(word.swap(now, now.aborted().context("a word")?)?)
            })?;
            ensure!(reason == "the ownership word was not what it must be", "{reason}");
        }
        Ok(())
    })
    .unwrap();
}

/// A target that hangs: how its source ends that, with the session its own.
fn a_target_that_hangs(point: Point) -> Result<()> {
    while_serving(|backend, place| {
        let asked = Asked::of(backend, place.path())?;
        let source = place.accept()?;
        let held = point.reach(&source)?;
        let failure = asked.failure()?;
        drop((source, held));
        ensure!(
            failure == (point.phase().to_owned(), "the target does not answer".to_owned()),
            "{failure:?}"
        );
        Ok(())
    })
}

#[test]
fn a_target_that_hangs_is_given_up_before_it_has_said_anything() {
    a_target_that_hangs(Point::Hello).unwrap();
}

#[test]
fn a_target_that_hangs_while_it_judges_is_given_up() {
    a_target_that_hangs(Point::Prepare).unwrap();
}

#[test]
fn a_target_that_hangs_while_it_stages_is_given_up() {
    a_target_that_hangs(Point::Stage).unwrap();
}

#[test]
fn a_target_that_hangs_with_a_commit_does_not_get_the_session() {
    a_target_that_hangs(Point::Commit).unwrap();
}

#[test]
fn a_source_that_hangs_is_given_up_wherever() {
    while_serving(|backend, place| {
        let mut hanging = Vec::new();
        for at in ALL {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            let rest = Rest::of(&target.process)?;
            let mut source = FakeSource::record(backend, place)?;
            let link = source.bring(&target.incoming(), at)?;
            hanging.push((at, target, rest, source, link));
        }
        for (at, mut target, rest, source, link) in hanging {
            let asked = Asked::of(backend, &target.incoming());
            if at == At::Staged {
                // It would be held for longer than a test should take.
                ensure!(asked?.failure()?.1.contains("busy"));
                source.abort()?;
                drop(link);
            } else {
                ensure!(asked?.failure()?.1.contains("busy"), "{at:?}");
                ensure!(link.hear_end()?.is_none(), "{at:?}");
            }
            rest.check(&mut target, &format!("a source that hung at {at:?}"))?;
            target.check_healthy()?;
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn of_two_sources_that_come_at_once_one_is_served() {
    while_serving(|backend, place| {
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let rest = Rest::of(&target.process)?;
        let mut source = FakeSource::record(backend, place)?;
        for _ in 0..20 {
            // Both are there when it looks, and the first has spoken.
            target.process.signal(Signal::SIGSTOP)?;
            let first = Link::connect(&target.incoming())?;
            target.process.signal(Signal::SIGCONT)?;
            target.wait_handover(HandoverState::Checking)?;
            target.process.signal(Signal::SIGSTOP)?;
            first.say(&Message::Hello(hello_of("first")))?;
            let second = Link::connect(&target.incoming())?;
            target.process.signal(Signal::SIGCONT)?;
            let (said, _) = second.hear()?;
            let Message::Refuse(refuse) = said else { bail!("{said:?}") };
            ensure!(refuse.reasons.0[0].name == "busy", "{}", refuse.reasons);
            let (Message::Hello(_), _) = first.hear()? else { bail!("no HELLO") };
            drop((first, second));
            rest.check(&mut target, "two sources")?;
        }
        // Nor does a second one disturb what is staged.
        let link = source.bring(&target.incoming(), At::Staged)?;
        for _ in 0..3 {
            let second = Link::connect(&target.incoming())?;
            let (said, _) = second.hear()?;
            ensure!(matches!(said, Message::Refuse(_)), "{said:?}");
        }
        ensure!(target.status()?.handover.is_some_and(|handover| handover.state == HandoverState::Adopted));
        source.abort()?;
        drop(link);
        rest.check(&mut target, "a second source")?;
        backend.become_target(target).map(drop)
    })
    .unwrap();
}

#[test]
fn another_user_neither_gives_nor_gets_a_session() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let tap = rig.netns.create_tap("tap1", 1).unwrap();
    let option = format!("--tap-fds={}", tap[0].as_raw_fd());
    let mut nobodys = Backend::unprivileged(&[&option], &[tap[0].as_fd()]).unwrap();
    nobodys.status().unwrap();
    // That a socket is somebody's file is not what keeps others away.
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    open(target.directory());
    open(&target.incoming());
    let rest = Rest::of(&target.process).unwrap();
    let (phase, reason) = Asked::of(&nobodys, &target.incoming()).unwrap().failure().unwrap();
    assert_eq!(
        (phase.as_str(), reason.as_str()),
        (
            "greet",
            "the target refuses: user: the peer runs as user 65534; only user 0 and root may hand over here"
        )
    );
    rest.check(&mut target, "another user's source").unwrap();

    // And the other way round.
    let place = FakeTarget::bind_as(&nobodys.directory().join("fake"), 65533).unwrap();
    open(place.path());
    let error = nobodys.hand_over_to(place.path(), false).unwrap_err().to_string();
    assert_eq!(error, "the peer runs as user 65533; user 65534 gives nothing but to itself and root");
    nobodys.check_healthy().unwrap();

    // Root may give to anyone, who then serves without any right.
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let directory = tempfile::tempdir().unwrap();
    open(directory.path());
    let incoming = directory.path().join("incoming");
    let mut target =
        Backend::unprivileged(&[&format!("--incoming-fds={}", incoming.display())], &[]).unwrap();
    target.status().unwrap();
    let report = Asked::of(&rig.backend, &incoming).unwrap().report().unwrap();
    assert!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
    rig.backend.process.wait().unwrap();
    let _old = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn memory_that_is_truncated_on_the_way_ends_the_session_and_nobody() {
    for staged in [false, true] {
        let (mut rig, device, place) = serving().unwrap();
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
        let rest = Rest::of(&target.process).unwrap();
        let mut old = None;
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
            // It has the directory of the socket.
            old = Some(std::mem::replace(&mut rig.backend, target));
            // The first look at a ring was one at what is not there.
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
            // It had not looked yet.
            device.ring(1).kick().unwrap();
            device.connection.wait_closed().unwrap();
        }
        drop(device);
        let mut device = rig.device(Options::default()).unwrap();
        rig.check_traffic(&mut device).unwrap();
        rig.backend.check_healthy().unwrap();
        assert!(rig.backend.process.log().contains("truncated the memory"), "{}", rig.backend.process.log());
        drop(old);
    }
}
