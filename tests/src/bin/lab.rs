//! `lab`: starts the lab for the tests, or runs a program in the lab.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::parent_id;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use baton_tests::images;
use baton_tests::lab::{self, Job, Outcome, Place, Running};
use clap::{Parser, Subcommand};

/// Start the lab for the tests, or run a program in the lab
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prepare a run of nextest, as its set-up script: start the lab if this machine needs it
    Up,
    /// Run a program as root in a new lab
    Run {
        /// Path of the program
        program: PathBuf,
        /// Arguments of the program
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the supervisor of the lab
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        owner: u32,
        #[arg(long)]
        number: usize,
        #[arg(long)]
        folder: PathBuf,
    },
    /// Run the first process of the lab's machine
    #[command(hide = true)]
    Agent,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Up => up(),
        Command::Run { program, arguments } => run(program, arguments),
        Command::Supervise { owner, number, folder } => {
            lab::supervise(owner, number, &folder).map(|()| ExitCode::SUCCESS)
        }
        Command::Agent => lab::agent().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lab: {error:#}");
        ExitCode::FAILURE
    })
}

/// Prepares a run of nextest. Passes variables to the tests through the file that nextest names in `NEXTEST_ENV`.
fn up() -> Result<ExitCode> {
    let place = Place::prepare(parent_id())?;
    let path = env::var_os("NEXTEST_ENV")
        .context("NEXTEST_ENV is not set: only nextest runs this, see .config/nextest.toml")?;
    let mut file = OpenOptions::new().append(true).open(path).context("cannot write to NEXTEST_ENV")?;
    let initramfs = images::guest_initramfs()?;
    writeln!(file, "{}={place}\n{}={}", lab::PLACE, images::GUEST_INITRAMFS, initramfs.display())
        .context("cannot write to NEXTEST_ENV")?;
    Ok(ExitCode::SUCCESS)
}

fn run(program: PathBuf, arguments: Vec<String>) -> Result<ExitCode> {
    let lab = Running::start(std::process::id(), 0)?;
    match lab.run(&Job::here(program, arguments)?, &mut |_| ())? {
        Outcome::Exited(code) => Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)),
        outcome => {
            eprintln!("lab: {outcome}");
            Ok(ExitCode::FAILURE)
        }
    }
}
