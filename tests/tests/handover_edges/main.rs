//! Hand-overs of a session in special circumstances: the front-end sends messages or leaves, a frame is in hand, the
//! operator or a signal ends the hand-over, a process refuses it. Also the sockets, scripts and settings that the
//! target takes.

mod abort;
mod frame_in_hand;
mod frontend;
mod refusal;
mod settings;
mod versions;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use baton_protocol::control::SessionReport;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::process::Process;
use baton_tests::session_peer::{Asked, FakeTarget, Relay};

/// A back-end and a device whose traffic works.
fn serving(datapath: Datapath, options: Options, arguments: &[&str]) -> Result<(Rig, Device)> {
    let mut rig = Rig::new(datapath, options.queue_pairs, arguments)?;
    let mut device = rig.device(options)?;
    rig.check_traffic(&mut device)?;
    Ok((rig, device))
}

/// A hand-over between a real source and a real target, whose packets the test relays.
struct Held {
    relay: Relay,
    asked: Asked,
    target: Backend,
    /// The path to which the source connects.
    path: PathBuf,
}

impl Held {
    /// Begins a hand-over.
    fn begin(rig: &Rig, target: Backend) -> Result<Self> {
        let place = FakeTarget::bind(&target.directory().join("held"))?;
        let path = place.path().to_owned();
        let asked = Asked::of(&rig.backend, &path)?;
        let relay = Relay::join(&place, &target.incoming())?;
        Ok(Self { relay, asked, target, path })
    }

    /// Begins a hand-over, and lets the target stage the session. The source has not received STAGED.
    fn staged(rig: &Rig) -> Result<Self> {
        let held = Self::begin(rig, Backend::waiting_for_session(rig.datapath, &[])?)?;
        held.relay.until_staged()?;
        Ok(held)
    }

    /// Completes the hand-over from there.
    fn complete(self, rig: &mut Rig) -> Result<()> {
        self.relay.finish()?;
        self.succeed(rig)
    }

    /// Checks that the hand-over has completed; the target becomes the rig's back-end.
    fn succeed(self, rig: &mut Rig) -> Result<()> {
        drop(self.relay);
        let report = self.asked.report()?;
        ensure!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
        rig.backend.is_succeeded_by(self.target)
    }
}

/// How many descriptors and threads a process has.
fn at_rest(process: &Process) -> Result<(usize, usize)> {
    Ok((process.open_fds()?, process.threads()?))
}

/// Processor time that a process has used, in ticks of 10 ms.
fn ticks(process: &Process) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
    let fields: Vec<_> = stat.rsplit(')').next().context("a line of stat")?.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Checks that a process sleeps instead of polling.
fn check_idle(process: &Process) -> Result<()> {
    let before = ticks(process)?;
    std::thread::sleep(Duration::from_millis(400));
    let used = ticks(process)? - before;
    ensure!(used < 10, "the process used {used} ticks in 400 ms");
    Ok(())
}

/// Hands the rig's session over to a target with these arguments.
fn hand_over(rig: &mut Rig, arguments: &[&str]) -> Result<SessionReport> {
    let target = Backend::waiting_for_session(rig.datapath, arguments)?;
    rig.backend.become_target(target)
}
