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
    /// Make a VM stand still.
    Pause,
    /// Let a VM that stands still run on.
    Resume,
    /// Hand a back-end's session over to another one, which serves on: its front-end does not notice.
    Handover {
        /// The other one's --incoming-fds.
        #[arg(required_unless_present = "cancel", conflicts_with = "cancel")]
        path: Option<String>,
        /// Only the device, once the front-end has stopped it; say so before the VM goes to another VMM.
        #[arg(long, conflicts_with = "cancel")]
        on_suspend: bool,
        /// Only find out whether the other one would take it.
        #[arg(long, conflicts_with = "cancel")]
        dry_run: bool,
        /// End the hand-over that is under way: all stays as it is.
        #[arg(long)]
        cancel: bool,
    },
    /// Move a VM to the baton-vmm on this host that waits for it.
    Migrate {
        /// The path that it was given as --incoming.
        path: PathBuf,
        /// Hand the TAPs over, too, of the devices with local-migration=on.
        #[arg(long)]
        local: bool,
        /// Only say whether it could be done, and if not, why.
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
                // The back-end need not be in this directory.
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

/// The results of what was tried and not done.
const NOT_DONE: [&str; 2] = ["rolled-back", "refused"];

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let reply = ControlClient::connect(&arguments.control_socket)?.call(&arguments.command.into())?;
    let text = if arguments.json { format!("{reply}\n") } else { listing(&reply) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the reply")?;
    let result = reply.get("result").and_then(serde_json::Value::as_str);
    let not_done = result.is_some_and(|result| NOT_DONE.contains(&result));
    Ok(if not_done { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
