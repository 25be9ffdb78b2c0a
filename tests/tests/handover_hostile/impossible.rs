//! Sessions that cannot be: each is refused by name.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail, ensure};
use baton_channel::sealed_memfd;
use baton_protocol::handover::wire::device::QueuePairState;
use baton_protocol::handover::wire::message::{
    FRAMES_FD, FRONTEND_FD, LISTENER_FD, Message, OWNERSHIP_FD, call_fd, kick_fd, memory_fd, tap_fd,
};
use baton_protocol::handover::wire::session::{
    AddressesState, EndpointKind, LogState, RegionState, VringState,
};
use baton_protocol::ownership::Word;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::load;
use baton_tests::session_peer::{Asked, Relay, Sent, hear_stage, send_stage};

use super::{RATE, Rest, directory, file, pipe, replace_word, serving};

fn sealed(size: u64) -> OwnedFd {
    sealed_memfd::create("strange", size).expect("a memfd").into()
}

fn read_only() -> OwnedFd {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(1 << 30).expect("a size");
    File::open(file.path()).expect("a file").into()
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
