//! Hand-overs with a later version of the protocol.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use baton_protocol::codec::{HEADER, Message as _};
use baton_protocol::control::SessionReport;
use baton_protocol::handover::wire::message::PROTOCOL;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::load;
use baton_tests::session_peer::{Asked, FakeTarget, Relay};

use super::serving;

/// A packet as a later version would send it: with that version, and with a field that this version does not know.
fn of_later_version(packet: &[u8]) -> Result<Vec<u8>> {
    let (header, body) = packet.split_at(HEADER);
    let mut later = header.to_vec();
    later[4..6].copy_from_slice(&(PROTOCOL.versions.newest + 1).to_le_bytes());
    // A MessagePack map of up to 15 fields, and one more: "later": [1, nil].
    let fields = *body.first().context("a body")?;
    ensure!((0x80..0x8f).contains(&fields), "{fields:#x} does not start a small map");
    let more = [&[0xa5], b"later".as_slice(), &[0x92, 1, 0xc0]].concat();
    let length = u32::try_from(body.len() + more.len())?;
    later[12..16].copy_from_slice(&length.to_le_bytes());
    later.push(fields + 1);
    later.extend_from_slice(&body[1..]);
    later.extend(more);
    Ok(later)
}

#[test]
fn session_moves_to_a_later_version_and_back() {
    let (mut rig, mut device) = serving(Datapath::Userspace, Options::default(), &[]).unwrap();
    let Rig { network, backend, .. } = &mut rig;
    load::run(&mut device, network, 5_000, || {
        // One of the two speaks as a build of the next version.
        for later in [Later::Target, Later::Source, Later::Target, Later::Source] {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            let place = FakeTarget::bind(&target.directory().join("later"))?;
            let asked = Asked::of(backend, place.path())?;
            let relay = Relay::join(&place, &target.incoming())?;
            let mut names = Vec::new();
            for down in [true, false, true, false, true, false, true, false] {
                let (from, to) =
                    if down { (&relay.source, &relay.target) } else { (&relay.target, &relay.source) };
                let (message, fds) = from.hear()?;
                let packet = message.encode()?;
                let packet =
                    if down == (later == Later::Source) { of_later_version(&packet)? } else { packet };
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                to.say_bytes(&packet, &fds)?;
                names.push(message.name());
            }
            ensure!(
                names == ["HELLO", "HELLO", "PREPARE", "READY", "STAGE", "STAGED", "COMMIT", "ACTIVE"],
                "{names:?}"
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

/// The process that speaks the later version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Later {
    Source,
    Target,
}
