//! Many hand-overs in a row near the rate that the machine bears, and what that rate is.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::cell::{Bench, Cell};
use super::message::Count;

/// How long a rate is tried.
const TRIAL: Duration = Duration::from_secs(1);
/// Where the search begins.
const LOWEST: u32 = 10_000;
/// Where it ends in any case.
const HIGHEST: u32 = 2_000_000;
/// Hand-overs, or intervals of the control, that are counted together.
const BLOCK: usize = 50;

/// What a back-end's process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Memory of its own, in KiB.
    pub memory: u64,
    /// Descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Row {
    /// The rate that the machine bears each way.
    pub limit: u32,
    /// Higher ones, that were taken for it until not even the control was clean.
    pub given_up: Vec<u32>,
    /// The rate of the load.
    pub rate: u32,
    /// How many hand-overs, and intervals of the control.
    pub handovers: usize,
    /// What became of the frames under hand-overs.
    pub with: Count,
    /// And without, with as many back-ends started and ended.
    pub control: Count,
    /// The size of the back-end after the first hand-overs.
    pub before: Size,
    /// And after the last one.
    pub after: Size,
}

impl Row {
    /// Whether nothing was lost by it, and nothing grew.
    pub fn is_clean(&self) -> bool {
        let Size { memory, fds, threads } = self.after;
        self.with.is_clean()
            && (fds, threads) == (self.before.fds, self.before.threads)
            && memory < self.before.memory + 1024
    }
}

/// Finds the limit, and hands a session on so many times in a row at 0.8 of that. A rate that shows itself to be too high,
/// by frames that are lost without any hand-over, is given up for a lower one, and all begins anew.
///
/// # Errors
/// If a hand-over fails.
pub fn run(cell: Cell, handovers: usize, restful: bool) -> Result<Row> {
    let mut bench = Bench::new(cell, restful)?;
    let mut limit = if restful { cell.rate } else { limit(&mut bench)? };
    let mut given_up = Vec::new();
    loop {
        let row = at(&mut bench, limit, handovers)?;
        if row.control.is_clean() || limit <= LOWEST {
            return Ok(Row { given_up, ..row });
        }
        given_up.push(limit);
        limit -= limit / 5;
    }
}

fn at(bench: &mut Bench, limit: u32, handovers: usize) -> Result<Row> {
    let rate = limit / 5 * 4;
    bench.set_rate(rate)?;
    bench.settle()?;
    let clean = Count { quiet: true, ..Count::default() };
    let (mut with, mut control, mut before) = (clean, clean, None);
    let mut done = 0;
    // By turns, so that both meet the machine's moods.
    while done < handovers {
        let block = BLOCK.min(handovers - done);
        (0..block).try_for_each(|_| Bench::start_another())?;
        control = bench.settle()?.and(control);
        for _ in 0..block {
            bench.hand_on()?;
        }
        with = bench.settle()?.and(with);
        done += block;
        before = Some(before.unwrap_or(size(bench)?));
    }
    let (after, given_up) = (size(bench)?, Vec::new());
    Ok(Row { limit, given_up, rate, handovers, with, control, before: before.unwrap_or(after), after })
}

fn size(bench: &mut Bench) -> Result<Size> {
    // Whoever answers has tidied up.
    bench.backend.status()?;
    let process = &bench.backend.process;
    let memory = process.resident_bytes()? / 1024;
    Ok(Size { memory, fds: process.open_fds()?, threads: process.threads()? })
}

/// The highest rate at which nothing is dropped, though back-ends are started and ended beside it: within 5 %.
fn limit(bench: &mut Bench) -> Result<u32> {
    let (mut low, mut high) = (LOWEST, HIGHEST);
    while high > low + low / 20 {
        // Upwards in leaps until one fails.
        let middle = if high == HIGHEST { low.saturating_mul(2).min(high - 1) } else { low.midpoint(high) };
        if holds(bench, middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

fn holds(bench: &mut Bench, rate: u32) -> Result<bool> {
    bench.set_rate(rate)?;
    bench.settle()?;
    let end = Instant::now() + TRIAL;
    while Instant::now() < end {
        Bench::start_another()?;
    }
    let count = bench.settle()?;
    Ok(count.is_clean() && count.rate >= rate / 50 * 49)
}
