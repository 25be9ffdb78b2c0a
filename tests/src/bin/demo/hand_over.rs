//! Replaces the back-end of the running guest three times. In a fourth hand-over, the target is killed halfway.

use std::fmt::Write as _;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use baton_protocol::codec::Message as _;
use baton_protocol::control::SessionReport;
use baton_tests::backend::in_time;
use baton_tests::guest::Guest;
use baton_tests::link::{GUEST, HOST, Link};
use baton_tests::ping;
use baton_tests::session_peer::{FakeTarget, Relay, STAGED};
use nix::sys::signal::Signal;

use super::{batonctl, run_batonctl, say};

const TIMES: usize = 3;

/// The phases of the blackout in order, with descriptions.
const PHASES: [(&str, &str); 5] = [
    ("stop", "the source stops its rings"),
    ("commit", "the source offers the session"),
    ("pass", "the offer reaches the target"),
    ("take", "the target takes the session"),
    ("start", "the target starts the rings"),
];

/// The results of the hand-overs.
pub struct HandedOver {
    /// The blackout of each completed hand-over, in microseconds.
    pub blackouts_us: Vec<u64>,
    /// The result of the hand-over whose target was killed.
    pub rolled_back: String,
    /// Pings sent during all hand-overs.
    pub pings: usize,
    /// Pings that were not answered.
    pub lost: usize,
}

/// Runs the hand-overs and prints their commands and results.
pub fn show(link: &mut Link, guest: &mut Guest) -> Result<HandedOver> {
    say(&format!(
        "{TIMES} times, a new baton-backend (the target) takes over from the running one (the source)."
    ))?;
    let pings = ping::Endless::start(GUEST);
    let mut blackouts_us = Vec::new();
    for _ in 0..TIMES {
        pings.wait_answered()?;
        let successor = link.successor()?;
        say(&successor.command_line())?;
        say(&format!("batonctl {} handover {}", link.control().display(), successor.incoming().display()))?;
        let report = in_time(|| ask(link.control(), successor.incoming()))?;
        let SessionReport::Completed { blackout_us, phases } = report else {
            bail!("the hand-over failed: {report:?}")
        };
        let mut text = format!("{:>10}  blackout, of which\n", ms(blackout_us));
        for (name, what) in PHASES {
            let took = phases.get(name).copied().unwrap_or_default();
            writeln!(text, "{:>14}  {what}", ms(took))?;
        }
        say(text.trim_end())?;
        link.succeeded_by(successor)?;
        blackouts_us.push(blackout_us);
    }
    pings.wait_answered()?;
    let rolled_back = roll_back(link)?;
    pings.wait_answered()?;
    say(&batonctl(link.control(), "status")?)?;
    say(&format!("guest# ping -c 3 {HOST}"))?;
    say(guest.check(&format!("ping -c 3 -i 0.2 {HOST}"))?.trim_end())?;
    let (pings, lost) = pings.end()?;
    say(&format!("ping  network -> guest   {pings} sent during all hand-overs, {} lost", lost.len()))?;
    Ok(HandedOver { blackouts_us, rolled_back, pings, lost: lost.len() })
}

/// Hands the session over to a target that is killed once it has staged everything. This program relays all messages
/// between the two back-ends, so that it can kill the target at that moment.
fn roll_back(link: &mut Link) -> Result<String> {
    let mut successor = link.successor()?;
    let control = link.control();
    let between = FakeTarget::bind(&control.with_file_name("between"))?;
    say(&successor.command_line())?;
    say(&format!("batonctl {} handover {}", control.display(), between.path().display()))?;
    let report = thread::scope(|scope| {
        let asked = scope.spawn(|| ask(control, between.path()));
        let relay = Relay::join(&between, successor.incoming())?;
        relay.until_staged()?;
        say("kill -9  # the target, which has staged everything")?;
        successor.process.signal(Signal::SIGKILL)?;
        successor.process.wait()?;
        relay.source.say(&STAGED)?;
        // The source has stopped its rings and sends COMMIT, but the target is dead.
        let (last, _) = relay.source.hear()?;
        ensure!(last.name() == "COMMIT", "the source sent {} instead of COMMIT", last.name());
        drop(relay);
        asked.join().map_err(|_| anyhow::anyhow!("the hand-over thread panicked"))?
    })?;
    let SessionReport::RolledBack { phase, reason } = report else {
        bail!("the hand-over was not rolled back: {report:?}")
    };
    let text = format!("rolled back in phase \"{phase}\": {reason}");
    say(&format!("{text}; the source continues to serve"))?;
    Ok(text)
}

fn ask(control: &Path, incoming: &Path) -> Result<SessionReport> {
    let said = run_batonctl(control, &["handover", &incoming.display().to_string()])?;
    serde_json::from_str(said.trim()).with_context(|| format!("unexpected output of batonctl: {said:?}"))
}

fn ms(us: u64) -> String {
    format!("{}.{:03} ms", us / 1000, us % 1000)
}

impl HandedOver {
    /// Formats the results for the summary.
    pub fn summary(&self) -> String {
        let blackouts: Vec<_> = self.blackouts_us.iter().map(|blackout| ms(*blackout)).collect();
        let Self { rolled_back, pings, lost, .. } = self;
        format!(
            "hand-overs: blackouts of {}; {lost} of {pings} pings lost\n\
             hand-over with a killed target: {rolled_back}",
            blackouts.join(", ")
        )
    }
}
