//! Runs the rounds: each scenario with each back-end, one after the other, in an order that rotates.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::load::Outcome;
use super::peer::Peer;
use super::scenario::Scenario;
use crate::netns::Netns;
use crate::process::Process;
use crate::programs;

/// The TAP of each cell, in the cell's namespace.
const TAP: &str = "tap0";

/// The settings of the benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Number of rounds.
    pub rounds: usize,
    /// Duration of each measurement in milliseconds.
    pub milliseconds: u64,
    /// Whether the load has the last processor, and the back-end the others.
    pub pinned: bool,
}

/// A scenario with a back-end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// The scenario.
    pub scenario: Scenario,
    /// The back-end's name.
    pub peer: String,
    /// The result of each round. Empty if the back-end does not support the scenario.
    pub outcomes: Vec<Outcome>,
}

impl Cell {
    /// Replaces the times of all frames by their quantiles: each tenth, then 99 %, 99.9 % and the longest.
    #[must_use]
    pub fn summarised(mut self) -> Self {
        for outcome in &mut self.outcomes {
            let times = &outcome.times;
            let rank = |of: usize| (times.len() * of).div_ceil(1000).saturating_sub(1);
            let thousandths = (0..1000).step_by(100).chain([990, 999, 1000]);
            let quantiles = thousandths.filter_map(|of| times.get(rank(of)).copied());
            outcome.times = quantiles.collect();
        }
        self
    }
}

/// Measures all `scenarios` with all `peers`. Reports progress to `say`.
///
/// # Errors
/// Returns an error if a measurement fails.
pub fn run(
    scenarios: &[Scenario],
    peers: &[Peer],
    settings: Settings,
    mut say: impl FnMut(&str) -> Result<()>,
) -> Result<Vec<Cell>> {
    let mut cells: Vec<Cell> = scenarios
        .iter()
        .flat_map(|&scenario| {
            peers.iter().map(move |peer| Cell { scenario, peer: peer.name.clone(), outcomes: Vec::new() })
        })
        .collect();
    for round in 0..settings.rounds {
        for (row, scenario) in scenarios.iter().enumerate() {
            say(&format!("round {}: {}", round + 1, scenario.name()))?;
            for turn in 0..peers.len() {
                let column = (turn + round) % peers.len();
                let peer = &peers[column];
                if !peer.can(scenario) {
                    continue;
                }
                let outcome = measure(scenario, peer, settings)
                    .with_context(|| format!("{} with {}", scenario.name(), peer.name))?;
                cells[row * peers.len() + column].outcomes.extend(outcome);
            }
        }
    }
    Ok(cells)
}

fn measure(scenario: &Scenario, peer: &Peer, settings: Settings) -> Result<Option<Outcome>> {
    let netns = Netns::enter()?;
    if !peer.makes_tap() {
        netns.create_persistent_tap(TAP, scenario.pairs > 1)?;
    }
    let running = peer.start(scenario, TAP)?;
    let (mut result, theirs) = std::io::pipe()?;
    let theirs = OwnedFd::from(theirs);
    let mut arguments = vec![
        "load".to_owned(),
        format!("--output={}", theirs.as_raw_fd()),
        format!("--scenario={}", serde_json::to_string(scenario)?),
        format!("--tap={TAP}"),
        format!("--pid={}", running.process.pid()),
        format!("--milliseconds={}", settings.milliseconds),
    ];
    arguments.extend(running.socket.as_ref().map(|socket| format!("--socket={}", socket.display())));
    arguments.extend(settings.pinned.then(|| "--pinned".to_owned()));
    let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
    let mut load = Process::start(&programs::bench_dataplane()?, &arguments, &[theirs.as_fd()])?;
    drop(theirs);
    let mut text = Vec::new();
    result.read_to_end(&mut text)?;
    let status = load.wait()?;
    ensure!(
        status.success(),
        "the load failed ({status}):\n{}\nlog of the back-end:\n{}",
        load.log(),
        running.process.log()
    );
    Ok(serde_json::from_slice(&text)?)
}
