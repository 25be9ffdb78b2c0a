//! Hostile sources at every step: the target waits on.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use baton_protocol::control::{HandoverState, SessionReport};
use baton_protocol::handover::wire::message::{Commit, Message, ReadyToTake};
use baton_protocol::handover::wire::session::{PairNow, VringNow};
use baton_protocol::ownership::Word;
use baton_tests::backend::Backend;
use baton_tests::datapath::Datapath;
use baton_tests::session_peer::{
    Asked, FakeTarget, Link, Relay, STAGED, Sent, greet, hear_stage, hello_of, prepare, send_stage,
};
use nix::sys::signal::Signal;

use super::{Rest, directory, file, packets, pipe, replace_word, while_serving};

/// How far a fake source has come with a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// It has connected.
    Fresh,
    /// HELLO was answered.
    Greeted,
    /// PREPARE was answered.
    Ready,
    /// STAGE has announced more packets.
    Gathering,
    /// STAGED was received.
    Staged,
}

const ALL: [At; 5] = [At::Fresh, At::Greeted, At::Ready, At::Gathering, At::Staged];

/// A fake source, with a session recorded from a real one.
#[derive(Debug)]
struct FakeSource {
    prepare: Message,
    sent: Sent,
}

impl FakeSource {
    /// Records the session that `backend` would hand over.
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

    /// Brings a new connection to this step, with a new ownership word.
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

    /// Aborts the hand-over: the source has the session for good.
    fn abort(&self) -> Result<()> {
        Ok(self.sent.word()?.swap(Word::INITIAL, Word::INITIAL.aborted().context("a word")?).must_win()?)
    }
}

#[test]
fn unexpected_packets_do_not_disturb_a_waiting_target() {
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
                // The target has read the packet once it answers or closes the connection.
                let _ = link.hear();
                drop(link);
                if at == At::Staged {
                    // Makes the target drop the session at once. After a COMMIT without an offer it has done so
                    // already.
                    let _ = source.abort();
                }
                rest.check(&mut target, &what)?;
            }
        }
        target.check_healthy()?;
        // The source closes the connection at each step.
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
fn invalid_commit_is_refused() {
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
            source.sent.word()?.swap(Word::INITIAL, offered).must_win()?;
            link.say(&Message::Commit(commit))?;
            let last = link.hear_end()?;
            let Some(Message::Refuse(refuse)) = last else { bail!("{what}: {last:?}") };
            ensure!(refuse.reasons.0.iter().any(|reason| reason.name == name), "{what}: {}", refuse.reasons);
            // The target has not taken the session.
            source.sent.word()?.swap(offered, offered.aborted().context("a word")?).must_win()?;
            rest.check(&mut target, &what)?;
        }
        // A COMMIT before the offer, and one after the offer was aborted.
        for now in [Word::INITIAL, offered] {
            let link = source.bring(&target.incoming(), At::Staged)?;
            if now == offered {
                source.sent.word()?.swap(Word::INITIAL, offered).must_win()?;
                source.sent.word()?.swap(offered, offered.aborted().context("a word")?).must_win()?;
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
fn replayed_messages_have_no_effect() {
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

        // Replays ACTIVE to the source, now another process, at each step.
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
                _ => "the target claims to have taken over, but the ownership word says otherwise",
            };
            ensure!(reason == expected, "{reason}");
        }
        // Replays to a target: a STAGE with its old ownership word, and a COMMIT in another hand-over.
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

#[test]
fn hung_source_is_given_up_at_every_step() {
    while_serving(|backend, place| {
        let mut hanging = Vec::new();
        for at in ALL {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            let rest = Rest::of(&target.process)?;
            let mut source = FakeSource::record(backend, place)?;
            let link = source.bring(&target.incoming(), at)?;
            // Asks at once, while the target has not yet given up the first source.
            let (_, reason) = Asked::of(backend, &target.incoming())?.failure()?;
            ensure!(reason.contains("busy"), "{at:?}: {reason}");
            hanging.push((at, target, rest, source, link));
        }
        for (at, mut target, rest, source, link) in hanging {
            if at == At::Staged {
                // The target would hold the session for longer than a test should take.
                source.abort()?;
                drop(link);
            } else {
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
fn one_of_two_simultaneous_sources_is_served() {
    while_serving(|backend, place| {
        let mut target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let rest = Rest::of(&target.process)?;
        let mut source = FakeSource::record(backend, place)?;
        for _ in 0..20 {
            // When the target continues, both sources are connected and the first has sent HELLO.
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
        // A second source does not disturb a staged session either.
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
