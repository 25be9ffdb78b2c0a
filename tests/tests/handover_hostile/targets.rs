//! Hostile targets at every step: the source serves on.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail, ensure};
use baton_channel::ownership::SharedWord;
use baton_protocol::handover::wire::message::{Active, Message, OWNERSHIP_FD, Refuse};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::TakeTimes;
use baton_tests::session_peer::{Asked, Link, STAGED, Sent, greet, hear_stage, prepare};

use super::{directory, file, packets, pipe, while_serving};

/// The last message that a fake target lets a source send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// HELLO.
    Hello,
    /// PREPARE.
    Prepare,
    /// STAGE.
    Stage,
    /// COMMIT: no process serves.
    Commit,
}

const POINTS: [Point; 4] = [Point::Hello, Point::Prepare, Point::Stage, Point::Commit];

impl Point {
    /// The phase of the source at this point.
    fn phase(self) -> &'static str {
        match self {
            Self::Hello => "greet",
            Self::Prepare => "check",
            Self::Stage => "stage",
            Self::Commit => "commit",
        }
    }

    /// Lets the source come to this point; returns the session that it has sent.
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
fn source_serves_on_whatever_a_target_sends_before_it_takes_the_session() {
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
                // Even if this was the expected packet, no other follows.
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
fn report_names_what_the_target_did() {
    while_serving(|backend, place| {
        let word = |sent: Option<&Sent>| -> Result<SharedWord> { sent.context("a session")?.word() };
        let reported = |point: Point, act: &dyn Fn(&Link, Option<&Sent>) -> Result<()>| -> Result<String> {
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
            ensure!(reported(point, &|_, _| Ok(()))? == "the target closed the connection");
            let reasons = Refusal::Busy.into();
            let refuse = Message::Refuse(Refuse { reasons });
            let reason = reported(point, &|source, _| source.say(&refuse))?;
            ensure!(reason == "the target refuses: busy: the target is in another hand-over", "{reason}");
            // The source does not believe ACTIVE without the swap of the word.
            let active = Message::Active(Active { epoch: 1, times: TakeTimes::default() });
            let reason = reported(point, &|source, _| source.say(&active))?;
            ensure!(
                reason.contains("ACTIVE at the wrong time") || reason.contains("claims to have taken over"),
                "{reason}"
            );
            if matches!(point, Point::Hello | Point::Prepare) {
                continue;
            }
            // The source detects an invalid change of the word.
            let reason = reported(point, &|_, sent| {
                let fd = sent.context("a session")?.fd(OWNERSHIP_FD)?.try_clone()?;
                Ok(std::os::unix::fs::FileExt::write_all_at(&File::from(fd), &[0xff; 8], 0)?)
            })?;
            ensure!(reason == "unexpected ownership word", "{reason}");
            let reason = reported(point, &|_, sent| {
                let word = word(sent)?;
                let now = word.load()?;
                Ok(word.swap(now, now.aborted().context("a word")?).must_win()?)
            })?;
            ensure!(reason == "unexpected ownership word", "{reason}");
        }
        Ok(())
    })
    .unwrap();
}

/// Checks that the source gives up a target that hangs at this point, and keeps the session.
fn check_hung_target(point: Point) -> Result<()> {
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
fn target_that_hangs_before_hello_is_given_up() {
    check_hung_target(Point::Hello).unwrap();
}

#[test]
fn target_that_hangs_before_ready_is_given_up() {
    check_hung_target(Point::Prepare).unwrap();
}

#[test]
fn target_that_hangs_before_staged_is_given_up() {
    check_hung_target(Point::Stage).unwrap();
}

#[test]
fn target_that_hangs_after_commit_does_not_get_the_session() {
    check_hung_target(Point::Commit).unwrap();
}
