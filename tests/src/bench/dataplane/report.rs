//! Writes the measured part of `docs/performance.md`.

use std::fmt::Write as _;

use super::load::Outcome;
use super::run::Cell;
use super::scenario::{Scenario, Traffic};
use crate::bench::page::Machine;

/// The name of the first back-end, which the others are compared with.
const OWN: &str = "Baton";
/// The name of the TAP without virtio, with which the names of its variants begin.
const BARE: &str = "bare TAP";

/// The median, minimum and maximum over a cell's rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The minimum.
    pub least: f64,
    /// The maximum.
    pub most: f64,
}

impl Spread {
    /// Computes the spread of these values. Returns `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            values[middle - 1].midpoint(values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, least, most })
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures with three digits")]
impl Outcome {
    /// Returns the work per second: thousand frames, or gigabits if frames are large.
    pub fn rate(&self, scenario: &Scenario) -> f64 {
        self.work(scenario) / self.seconds
    }

    /// Returns the work per second of the back-end's processor time.
    pub fn efficiency(&self, scenario: &Scenario) -> f64 {
        self.work(scenario) / (self.used.cpu.max(1) as f64 / 1e9)
    }

    fn work(&self, scenario: &Scenario) -> f64 {
        if scenario.is_large() {
            (self.frames * scenario.frame as u64 * 8) as f64 / 1e9
        } else {
            self.frames as f64 / 1e3
        }
    }

    /// Returns the processor time in percent of one processor.
    pub fn load(&self) -> f64 {
        self.used.cpu as f64 / 1e7 / self.seconds
    }

    /// Returns the processor time per frame in microseconds.
    pub fn cpu_per_frame(&self) -> f64 {
        self.used.cpu as f64 / 1e3 / self.frames.max(1) as f64
    }

    /// Returns a quantile of the frames' times in microseconds.
    pub fn time(&self, of_thousand: usize) -> f64 {
        let rank = (self.times.len() * of_thousand).div_ceil(1000).saturating_sub(1);
        self.times.get(rank).copied().unwrap_or_default() as f64 / 1e3
    }

    fn per_thousand(&self, count: u64) -> f64 {
        count as f64 * 1e3 / self.frames.max(1) as f64
    }
}

impl Cell {
    /// Returns the spread of `value` over the rounds.
    pub fn spread(&self, value: impl Fn(&Outcome) -> f64) -> Option<Spread> {
        Spread::of(self.outcomes.iter().map(value))
    }
}

/// Formats the measured part as Markdown. `plots` are the file names of the plots.
pub fn text(machine: &Machine, cells: &[Cell], rounds: usize, milliseconds: u64, plots: &[&str]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, machine, cells, rounds, milliseconds, plots);
    text
}

fn write(
    text: &mut String,
    machine: &Machine,
    cells: &[Cell],
    rounds: usize,
    milliseconds: u64,
    plots: &[&str],
) -> std::fmt::Result {
    let Machine { processors, kernel, load } = machine;
    writeln!(
        text,
        "Measured on {processors}, Linux {kernel}, at a load average of {load} before the start. Each cell is the"
    )?;
    writeln!(
        text,
        "median of {rounds} rounds of {milliseconds} ms, with the minimum and the maximum in brackets.\n"
    )?;
    for plot in plots {
        writeln!(text, "![{plot}]({plot})\n")?;
    }
    let rows = rows(cells);
    writeln!(text, "### Work per second of the back-end's processor time\n")?;
    writeln!(text, "Thousand frames, or gigabits for frames of 64 KiB.\n")?;
    let flood = |scenario: &Scenario| !scenario.is_ping_pong();
    compared(text, &rows, flood, |scenario, outcome| outcome.efficiency(scenario))?;
    writeln!(text, "\n### Work per second\n")?;
    writeln!(text, "Thousand frames, or gigabits for frames of 64 KiB.\n")?;
    let flood = |scenario: &Scenario| !scenario.is_ping_pong() && !scenario.is_paced();
    compared(text, &rows, flood, |scenario, outcome| outcome.rate(scenario))?;
    both_ways(text, &rows)?;
    writeln!(text, "\n### Frames' times\n")?;
    writeln!(text, "Microseconds: of a round trip for ping-pong, of one way otherwise.\n")?;
    writeln!(text, "| | back-end | p50 | p99 | p99.9 | processor, µs per frame | processor, % |")?;
    writeln!(text, "|---|---|---|---|---|---|---|")?;
    for (scenario, row) in rows.iter().filter(|(scenario, _)| scenario.is_ping_pong() || scenario.is_paced())
    {
        for cell in row.iter().filter(|cell| !cell.outcomes.is_empty()) {
            write!(text, "| {} | {} |", scenario.name(), cell.peer)?;
            for of_thousand in [500, 990, 999] {
                write!(text, " {} |", figure(cell.spread(|outcome| outcome.time(of_thousand))))?;
            }
            let per_frame = figure(cell.spread(Outcome::cpu_per_frame));
            writeln!(text, " {per_frame} | {} |", figure(cell.spread(Outcome::load)))?;
        }
    }
    writeln!(text, "\n### System calls and notifications per thousand frames\n")?;
    writeln!(
        text,
        "Medians. Reads and writes are system calls of the back-end, sleeps are waits of its threads.\n"
    )?;
    writeln!(text, "| | back-end | reads and writes | sleeps | kicks | calls |")?;
    writeln!(text, "|---|---|---|---|---|---|")?;
    for (scenario, row) in &rows {
        for cell in row.iter().filter(|cell| !cell.outcomes.is_empty() && !cell.peer.starts_with(BARE)) {
            write!(text, "| {} | {} |", scenario.name(), cell.peer)?;
            let counts: [fn(&Outcome) -> u64; 4] = [
                |outcome| outcome.used.transfers,
                |outcome| outcome.used.sleeps,
                |outcome| outcome.kicks,
                |outcome| outcome.calls,
            ];
            for count in counts {
                let value = cell.spread(|outcome| outcome.per_thousand(count(outcome)));
                write!(text, " {} |", value.map_or_else(String::new, |value| digits(value.median)))?;
            }
            writeln!(text)?;
        }
    }
    Ok(())
}

