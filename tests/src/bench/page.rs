//! The measured part of the documentation's page: tables between two marks.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::cell::{Cell, Measured, PHASES};
use super::message::Count;
use super::numbers::Quantiles;
use super::row::Row;

/// Where the measured part begins in the page.
const BEGIN: &str = "<!-- measured: what follows is written by make bench -->\n";
/// Where it ends.
const END: &str = "<!-- /measured -->\n";

/// What the page calls the machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its processors.
    pub processors: String,
    /// Its kernel.
    pub kernel: String,
    /// The processes that were ready to run when it began, on average.
    pub load: String,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    /// The system's.
    pub fn this() -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let models = info.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let models: Vec<_> = models.map(|(_, model)| model).collect();
        let processors = format!("{} × {}", models.len(), models.first().unwrap_or(&"?"));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let load = fs::read_to_string("/proc/loadavg")?;
        let load = load.split_whitespace().next().context("no load")?.to_owned();
        Ok(Self { processors, kernel, load })
    }
}

/// The measured part, in Markdown.
pub fn text(machine: &Machine, cells: &[Measured], row: Option<&Row>, plot: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut text, machine, cells, row, plot);
    text
}

fn write(
    text: &mut String,
    machine: &Machine,
    cells: &[Measured],
    row: Option<&Row>,
    plot: &str,
) -> std::fmt::Result {
    let Machine { processors, kernel, load } = machine;
    let handovers = cells.first().map_or(0, |cell| cell.blackouts.len());
    writeln!(text, "Measured on {processors}, Linux {kernel}, load {load} before it began; {handovers}")?;
    writeln!(text, "hand-overs a line, and as many intervals without. Times in µs: p50 / p99 / max.\n")?;
    writeln!(text, "![Blackout and gap by queue pairs, memory and rate]({plot})\n")?;
    writeln!(
        text,
        "| queue pairs | busy | memory | kpps each way | gap, excess | slowest frame, excess | blackout as reported | frames | lost / doubled / reordered |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|---|")?;
    for measured in cells {
        let [gap, delay] = measured.excess();
        let blackout = Quantiles::of(measured.blackouts.iter().copied());
        let Count { sent, .. } = measured.count;
        let fate = fate(&measured.count);
        writeln!(text, "| {} | {gap} | {delay} | {blackout} | {sent} | {fate} |", name(measured))?;
    }
    write_slopes(text, cells)?;
    writeln!(text, "\nWhat the gaps are made of, with and without a hand-over:\n")?;
    writeln!(
        text,
        "| queue pairs | busy | memory | kpps each way | gap with | gap without | slowest with | slowest without |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|")?;
    for measured in cells {
        let Measured { gaps, control_gaps, delays, control_delays, .. } = measured;
        let [gaps, control_gaps, delays, control_delays] =
            [gaps, control_gaps, delays, control_delays].map(|values| Quantiles::of(values.iter().copied()));
        let name = name(measured);
        writeln!(text, "| {name} | {gaps} | {control_gaps} | {delays} | {control_delays} |")?;
    }
    writeln!(text, "\nThe blackout by phase:\n")?;
    writeln!(text, "| queue pairs | busy | memory | kpps each way | {} |", PHASES.join(" | "))?;
    writeln!(text, "|---|---|---|---|{}", "---|".repeat(PHASES.len()))?;
    for measured in cells {
        let phases = measured.phases.each_ref().map(|phase| Quantiles::of(phase.iter().copied()).to_string());
        writeln!(text, "| {} | {} |", name(measured), phases.join(" | "))?;
    }
    if let Some(row) = row {
        write_row(text, row)?;
    }
    Ok(())
}

