//! `bench-handover`: measures how long the network stops while a session is handed over under load, for different
//! numbers of queue pairs, sizes of guest memory and loads. Also checks that a thousand hand-overs lose nothing.
#![expect(unsafe_code, reason = "takes ownership of an inherited descriptor")]

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

/// The cell from which all others differ in one parameter. With several queue pairs, either one or all are busy.
const BASE: Cell = Cell { pairs: 1, busy: 1, memory: 1024, rate: 50_000 };
const PAIRS: [u16; 3] = [4, 16, 64];
const MEMORY: [u64; 2] = [128, 8192];
const RATES: [u32; 2] = [10_000, 100_000];

/// The number of hand-overs in each cell.
const HANDOVERS: usize = 200;
/// The number of consecutive hand-overs.
const IN_A_ROW: usize = 1000;
/// How often each cell is measured. A round covers all cells.
const ROUNDS: usize = 2;

/// The divisor of the rates in a quick run, which only shows that the benchmark works.
const QUICK: u32 = 20;

/// Measure how long the network stops while a session is handed over under load
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Run a little of everything, to check that the benchmark works
    #[arg(long)]
    quick: bool,
    /// Directory of handover-blackout.md and handover-blackout.svg
    #[arg(long, default_value = "docs")]
    output: PathBuf,
    /// Measure only this cell, and write no files: queue pairs, how many of them carry frames, MiB of guest memory,
    /// thousand frames a second each way
    #[arg(long, value_name = "PAIRS,BUSY,MIB,KPPS")]
    cell: Vec<CellArgument>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate the load
    #[command(hide = true)]
    Drive {
        /// The descriptor of the socket from which commands arrive
        #[arg(long)]
        line: RawFd,
        #[command(flatten)]
        arguments: driver::Arguments,
    },
}

/// A cell given on the command line.
#[derive(Clone, Copy, Debug)]
struct CellArgument(Cell);

impl FromStr for CellArgument {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let mut next = || parts.next().context("expected four numbers: PAIRS,BUSY,MIB,KPPS");
        let (pairs, busy) = (next()?.parse()?, next()?.parse()?);
        let (memory, rate) = (next()?.parse()?, next()?.parse::<u32>()?);
        ensure!((1..=pairs).contains(&busy), "BUSY must be from 1 to {pairs}");
        Ok(Self(Cell { pairs, busy, memory, rate: rate.saturating_mul(1000) }))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Drive { line, arguments }) => {
            // SAFETY: the parent process passed this descriptor, and nothing else here owns it.
            driver::run(arguments, unsafe { OwnedFd::from_raw_fd(*line) }).map(|()| true)
        }
        None => measure(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!(
                "bench-handover: frames were lost, duplicated or reordered, or a process leaks resources"
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench-handover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the benchmark. Returns whether all frames arrived as required and no process leaks resources.
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
    say("consecutive hand-overs")?;
    let row = row::run(quickened(BASE, arguments.quick), less(IN_A_ROW, arguments.quick), arguments.quick)?;
    let clean = report(&machine, &cells, Some(&row))?;

    let svg = "handover-blackout.svg";
    fs::create_dir_all(&arguments.output)?;
    plot::draw(&arguments.output.join(svg), quickened(BASE, arguments.quick), &cells)?;
    let text = page::text(&machine, &cells, Some(&row), svg);
    page::update(&arguments.output.join("handover-blackout.md"), &text)?;
    Ok(clean)
}

/// Measures all cells in each round, in alternating order.
fn sweep(cells: impl IntoIterator<Item = Cell>, quick: bool) -> Result<Vec<Measured>> {
    let cells = cells.into_iter().map(|cell| quickened(cell, quick));
    let mut measured: Vec<_> = cells.map(Measured::nothing).collect();
    for round in 0..ROUNDS {
        measured.reverse();
        for measured in &mut measured {
            let cell = measured.cell;
            say(&format!(
                "{} queue pairs ({} busy), {} MiB, {} frames/s: round {}",
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
