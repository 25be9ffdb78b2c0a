//! `bench-dataplane`: measures how many frames back-ends move, how much processor time the frames cost, and how long
//! they take.
#![expect(unsafe_code, reason = "takes ownership of an inherited descriptor")]

use std::fs;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use baton_tests::bench::cell::leave_processor;
use baton_tests::bench::dataplane::peer::Peer;
use baton_tests::bench::dataplane::run::{self, Settings};
use baton_tests::bench::dataplane::{bare, load, plot, report, scenario};
use baton_tests::bench::page::{self, Machine};
use clap::{Parser, Subcommand};

/// How often each cell is measured.
const ROUNDS: usize = 5;
/// The duration of each measurement in milliseconds.
const MILLISECONDS: u64 = 1000;
/// The duration in a quick run, which only shows that the benchmark works.
const QUICK: u64 = 50;

/// Measure how many frames back-ends move, how much processor time the frames cost, and how long they take
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Run a little of everything, to check that the benchmark works
    #[arg(long)]
    quick: bool,
    /// Directory of performance.md, dataplane.svg, dataplane-latency.svg and dataplane.json
    #[arg(long, default_value = "docs")]
    output: PathBuf,
    /// Another back-end to compare with: `NAME: PROGRAM ARGUMENT…`, with {sock}, {tap} and {pairs} among the arguments
    #[arg(long, value_name = "PEER", value_delimiter = ';')]
    peer: Vec<Peer>,
    /// Measure only back-ends whose name contains TEXT, and write no files
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Measure only scenarios whose name contains TEXT, and write no files
    #[arg(long, value_name = "TEXT")]
    scenario: Vec<String>,
    /// Number of rounds
    #[arg(long)]
    rounds: Option<usize>,
    /// Duration of each measurement in milliseconds
    #[arg(long)]
    milliseconds: Option<u64>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate the load
    #[command(hide = true)]
    Load {
        /// The descriptor to write the result to
        #[arg(long)]
        output: RawFd,
        #[command(flatten)]
        arguments: load::Arguments,
    },
    /// Move frames on a TAP without virtio
    #[command(hide = true)]
    Bare(bare::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Load { output, arguments }) => {
            // SAFETY: the parent process passed this descriptor, and nothing else here owns it.
            load::run(arguments, unsafe { OwnedFd::from_raw_fd(*output) })
        }
        Some(Command::Bare(arguments)) => bare::run(arguments),
        None => measure(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-dataplane: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let machine = Machine::this()?;
    let contained = |parts: &[String], name: &str| {
        parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()))
    };
    let mut peers = Peer::standard()?;
    peers.extend(arguments.peer.iter().cloned());
    peers.retain(|peer| contained(&arguments.only, &peer.name));
    let mut scenarios = scenario::ALL.to_vec();
    scenarios.retain(|scenario| contained(&arguments.scenario, &scenario.name()));
    ensure!(!peers.is_empty() && !scenarios.is_empty(), "nothing to measure");
    let settings = Settings {
        rounds: arguments.rounds.unwrap_or(if arguments.quick { 1 } else { ROUNDS }),
        milliseconds: arguments.milliseconds.unwrap_or(if arguments.quick { QUICK } else { MILLISECONDS }),
        pinned: !arguments.quick,
    };
    if settings.pinned {
        leave_processor()?;
    }
    let say = |text: &str| Ok(writeln!(io::stderr().lock(), "{text}")?);
    let cells = run::run(&scenarios, &peers, settings, say)?;
    let plots = ["dataplane.svg", "dataplane-latency.svg"];
    let text = report::text(&machine, &cells, settings.rounds, settings.milliseconds, &plots);
    writeln!(io::stdout().lock(), "{text}")?;
    if !arguments.only.is_empty() || !arguments.scenario.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(&arguments.output)?;
    plot::bars(&arguments.output.join(plots[0]), &cells)?;
    plot::times(&arguments.output.join(plots[1]), &cells)?;
    // The file keeps quantiles, not the time of each frame.
    let cells = cells.into_iter().map(|cell| serde_json::to_string(&cell.summarised()));
    let cells = cells.collect::<Result<Vec<_>, _>>()?.join(",\n");
    fs::write(arguments.output.join("dataplane.json"), format!("[\n{cells}\n]\n"))?;
    page::update(&arguments.output.join("performance.md"), &text)
}
