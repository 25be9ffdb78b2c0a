//! The guest's back-end is replaced under it, three times; a fourth that is to take its place is killed halfway.

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

/// What the phases of a hand-over are, in their order.
const PHASES: [(&str, &str); 5] = [
    ("stop", "the old one came to a stop"),
    ("commit", "it offered the session"),
    ("pass", "its last word reached the new one"),
    ("take", "that took the session"),
    ("start", "and its threads ran"),
];

/// How the hand-overs went.
pub struct HandedOver {
    /// For how long nobody served, in microseconds.
    pub blackouts_us: Vec<u64>,
    /// What became of the one whose target was killed.
    pub rolled_back: String,
    /// Pings that were sent all the while.
    pub pings: usize,
    /// Those that were not answered.
    pub lost: usize,
}

/// Shows it.
pub fn show(link: &mut Link, guest: &mut Guest) -> Result<HandedOver> {
    let pings = ping::Endless::start(GUEST);
    let mut blackouts_us = Vec::new();
    for _ in 0..TIMES {
        pings.wait_answered()?;
        let successor = link.successor()?;
        say(&successor.command_line())?;
        say(&format!("batonctl {} handover {}", link.control().display(), successor.incoming().display()))?;
        let report = in_time(|| ask(link.control(), successor.incoming()))?;
        let SessionReport::Completed { blackout_us, phases } = report else { bail!("{report:?}") };
        let mut text = format!("{:>10}  nobody served, of that\n", ms(blackout_us));
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
    say(&format!("ping  network -> guest   {pings} sent all the while, {} lost", lost.len()))?;
    Ok(HandedOver { blackouts_us, rolled_back, pings, lost: lost.len() })
}

/// Has the session handed to a back-end that is killed when everything has been made ready for it. So that it is killed
/// just then, the two back-ends speak through this program, which hands on all that they say.
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
        say("kill -9  # the new one, which has everything now but the session's last state")?;
        successor.process.signal(Signal::SIGKILL)?;
        successor.process.wait()?;
        relay.source.say(&STAGED)?;
        // The old one stands still, and says how far it was. Nobody is left to hear it.
        let (last, _) = relay.source.hear()?;
        ensure!(last.name() == "COMMIT", "{} instead of COMMIT", last.name());
        drop(relay);
        asked.join().map_err(|_| anyhow::anyhow!("the hand-over's thread panicked"))?
    })?;
    let SessionReport::RolledBack { phase, reason } = report else { bail!("{report:?}") };
    let text = format!("rolled back in phase \"{phase}\": {reason}");
    say(&format!("{text}; the old one serves on"))?;
    Ok(text)
}

fn ask(control: &Path, incoming: &Path) -> Result<SessionReport> {
    let said = run_batonctl(control, &["handover", &incoming.display().to_string()])?;
    serde_json::from_str(said.trim()).with_context(|| format!("batonctl said {said:?}"))
}

fn ms(us: u64) -> String {
    format!("{}.{:03} ms", us / 1000, us % 1000)
}

impl HandedOver {
    /// For the summary.
    pub fn summary(&self) -> String {
        let blackouts: Vec<_> = self.blackouts_us.iter().map(|blackout| ms(*blackout)).collect();
        let Self { rolled_back, pings, lost, .. } = self;
        format!(
            "hand-overs: nobody served for {}; one {rolled_back}; {lost} of {pings} pings were lost",
            blackouts.join(", ")
        )
    }
}