/// Writes how the back-ends share their time between the directions when both are loaded.
#[expect(clippy::cast_precision_loss, reason = "figures with three digits")]
fn both_ways(text: &mut String, rows: &[(Scenario, Vec<&Cell>)]) -> std::fmt::Result {
    writeln!(text, "\n### Both directions at once\n")?;
    writeln!(text, "Thousand frames per second.\n")?;
    writeln!(text, "| | back-end | guest → TAP | TAP → guest |")?;
    writeln!(text, "|---|---|---|---|")?;
    let rows = rows.iter().filter(|(scenario, _)| scenario.traffic == Traffic::BothWays);
    for (scenario, cell) in rows.flat_map(|(scenario, row)| row.iter().map(move |cell| (scenario, cell))) {
        let transmitted = cell.spread(|outcome| outcome.transmitted as f64 / 1e3 / outcome.seconds);
        let received =
            cell.spread(|outcome| (outcome.frames - outcome.transmitted) as f64 / 1e3 / outcome.seconds);
        if transmitted.is_some() {
            let (name, peer) = (scenario.name(), &cell.peer);
            writeln!(text, "| {name} | {peer} | {} | {} |", figure(transmitted), figure(received))?;
        }
    }
    Ok(())
}

/// Groups the cells by scenario.
fn rows(cells: &[Cell]) -> Vec<(Scenario, Vec<&Cell>)> {
    let mut rows: Vec<(Scenario, Vec<&Cell>)> = Vec::new();
    for cell in cells {
        match rows.iter_mut().find(|(scenario, _)| *scenario == cell.scenario) {
            Some((_, row)) => row.push(cell),
            None => rows.push((cell.scenario, vec![cell])),
        }
    }
    rows
}

/// Writes a table of one value: a column for each back-end, then the ratios of Baton to the best other one and to the
/// bare TAP.
fn compared(
    text: &mut String,
    rows: &[(Scenario, Vec<&Cell>)],
    wanted: impl Fn(&Scenario) -> bool,
    value: impl Fn(&Scenario, &Outcome) -> f64,
) -> std::fmt::Result {
    let Some((_, first)) = rows.first() else { return Ok(()) };
    let names: Vec<_> = first.iter().map(|cell| cell.peer.as_str()).collect();
    writeln!(text, "| | {} | {OWN} / best other | {OWN} / {BARE} |", names.join(" | "))?;
    writeln!(text, "|---|{}---|---|", "---|".repeat(names.len()))?;
    for (scenario, row) in rows.iter().filter(|(scenario, _)| wanted(scenario)) {
        write!(text, "| {} |", scenario.name())?;
        let spreads: Vec<_> =
            row.iter().map(|cell| cell.spread(|outcome| value(scenario, outcome))).collect();
        for spread in &spreads {
            write!(text, " {} |", figure(*spread))?;
        }
        let median = |wanted: &dyn Fn(&str) -> bool| {
            let medians = row.iter().zip(&spreads).filter(|(cell, _)| wanted(&cell.peer));
            medians.filter_map(|(_, spread)| Some((*spread)?.median)).max_by(f64::total_cmp)
        };
        let own = median(&|name| name == OWN);
        let best = median(&|name| !name.starts_with(OWN) && !name.starts_with(BARE));
        let bare = median(&|name| name == BARE);
        for other in [best, bare] {
            let ratio = own.zip(other).map_or_else(String::new, |(own, other)| format!("{:.2}", own / other));
            write!(text, " {ratio} |")?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn figure(spread: Option<Spread>) -> String {
    match spread {
        None => "—".to_owned(),
        Some(Spread { median, least, most }) => {
            format!("{} ({}–{})", digits(median), digits(least), digits(most))
        }
    }
}

/// Formats a value with three digits, or with all digits before the point if those are more.
fn digits(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_value() {
        let spread = Spread::of([3.0, 1.0, 2.0, 10.0]);
        assert_eq!(spread, Some(Spread { median: 2.5, least: 1.0, most: 10.0 }));
        assert_eq!(Spread::of([]), None);
        assert_eq!(figure(spread), "2.50 (1.00–10.0)");
    }

    #[test]
    fn quantiles_are_taken_from_sorted_times() {
        let outcome = Outcome { times: (1..=1000).map(|time| time * 1000).collect(), ..Outcome::default() };
        assert_eq!([500, 990, 999, 1000].map(|of| outcome.time(of)), [500.0, 990.0, 999.0, 1000.0]);
    }
}
