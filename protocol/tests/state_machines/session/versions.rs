//! Hand-overs between this version and a simulated next one, and replays of recorded hand-overs of every version.

use std::path::{Path, PathBuf};

use baton_protocol::codec::Message as _;
use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::prologue::SourcePrologue;
use baton_protocol::handover::session::source::Source;
use baton_protocol::handover::session::target::{Taken, Target};
use baton_protocol::handover::wire::message::{Message, PROTOCOL};
use baton_protocol::ownership::Word;

use super::world::{End, Operation, World};

#[test]
fn handover_between_this_and_the_next_version_succeeds() {
    for next in [End::Source, End::Target] {
        let mut world = World::new(false);
        world.next = Some(next);
        while world.undisturbed() {}
        assert!(matches!(world.source.state(), Some(Source::HandedOver(Some(_)))), "{world:?}");
        assert!(matches!(world.target.state(), Some(Target::Active(Taken::Committed(_)))));
        world.finish();
    }
}

#[test]
fn refusal_between_this_and_the_next_version_keeps_its_name() {
    for next in [End::Source, End::Target] {
        let mut world = World::new(false);
        world.next = Some(next);
        world.act(Operation::Unwilling);
        while world.undisturbed() {}
        let Some(SourcePrologue::Ended { reason: EndReason::Refused(reasons), .. }) = world.source.prologue()
        else {
            panic!("{world:?}")
        };
        assert_eq!(reasons.0[0].name, "front-end");
        world.finish();
    }
}

fn recording(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/session-v{version}-whole.bin"))
}

/// The recording holds every packet of a hand-over, each preceded by its length.
#[test]
fn handover_packets_match_the_recording() {
    let mut world = World::new(false);
    while world.undisturbed() {}
    let with_length = |packet: &Vec<u8>| {
        let length = u32::try_from(packet.len()).unwrap().to_le_bytes();
        length.into_iter().chain(packet.iter().copied()).collect::<Vec<u8>>()
    };
    let whole: Vec<u8> = world.sent.iter().flat_map(with_length).collect();
    let path = recording(PROTOCOL.versions.newest);
    if std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, &whole).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), whole, "{}", path.display());
}

#[test]
fn recorded_handover_of_every_version_replays() {
    for version in PROTOCOL.versions.oldest..=PROTOCOL.versions.newest {
        let whole = std::fs::read(recording(version)).unwrap();
        let mut rest = &whole[..];
        let (mut with_source, mut with_target) = (World::new(false), World::new(false));
        let offered = Word::INITIAL.offered().unwrap();
        while let Some((length, packets)) = rest.split_first_chunk::<4>() {
            let (packet, others) = packets.split_at(usize::try_from(u32::from_le_bytes(*length)).unwrap());
            rest = others;
            // The sender, and the word that it set before it sent the packet.
            let (from, word) = match Message::decode(packet).unwrap() {
                Message::Hello(hello) if hello.program == "source" => (End::Source, None),
                Message::Prepare(_) | Message::Stage(_) | Message::Descriptors(_) => (End::Source, None),
                Message::Commit(_) => (End::Source, Some(offered)),
                Message::Active(_) => (End::Target, offered.taken().unwrap().settled()),
                _ => (End::Target, None),
            };
            let (world, end) = match from {
                End::Source => (&mut with_target, End::Target),
                End::Target => (&mut with_source, End::Source),
            };
            world.word = word.unwrap_or(world.word);
            world.replay(end, packet);
        }
        assert!(matches!(with_source.source.state(), Some(Source::HandedOver(Some(_)))), "{with_source:?}");
        assert!(matches!(with_target.target.state(), Some(Target::Active(_))), "{with_target:?}");
    }
}
