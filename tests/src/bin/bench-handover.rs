//! `bench-handover`: how long the network stands still while a session is handed over under load, by the number of queue
//! pairs, the guest's memory and the load; and whether a thousand hand-overs in a row lose anything.
#![expect(unsafe_code, reason = "takes a descriptor that it was started with")]

use std::fs;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use baton_tests::bench::cell::{Bench, Cell, Measured, leave_processor};
use baton_tests::bench::page::{self, Machine};
use baton_tests::bench::row::{self, Row};
use baton_tests::bench::{driver, plot};
use clap::{Parser, Subcommand};

/// What is varied, one thing at a time; of several queue pairs one is busy, or all are.
const BASE: Cell = Cell { pairs: 1, busy: 1, memory: 1024, rate: 50_000 };
const PAIRS: [u16; 3] = [4, 16, 64];
const MEMORY: [u64; 2] = [128, 8192];
const RATES: [u32; 2] = [10_000, 100_000];

/// Hand-overs in a cell.
const HANDOVERS: usize = 200;
/// Hand-overs in a row.
const IN_A_ROW: usize = 1000;
/// Each cell is measured this many times, all others in between.
const ROUNDS: usize = 2;

/// How much less of all a quick run does: it shows that all works, and measures nothing.
const QUICK: u32 = 20;

/// Measure how long the network stands still while a session is handed over under load
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// A little of everything, to see that it works
    #[arg(long)]
    quick: bool,
    /// Where handover-blackout.md and handover-blackout.svg are
    #[arg(long, default_value = "docs")]
    output: PathBuf,
    /// Measure only this, and write nothing: queue pairs, how many of them have frames, MiB of guest memory, thousand
    /// frames a second each way
    #[arg(long, value_name = "PAIRS,BUSY,MIB,KPPS")]
    cell: Vec<CellArgument>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the load
    #[command(hide = true)]
    Drive {
        /// Where orders come from
        #[arg(long)]
        line: RawFd,
        #[command(flatten)]
        arguments: driver::Arguments,
    },
}

/// A cell on the command line.
#[derive(Clone, Copy, Debug)]
struct CellArgument(Cell);

impl FromStr for CellArgument {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let mut next = || parts.next().context("four numbers: PAIRS,BUSY,MIB,KPPS");
        let (pairs, busy) = (next()?.parse()?, next()?.parse()?);
        let (memory, rate) = (next()?.parse()?, next()?.parse::<u32>()?);
        ensure!((1..=pairs).contains(&busy), "from 1 to {pairs} queue pairs have frames");
        Ok(Self(Cell { pairs, busy, memory, rate: rate.saturating_mul(1000) }))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Drive { line, arguments }) => {
            // SAFETY: whoever started this process has given it the descriptor.
            driver::run(arguments, unsafe { OwnedFd::from_raw_fd(*line) }).map(|()| true)
        }
        None => measure(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("bench-handover: frames did not arrive as they should, or something has grown");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench-handover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was lost.
fn measure(arguments: &Arguments) -> Result<bool> {
    let machine = Machine::this()?;
    if !arguments.quick {
        leave_processor()?;
    }
    if !arguments.cell.is_empty() {
        let cells = sweep(arguments.cell.iter().map(|CellArgument(cell)| *cell), arguments.quick)?;
        return report(&machine, &cells, None);
    }
    let pairs = PAIRS.map(|pairs| Cell { pairs, ..BASE });
    let busy = PAIRS.map(|pairs| Cell { pairs, busy: pairs, ..BASE });
    let memory = MEMORY.map(|memory| Cell { memory, ..BASE });
    let rates = RATES.map(|rate| Cell { rate, ..BASE });
    let cells = [BASE].into_iter().chain(pairs).chain(busy).chain(memory).chain(rates);
    let cells = sweep(cells, arguments.quick)?;
    say("hand-overs in a row")?;
    let row = row::run(quickened(BASE, arguments.quick), less(IN_A_ROW, arguments.quick), arguments.quick)?;
    let clean = report(&machine, &cells, Some(&row))?;

    let svg = "handover-blackout.svg";
    fs::create_dir_all(&arguments.output)?;
    plot::draw(&arguments.output.join(svg), quickened(BASE, arguments.quick), &cells)?;
    let text = page::text(&machine, &cells, Some(&row), svg);
    page::update(&arguments.output.join("handover-blackout.md"), &text)?;
    Ok(clean)
}

/// Measures all cells in turn, and once more in the opposite order.
fn sweep(cells: impl IntoIterator<Item = Cell>, quick: bool) -> Result<Vec<Measured>> {
    let cells = cells.into_iter().map(|cell| quickened(cell, quick));
    let mut measured: Vec<_> = cells.map(Measured::nothing).collect();
    for round in 0..ROUNDS {
        measured.reverse();
        for measured in &mut measured {
            let cell = measured.cell;
            say(&format!(
                "{} pairs ({} with frames), {} MiB, {} frames/s: round {}",
                cell.pairs,
                cell.busy,
                cell.memory,
                cell.rate,
                round + 1
            ))?;
            let mut bench = Bench::new(cell, quick)?;
            bench.measure(measured, less(HANDOVERS, quick) / ROUNDS)?;
        }
    }
    Ok(measured)
}

fn report(machine: &Machine, cells: &[Measured], row: Option<&Row>) -> Result<bool> {
    writeln!(io::stdout().lock(), "{}", page::text(machine, cells, row, "handover-blackout.svg"))?;
    Ok(cells.iter().all(|measured| measured.count.is_clean()) && row.is_none_or(Row::is_clean))
}

fn quickened(cell: Cell, quick: bool) -> Cell {
    if quick { Cell { rate: cell.rate / QUICK, ..cell } } else { cell }
}

fn less(count: usize, quick: bool) -> usize {
    if quick { (count / 50).max(ROUNDS) } else { count }
}

fn say(text: &str) -> Result<()> {
    Ok(writeln!(io::stderr().lock(), "{text}")?)
}
