//! `bench-handover`: how long the network stands still while a session is handed over under load.
#![expect(unsafe_code, reason = "takes a descriptor that it was started with")]

use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result};
use baton_tests::bench::cell::{Bench, Cell, PHASES, leave_processor};
use baton_tests::bench::driver;
use baton_tests::bench::numbers::Quantiles;
use clap::{Parser, Subcommand};

/// Measure how long the network stands still while a session is handed over under load
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Measure only this and write nothing: queue pairs, MiB of guest memory, thousand frames a second each way
    #[arg(long, value_name = "PAIRS,MIB,KPPS")]
    cell: Vec<CellArgument>,
    /// Hand-overs in a cell
    #[arg(long, default_value_t = 200)]
    handovers: usize,
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
        let mut next = || parts.next().context("three numbers: PAIRS,MIB,KPPS");
        let (pairs, memory, rate) = (next()?.parse()?, next()?.parse()?, next()?.parse::<u32>()? * 1000);
        Ok(Self(Cell { pairs, memory, rate }))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Drive { line, arguments }) => {
            // SAFETY: whoever started this process has given it the descriptor.
            driver::run(arguments, unsafe { OwnedFd::from_raw_fd(*line) })
        }
        None => measure(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-handover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    leave_processor()?;
    for CellArgument(cell) in &arguments.cell {
        let mut bench = Bench::new(*cell)?;
        let measured = bench.measure(*cell, arguments.handovers)?;
        let [gap, delay] = measured.excess();
        let mut out = io::stdout().lock();
        let all = |values: &[i64]| Quantiles::of(values.iter().copied());
        writeln!(out, "{cell:?}: excess gap {gap}, delay {delay}")?;
        writeln!(out, "  gap {} control {}", all(&measured.gaps), all(&measured.control_gaps))?;
        writeln!(out, "  delay {} control {}", all(&measured.delays), all(&measured.control_delays))?;
        writeln!(out, "  blackout {}", all(&measured.blackouts))?;
        for (name, phase) in PHASES.iter().zip(&measured.phases) {
            writeln!(out, "    {name} {}", all(phase))?;
        }
        writeln!(out, "  {:?}", measured.count)?;
    }
    Ok(())
}
