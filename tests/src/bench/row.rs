//! Finds the highest rate that the machine sustains without drops, and runs many consecutive hand-overs near it.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::cell::{Bench, Cell};
use super::message::Count;

/// How long to try a rate.
const TRIAL: Duration = Duration::from_secs(1);
/// The lower bound of the search, in frames a second.
const LOWEST: u32 = 10_000;
/// The upper bound of the search, in frames a second.
const HIGHEST: u32 = 2_000_000;
/// The number of hand-overs, or of steps of the control, that are counted together.
const BLOCK: usize = 50;

/// The resources of a back-end's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Anonymous resident memory in KiB.
    pub memory: u64,
    /// Open descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
}

/// The result.
#[derive(Clone, Debug)]
pub struct Row {
    /// The highest rate that the machine sustains, in frames a second each way.
    pub limit: u32,
    /// Higher rates that were rejected because the control was not clean.
    pub given_up: Vec<u32>,
    /// The rate of the load, in frames a second each way.
    pub rate: u32,
    /// The number of hand-overs, and of steps of the control.
    pub handovers: usize,
    /// The frames of the blocks with hand-overs.
    pub with: Count,
    /// The frames of the control, in which as many back-ends are started and ended.
    pub control: Count,
    /// The resources of the back-end after the first block of hand-overs.
    pub before: Size,
    /// The resources of the back-end after the last hand-over.
    pub after: Size,
}

impl Row {
    /// Whether the hand-overs harmed no frame, and the back-end did not grow.
    pub fn is_clean(&self) -> bool {
        let Size { memory, fds, threads } = self.after;
        self.with.is_clean()
            && (fds, threads) == (self.before.fds, self.before.threads)
            && memory < self.before.memory + 1024
    }
}

/// Finds the limit and runs `handovers` consecutive hand-overs at 80 % of it. If the control is not clean, the rate is
/// too high for the machine: starts again with a lower limit.
///
/// # Errors
/// Returns an error if a hand-over fails.
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
    // Alternates, so that changes of the machine's speed affect both.
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
    // Once the back-end answers, it has released what it used for the hand-over.
    bench.backend.status()?;
    let process = &bench.backend.process;
    let memory = process.resident_bytes()? / 1024;
    Ok(Size { memory, fds: process.open_fds()?, threads: process.threads()? })
}

/// Finds the highest rate, within 5 %, at which no frame is dropped while back-ends are started and ended.
fn limit(bench: &mut Bench) -> Result<u32> {
    let (mut low, mut high) = (LOWEST, HIGHEST);
    while high > low + low / 20 {
        // Doubles the rate until one fails, then bisects.
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
