//! `batonctl`: asks a running back-end or VMM something over its control socket.
//!
//! Exit codes: 0 done, 1 not done (one line on stderr says why), 2 usage.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use baton_control::{ControlClient, listing::listing};
use baton_protocol::control::Request;
use clap::{Parser, Subcommand};

/// Asks a running baton-backend or baton-vmm something over its control socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Print the reply as it came, as one line of JSON.
    #[arg(long)]
    json: bool,
    /// The path that the process was given as --control-socket.
    control_socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Command {
    /// What the process is and does.
    Status,
    /// A back-end's counters.
    Stats,
    /// Stop a VM's vCPUs.
    Pause,
    /// Let a paused VM run.
    Resume,
    /// End the process.
    Quit,
}

impl From<Command> for Request {
    fn from(command: Command) -> Self {
        match command {
            Command::Status => Self::Status,
            Command::Stats => Self::Stats,
            Command::Pause => Self::Pause,
            Command::Resume => Self::Resume,
            Command::Quit => Self::Quit,
        }
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batonctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let reply = ControlClient::connect(&arguments.control_socket)?.call(&arguments.command.into())?;
    let text = if arguments.json { format!("{reply}\n") } else { listing(&reply) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the reply")
}
