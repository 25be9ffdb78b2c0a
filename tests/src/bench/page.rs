//! Writes the measured part of `docs/handover-blackout.md`: the tables between two marks.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::cell::{Cell, Measured, PHASES};
use super::message::Count;
use super::numbers::Quantiles;
use super::row::Row;

/// The mark at the start of the measured part.
const BEGIN: &str = "<!-- measured: what follows is written by make bench -->\n";
/// The mark at its end.
const END: &str = "<!-- /measured -->\n";

/// The machine, as the page describes it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The number and model of its processors.
    pub processors: String,
    /// The kernel release.
    pub kernel: String,
    /// The one-minute load average before the benchmark.
    pub load: String,
}

impl Machine {
    /// Describes this machine.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be read.
    pub fn this() -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let models = info.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let models: Vec<_> = models.map(|(_, model)| model).collect();
        let processors = format!("{} × {}", models.len(), models.first().unwrap_or(&"?"));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let load = fs::read_to_string("/proc/loadavg")?;
        let load = load.split_whitespace().next().context("no load average")?.to_owned();
        Ok(Self { processors, kernel, load })
    }
}

/// Formats the measured part as Markdown.
pub fn text(machine: &Machine, cells: &[Measured], row: Option<&Row>, plot: &str) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
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
    writeln!(
        text,
        "Measured on {processors}, Linux {kernel}, at a load average of {load} before the start. Each row of the"
    )?;
    writeln!(
        text,
        "tables covers {handovers} hand-overs and as many control intervals. Times are p50 / p99 / max in µs.\n"
    )?;
    writeln!(text, "![Blackout and excess gap by queue pairs, memory and rate]({plot})\n")?;
    writeln!(
        text,
        "| queue pairs | busy | memory | kpps each way | reported blackout | gap | gap, control | delay | delay, control | frames | lost / duplicated / reordered |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|---|---|---|")?;
    for measured in cells {
        let Measured { blackouts, gaps, control_gaps, delays, control_delays, .. } = measured;
        let times = [blackouts, gaps, control_gaps, delays, control_delays]
            .map(|values| Quantiles::of(values.iter().copied()).to_string())
            .join(" | ");
        let (name, sent, fate) = (name(measured), measured.count.sent, fate(&measured.count));
        writeln!(text, "| {name} | {times} | {sent} | {fate} |")?;
    }
    write_slopes(text, cells)?;
    writeln!(text, "\nThe phases of the blackout:\n")?;
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

/// Writes how the median blackout depends on the queue pairs and on the memory, if these were varied.
fn write_slopes(text: &mut String, cells: &[Measured]) -> std::fmt::Result {
    let Some(Measured { cell: base, .. }) = cells.first() else { return Ok(()) };
    let median = |measured: &Measured| Quantiles::of(measured.blackouts.iter().copied()).p50;
    let medians = |moved: fn(Cell, Cell) -> Cell| {
        let cells = cells.iter().filter(move |other| moved(*base, other.cell) == other.cell);
        cells.map(|measured| (measured.cell, median(measured)))
    };
    type Axis = (&'static str, fn(Cell, Cell) -> Cell);
    const PAIRS: [Axis; 2] = [
        ("busy", |base, Cell { pairs, .. }| Cell { pairs, busy: pairs, ..base }),
        ("idle", |base, Cell { pairs, .. }| Cell { pairs, ..base }),
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
            "\nThe median blackout grows by {sign}{}.{} µs per additional {what} queue pair, up to {} queue pairs.",
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
            "\nThe median blackout is {low} to {high} µs with {least} to {largest} MiB of guest memory, otherwise as in the first row."
        )?;
    }
    Ok(())
}

fn write_row(text: &mut String, row: &Row) -> std::fmt::Result {
    let Row { limit, rate, handovers, with, control, before, after, given_up } = row;
    write!(
        text,
        "\n{handovers} consecutive hand-overs at 80 % of {limit} frames a second each way, the highest rate that this machine sustains without drops"
    )?;
    if !given_up.is_empty() {
        let given_up: Vec<_> = given_up.iter().map(u32::to_string).collect();
        write!(text, " (rejected, because the control failed at 80 %: {})", given_up.join(", "))?;
    }
    writeln!(text, ":\n")?;
    writeln!(
        text,
        "| | frames | frames a second each way | lost / duplicated / reordered | front-end's socket |"
    )?;
    writeln!(text, "|---|---|---|---|---|")?;
    for (name, count) in [("hand-overs", with), ("control: back-ends started and ended only", control)] {
        let socket = if count.quiet { "silent" } else { "an event" };
        writeln!(text, "| {name} | {} | {rate} | {} | {socket} |", count.sent, fate(count))?;
    }
    writeln!(
        text,
        "\nThe back-end early in this run, and at its end: {} and {} KiB of anonymous memory, {} and {} descriptors, {} and {} threads.",
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

/// Replaces the measured part of the page at `path`. Creates a page with only this part if there is none.
///
/// # Errors
/// Returns an error if the page cannot be read or written, or has no marks.
pub fn update(path: &Path, measured: &str) -> Result<()> {
    let page = if path.exists() { fs::read_to_string(path)? } else { format!("{BEGIN}{END}") };
    let page = replaced(&page, measured)
        .with_context(|| format!("{} has no marks for the measured part", path.display()))?;
    fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
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
    fn only_the_text_between_the_marks_is_replaced() {
        let page = format!("# Title\n{BEGIN}old\n{END}The end.\n");
        assert_eq!(replaced(&page, "new\n"), Some(format!("# Title\n{BEGIN}new\n{END}The end.\n")));
        assert_eq!(replaced("# Title\n", "new\n"), None);
    }
}
