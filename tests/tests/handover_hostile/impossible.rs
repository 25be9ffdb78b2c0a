//! Invalid sessions: each is refused by name.

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

/// A name, a change that replaces a descriptor of the session, and the refusal.
type Swap = (&'static str, fn(&mut Sent) -> Result<()>, &'static str);

/// Descriptors that are not what they should be.
const SWAPS: &[Swap] = &[
    ("a pipe as guest memory", |sent| sent.replace(&memory_fd(0), pipe()), "unusable"),
    ("a directory as guest memory", |sent| sent.replace(&memory_fd(0), directory()), "unusable"),
    ("read-only memory", |sent| sent.replace(&memory_fd(0), read_only()), "unusable"),
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
        "an unconnected socket for the front-end",
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
        "a word that is aborted",
        |sent| replace_word(sent, &[Word::INITIAL.aborted().context("a word")?]),
        "ownership",
    ),
    (
        "a word that is already offered",
        |sent| replace_word(sent, &[Word::INITIAL.offered().context("a word")?]),
        "ownership",
    ),
];

/// A name, a change of what STAGE says of the session, and the refusals.
type Change = (&'static str, fn(&mut Sent), &'static [&'static str]);

/// Invalid descriptions of a session.
const CHANGES: &[Change] = &[
    ("no descriptor", |sent| sent.fds.clear(), &["descriptors"]),
    ("no memory", |sent| sent.fds.retain(|(name, _)| *name != memory_fd(1)), &["descriptors"]),
    ("no kick", |sent| sent.fds.retain(|(name, _)| *name != kick_fd(1)), &["descriptors"]),
    ("no TAP", |sent| sent.fds.retain(|(name, _)| *name != tap_fd(0)), &["descriptors"]),
    ("a surplus descriptor", |sent| sent.fds.push(("log".to_owned(), pipe())), &["descriptors"]),
    ("a descriptor name twice", |sent| sent.fds.push((kick_fd(0), pipe())), &["descriptors"]),
    ("an invalid descriptor name", |sent| sent.fds.push(("\n".to_owned(), pipe())), &["descriptors"]),
    ("a region of all memory", |sent| region(sent).size = u64::MAX, &["memory-region"]),
    ("an empty region", |sent| region(sent).size = 0, &["memory-region"]),
    (
        "a region at the end of the address space",
        |sent| region(sent).guest_address = u64::MAX,
        &["memory-region"],
    ),
    ("a region beyond the end of its file", |sent| region(sent).file_offset = 1 << 62, &["unusable"]),
    ("a region whose file offset is odd", |sent| region(sent).file_offset += 1, &["unusable"]),
    ("a region with count 0", |sent| region(sent).count = 0, &["memory-region"]),
    (
        "a region twice",
        |sent| {
            let regions = &mut sent.stage.session.regions;
            regions[1] = regions[0];
        },
        &["memory-region"],
    ),
    (
        "a log that wraps",
        |sent| {
            sent.stage.session.log = Some(LogState { offset: 1, size: u64::MAX });
            sent.fds.push(("log".to_owned(), file(4096)));
        },
        &["region"],
    ),
    (
        "a log longer than its file",
        |sent| {
            sent.stage.session.log = Some(LogState { offset: 0, size: 1 << 40 });
            sent.fds.push(("log".to_owned(), file(4096)));
        },
        &["unusable"],
    ),
    ("a vring of 3", |sent| vring(sent).size = Some(3), &["vring-size"]),
    ("a vring of 0", |sent| vring(sent).size = Some(0), &["vring-size"]),
    ("a vring of 65535", |sent| vring(sent).size = Some(u16::MAX), &["vring-size"]),
    ("rings at the end of the address space", |sent| addresses(sent).used = !3, &["vring-address"]),
    ("misaligned rings", |sent| addresses(sent).descriptors += 1, &["vring-address"]),
    ("no vring", |sent| sent.stage.session.vrings.clear(), &["vrings"]),
    ("a surplus vring", |sent| sent.stage.session.vrings.push(VringState::default()), &["vrings"]),
    (
        "256 vrings for one queue pair",
        |sent| sent.stage.session.vrings.resize(256, VringState::default()),
        &["vrings"],
    ),
    (
        "128 queue pairs with different header sizes",
        |sent| {
            let pair = sent.stage.device.queue_pairs[0];
            sent.stage.device.queue_pairs.resize(128, QueuePairState { host_vnet_hdr_len: 11, ..pair });
        },
        &["vrings", "mixed-queues"],
    ),
    ("no queue pair", |sent| sent.stage.device.queue_pairs.clear(), &["vrings", "queue-pair-range"]),
    ("unknown features", |sent| sent.stage.device.features |= 1 << 63, &["features"]),
    ("unknown protocol features", |sent| sent.stage.device.protocol_features = !0, &["protocol-features"]),
    ("the name of another interface", |sent| sent.stage.device.tap = "lo".to_owned(), &["tap"]),
    ("an invalid TAP name", |sent| sent.stage.device.tap = "a/b".repeat(9), &["tap-name"]),
    (
        "a downscript with a relative path",
        |sent| sent.stage.device.downscript = Some("x".to_owned()),
        &["downscript"],
    ),
    (
        "an endpoint path that is not the listener's",
        |sent| sent.stage.session.endpoint.path = Some("/etc/passwd".to_owned()),
        &["endpoint"],
    ),
    (
        "a relative endpoint path",
        |sent| sent.stage.session.endpoint.path = Some("x".to_owned()),
        &["endpoint"],
    ),
    ("no endpoint path", |sent| sent.stage.session.endpoint.path = None, &["endpoint"]),
    (
        "an endpoint of a later version",
        |sent| sent.stage.session.endpoint.kind = EndpointKind::Other,
        &["endpoint"],
    ),
];

#[test]
fn invalid_session_is_refused_by_name_and_leaves_nothing_behind() {
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
