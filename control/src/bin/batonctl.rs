//! `batonctl`: sends a request to a running back-end or VMM over its control socket.
//!
//! Exit codes: 0 success, 1 failure (one line on stderr says why), 2 wrong usage.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use baton_control::{ControlClient, listing::listing};
use baton_protocol::control::Request;
use clap::{Parser, Subcommand};

/// Sends a request to a running baton-backend or baton-vmm over its control socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Print the reply as one line of JSON.
    #[arg(long)]
    json: bool,
    /// The path given to the process as --control-socket.
    control_socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Show the state of the process.
    Status,
    /// Show a back-end's counters.
    Stats,
    /// Pause a VM.
    Pause,
    /// Resume a paused VM.
    Resume,
    /// Hand a back-end's session over to another back-end; the front-end does not notice.
    Handover {
        /// The path given to the other back-end as --incoming-fds.
        #[arg(required_unless_present = "cancel", conflicts_with = "cancel")]
        path: Option<String>,
        /// Hand over only the device, once the front-end has suspended it; ask for this before the VM migrates.
        #[arg(long, conflicts_with = "cancel")]
        on_suspend: bool,
        /// Only report whether the other back-end would accept it.
        #[arg(long, conflicts_with = "cancel")]
        dry_run: bool,
        /// Cancel the hand-over in progress; this back-end keeps the session.
        #[arg(long)]
        cancel: bool,
    },
    /// Migrate a VM to another baton-vmm on this host.
    Migrate {
        /// The path given to the other baton-vmm as --incoming.
        path: PathBuf,
        /// Also hand over the TAPs of devices with local-migration=on.
        #[arg(long)]
        local: bool,
        /// Only report whether the VM could be migrated, and if not, why.
        #[arg(long)]
        dry_run: bool,
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
                // The back-end may have another working directory.
                path: path.map(|path| match std::path::absolute(&path) {
                    Ok(absolute) => absolute.to_string_lossy().into_owned(),
                    Err(_) => path,
                }),
                on_suspend,
                dry_run,
                cancel,
            },
            Command::Migrate { path, local, dry_run } => {
                // The other process may have another working directory.
                let path = std::path::absolute(&path).unwrap_or(path);
                Self::Migrate { path, local, dry_run }
            }
            Command::Quit => Self::Quit,
        }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("batonctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The results of a request that failed after it was accepted.
const NOT_DONE: [&str; 2] = ["rolled-back", "refused"];

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let reply = ControlClient::connect(&arguments.control_socket)?.call(&arguments.command.into())?;
    let text = if arguments.json { format!("{reply}\n") } else { listing(&reply) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the reply")?;
    let result = reply.get("result").and_then(serde_json::Value::as_str);
    let not_done = result.is_some_and(|result| NOT_DONE.contains(&result));
    Ok(if not_done { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
