//! Hand-overs on this machine, without the lab: each back-end hands the session over to the next one while numbered
//! frames go both ways. This program plays the front-end and the guest, so the times are those of the machine.

use std::thread;

use anyhow::{Result, anyhow, bail};
use baton_protocol::control::SessionReport;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::load::{self, Demand, Outcome};
use nix::unistd::geteuid;

use super::say;

/// The number of hand-overs.
const TIMES: usize = 20;
/// Frames a second each way.
const RATE: u32 = 20_000;
/// The most frames in flight each way. Queues and rings hold at least as many, so a slow machine does not lose frames.
const IN_FLIGHT: u64 = 200;

/// The result of the hand-overs.
pub struct Here {
    blackouts_us: Vec<u64>,
    frames: u64,
    /// Frames that were lost or duplicated.
    pub wrong: u64,
}

impl Here {
    /// Formats the result as one line.
    pub fn summary(&self) -> String {
        let Self { blackouts_us, frames, wrong } = self;
        let [p50, max] = [blackouts_us[blackouts_us.len() / 2], blackouts_us[blackouts_us.len() - 1]];
        format!(
            "this machine: {} hand-overs at {RATE} frames/s each way: blackout p50 {p50} µs, max {max} µs; {wrong} of \
             {frames} frames lost or duplicated",
            blackouts_us.len()
        )
    }
}

/// Hands a session over [`TIMES`] times. Returns `None` without root privileges.
pub fn show() -> Result<Option<Here>> {
    if !geteuid().is_root() {
        say("skipped: a network namespace with a TAP needs root privileges")?;
        return Ok(None);
    }
    say(&format!(
        "{TIMES} times, a new back-end takes over the running session, at {RATE} frames/s each way."
    ))?;
    say("This program plays the front-end and the guest, and checks that every frame arrives.")?;
    // The thread enters a new network namespace, which other threads must not share.
    let thread = thread::spawn(hand_over_under_load);
    let here = thread.join().map_err(|_| anyhow!("the hand-over thread panicked"))??;
    say(&here.summary())?;
    Ok(Some(here))
}

fn hand_over_under_load() -> Result<Here> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let demand = Demand { in_flight: [IN_FLIGHT; 2], ..Demand::whole(RATE) };
    let Rig { network, backend, .. } = &mut rig;
    let (mut blackouts_us, outcome) = load::run_with(&mut device, network, demand, || {
        (0..TIMES).map(|_| hand_over_once(backend)).collect::<Result<Vec<_>>>()
    })?;
    blackouts_us.sort_unstable();
    let Outcome { down, up, lost, doubled } = outcome;
    Ok(Here { blackouts_us, frames: down + up, wrong: lost.into_iter().chain(doubled).sum() })
}

fn hand_over_once(backend: &mut Backend) -> Result<u64> {
    let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
    match backend.become_busy_target(target)? {
        SessionReport::Completed { blackout_us, .. } => Ok(blackout_us),
        report => bail!("the hand-over failed: {report:?}"),
    }
}
