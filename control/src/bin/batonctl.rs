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

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// What the process is and does.
    Status,
    /// A back-end's counters.
    Stats,
    /// Stop a VM's vCPUs.
    Pause,
    /// Let a paused VM run.
    Resume,
    /// Hand a back-end's device over to another one that waits with --incoming-fds.
    Handover {
        /// The other one's --incoming-fds.
        #[arg(required_unless_present = "cancel", conflicts_with = "cancel")]
        path: Option<String>,
        /// When the front-end has stopped the device; say so before the VM migrates.
        #[arg(long, conflicts_with = "cancel")]
        on_suspend: bool,
        /// Only find out whether the other one would take it.
        #[arg(long, conflicts_with = "cancel")]
        dry_run: bool,
        /// End the hand-over that is under way: the device stays.
        #[arg(long)]
        cancel: bool,
    },
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
            Command::Handover { path, on_suspend, dry_run, cancel } => Self::Handover {
                // The back-end need not be in this directory.
                path: path.map(|path| match std::path::absolute(&path) {
                    Ok(absolute) => absolute.to_string_lossy().into_owned(),
                    Err(_) => path,
                }),
                on_suspend,
                dry_run,
                cancel,
            },
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
    let reply = ControlClient::connect(&arguments.control_socket)?.call(&arguments.command.clone().into())?;
    let text = if arguments.json { format!("{reply}\n") } else { listing(&reply) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the reply")
}
