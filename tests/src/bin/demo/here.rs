//! On this machine itself: a session is handed on from back-end to back-end while numbered frames go both ways. The
//! front-end and the guest are played by this program, so nothing is emulated, and the times are those of the machine.

use std::thread;

use anyhow::{Result, anyhow, bail};
use baton_protocol::control::SessionReport;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::load::{self, Demand, Outcome};
use nix::unistd::geteuid;

use super::say;

/// Hand-overs in a row.
const TIMES: usize = 20;
/// Frames a second each way.
const RATE: u32 = 20_000;
/// The most frames in flight each way: queues and rings hold as many, however slow the machine is.
const IN_FLIGHT: u64 = 200;

/// What was measured.
pub struct Here {
    blackouts_us: Vec<u64>,
    frames: u64,
    /// Frames lost, or that arrived twice.
    pub wrong: u64,
}

impl Here {
    /// In one line.
    pub fn summary(&self) -> String {
        let Self { blackouts_us, frames, wrong } = self;
        let [p50, max] = [blackouts_us[blackouts_us.len() / 2], blackouts_us[blackouts_us.len() - 1]];
        format!(
            "here: {} hand-overs under {RATE} frames a second each way: blackout p50 {p50} µs, max {max} µs; {wrong} of \
             {frames} frames lost or doubled",
            blackouts_us.len()
        )
    }
}

/// Shows it; `None` where it cannot be done.
pub fn show() -> Result<Option<Here>> {
    if !geteuid().is_root() {
        say("not shown: a network namespace with a TAP needs root's rights")?;
        return Ok(None);
    }
    // The thread enters a network namespace of its own, and no other may be in it.
    let here = thread::spawn(hand_on).join().map_err(|_| anyhow!("the demonstration panicked"))??;
    say(&here.summary())?;
    Ok(Some(here))
}

fn hand_on() -> Result<Here> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let demand = Demand { in_flight: [IN_FLIGHT; 2], ..Demand::whole(RATE) };
    let Rig { network, backend, .. } = &mut rig;
    let (mut blackouts_us, outcome) = load::run_with(&mut device, network, demand, || {
        (0..TIMES).map(|_| hand_on_once(backend)).collect::<Result<Vec<_>>>()
    })?;
    blackouts_us.sort_unstable();
    let Outcome { down, up, lost, doubled } = outcome;
    Ok(Here { blackouts_us, frames: down + up, wrong: lost.into_iter().chain(doubled).sum() })
}

fn hand_on_once(backend: &mut Backend) -> Result<u64> {
    let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
    match backend.become_busy_target(target)? {
        SessionReport::Completed { blackout_us, .. } => Ok(blackout_us),
        report => bail!("{report:?}"),
    }
}
