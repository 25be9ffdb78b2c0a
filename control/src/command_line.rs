//! The command line of `batonctl`.

use std::path::PathBuf;

use baton_protocol::control::Request;
use clap::{Parser, Subcommand};

/// Exit status and examples, for `--help`.
const AFTER_HELP: &str = "\
Exit status:
  0  Success
  1  Failed; one line on stderr, or the printed result, says why
  2  Invalid command line

Examples:
  Show the state of a back-end:
    batonctl /run/vm1/backend.ctl status

  Replace a back-end while its guest runs:
    baton-backend --incoming-fds=/run/vm1/next.sock --control-socket=/run/vm1/backend.ctl &
    batonctl /run/vm1/backend.ctl handover /run/vm1/next.sock

  Migrate a VM with its TAPs to the VMM that runs with --incoming=/run/vm1/vm-b.sock:
    batonctl /run/vm1/vmm-a.ctl migrate /run/vm1/vm-b.sock --local";

/// Control a running baton-backend or baton-vmm
///
/// Sends one command to the process that listens on SOCKET, waits for the reply, and prints it.
/// Use "batonctl help COMMAND" for the details and options of a command.
#[derive(Debug, Parser)]
#[command(name = "batonctl", version, max_term_width = 100, verbatim_doc_comment, after_long_help = AFTER_HELP)]
pub struct Arguments {
    /// Print the reply as one line of JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// The control socket of the process (its --control-socket)
    #[arg(value_name = "SOCKET")]
    pub control_socket: PathBuf,
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// A command, which becomes a [`Request`].
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the state of a back-end or VMM
    Status,
    /// Show the counters of a back-end
    ///
    /// Counts frames, bytes, dropped and discarded frames, and notifications for each queue pair and
    /// direction. A back-end with --vhost counts only discarded frames: the kernel moves the others.
    #[command(verbatim_doc_comment)]
    Stats,
    /// Pause a VM
    Pause,
    /// Resume a paused VM
    Resume,
    /// Hand over a back-end's session or device to another back-end
    ///
    /// Without --on-suspend, hands over the running session. The front-end stays connected and does
    /// not notice. Waits until the hand-over completes, and prints how long the rings were stopped;
    /// this back-end then ends. If the hand-over fails, it is rolled back: prints the reason, and
    /// this back-end continues to serve the front-end.
    #[command(verbatim_doc_comment)]
    Handover {
        /// The socket on which the other back-end waits (its --incoming-fds); not with --cancel
        #[arg(required_unless_present = "cancel", conflicts_with = "cancel")]
        path: Option<String>,
        /// Hand over only the device, when the front-end stops all rings
        ///
        /// For a VM that moves to another VMM on this host: run this before the migration. Returns
        /// as soon as the other back-end has accepted. The other back-end takes the device when its
        /// own front-end starts a ring.
        #[arg(long, conflicts_with = "cancel", verbatim_doc_comment)]
        on_suspend: bool,
        /// Only check whether the other back-end would accept, and print every reason if not
        #[arg(long, conflicts_with = "cancel")]
        dry_run: bool,
        /// Cancel the hand-over in progress
        ///
        /// This back-end keeps the session or the device. Fails if the other back-end has already
        /// taken it.
        #[arg(long, verbatim_doc_comment)]
        cancel: bool,
    },
    /// Migrate a VM to another baton-vmm on this host
    ///
    /// Waits until the migration completes, and prints how long the VM was stopped. This baton-vmm
    /// then no longer runs the VM; end it with "quit". If the migration fails, prints the reason, and
    /// the VM continues to run here.
    #[command(verbatim_doc_comment)]
    Migrate {
        /// The socket on which the other baton-vmm waits (its --incoming)
        path: PathBuf,
        /// Also hand over the TAPs of devices with local-migration=on
        #[arg(long)]
        local: bool,
        /// Only check whether the VM could be migrated, and print every reason if not
        #[arg(long)]
        dry_run: bool,
    },
    /// End the process
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
                // The back-end may run in another working directory.
                path: path.map(|path| match std::path::absolute(&path) {
                    Ok(absolute) => absolute.to_string_lossy().into_owned(),
                    Err(_) => path,
                }),
                on_suspend,
                dry_run,
                cancel,
            },
            Command::Migrate { path, local, dry_run } => {
                // The VMM may run in another working directory.
                let path = std::path::absolute(&path).unwrap_or(path);
                Self::Migrate { path, local, dry_run }
            }
            Command::Quit => Self::Quit,
        }
    }
}