/// What the blackout's median does along the axes of pairs and memory, if they were measured.
fn write_slopes(text: &mut String, cells: &[Measured]) -> std::fmt::Result {
    let Some(Measured { cell: base, .. }) = cells.first() else { return Ok(()) };
    let median = |measured: &Measured| Quantiles::of(measured.blackouts.iter().copied()).p50;
    let medians = |moved: fn(Cell, Cell) -> Cell| {
        let cells = cells.iter().filter(move |other| moved(*base, other.cell) == other.cell);
        cells.map(|measured| (measured.cell, median(measured)))
    };
    type Axis = (&'static str, fn(Cell, Cell) -> Cell);
    const PAIRS: [Axis; 2] = [
        ("with frames", |base, Cell { pairs, .. }| Cell { pairs, busy: pairs, ..base }),
        ("without", |base, Cell { pairs, .. }| Cell { pairs, ..base }),
    ];
    for (what, moved) in PAIRS {
        let cells = || medians(moved);
        let (Some((fewest, low)), Some((most, high))) =
            (cells().min_by_key(|(cell, _)| cell.pairs), cells().max_by_key(|(cell, _)| cell.pairs))
        else {
            continue;
        };
        if fewest.pairs == most.pairs {
            continue;
        }
        let tenths = (high - low) * 10 / i64::from(most.pairs - fewest.pairs);
        let (sign, tenths) = (if tenths < 0 { "-" } else { "" }, tenths.abs());
        writeln!(
            text,
            "\nThe blackout's median grows by {sign}{}.{} µs for each further queue pair {what}, up to {}.",
            tenths / 10,
            tenths % 10,
            most.pairs
        )?;
    }
    let cells = || medians(|base, Cell { memory, .. }| Cell { memory, ..base });
    let (memory, values) = (|| cells().map(|(cell, _)| cell.memory), || cells().map(|(_, value)| value));
    if let (Some(least), Some(largest), Some(low), Some(high)) =
        (memory().min(), memory().max(), values().min(), values().max())
        && least < largest
    {
        writeln!(
            text,
            "\nIt is {low} to {high} µs from {least} to {largest} MiB, with pairs as in the first line."
        )?;
    }
    Ok(())
}

fn write_row(text: &mut String, row: &Row) -> std::fmt::Result {
    let Row { limit, rate, handovers, with, control, before, after, given_up } = row;
    write!(
        text,
        "\n{handovers} hand-overs in a row, at 0.8 of the {limit} frames a second each way that this machine bears without a drop"
    )?;
    if !given_up.is_empty() {
        let given_up: Vec<_> = given_up.iter().map(u32::to_string).collect();
        write!(text, " (not of {}: at 0.8 of that not even the control was clean)", given_up.join(", "))?;
    }
    writeln!(text, ":\n")?;
    writeln!(text, "| | frames | a second each way | lost / doubled / reordered | the front-end's socket |")?;
    writeln!(text, "|---|---|---|---|---|")?;
    for (name, count) in [("with hand-overs", with), ("control: back-ends started and ended", control)] {
        let socket = if count.quiet { "silent" } else { "an event" };
        writeln!(text, "| {name} | {} | {rate} | {} | {socket} |", count.sent, fate(count))?;
    }
    writeln!(
        text,
        "\nThe back-end after the first of them, and after the last: {} and {} KiB of its own, {} and {} descriptors, {} and {} threads.",
        before.memory, after.memory, before.fds, after.fds, before.threads, after.threads
    )
}

fn name(measured: &Measured) -> String {
    let cell = measured.cell;
    let memory = if cell.memory < 1024 {
        format!("{} MiB", cell.memory)
    } else {
        format!("{} GiB", cell.memory / 1024)
    };
    format!("{} | {} | {memory} | {}", cell.pairs, cell.busy, f64::from(cell.rate) / 1000.0)
}

fn fate(count: &Count) -> String {
    format!("{} / {} / {}", count.lost, count.doubled, count.reordered)
}

/// Puts the measured part into the page at `path`: between its marks, or into a page of its own where there is none.
///
/// # Errors
/// If it cannot be written, or has no marks.
pub fn update(path: &Path, measured: &str) -> Result<()> {
    let page = if path.exists() { fs::read_to_string(path)? } else { format!("{BEGIN}{END}") };
    let page =
        replaced(&page, measured).with_context(|| format!("{}: its marks are gone", path.display()))?;
    fs::write(path, page).with_context(|| format!("write {}", path.display()))
}

fn replaced(page: &str, measured: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{measured}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let page = format!("# Title\n{BEGIN}old\n{END}The end.\n");
        assert_eq!(replaced(&page, "new\n"), Some(format!("# Title\n{BEGIN}new\n{END}The end.\n")));
        assert_eq!(replaced("# Title\n", "new\n"), None);
    }
}
