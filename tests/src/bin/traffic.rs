//! `traffic`: sends and checks network traffic between two machines. Prints one line of JSON; exits with 0 only if
//! all arrived as it should.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use baton_tests::traffic::{self, Direction, bulk, flows, sizes};
use clap::{Parser, Subcommand};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Sends and checks network traffic between two machines.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the other end of the checks, until ended.
    Serve {
        /// Where to listen.
        #[arg(long, default_value = "0.0.0.0:7000")]
        listen: SocketAddr,
        /// Go on in the background as soon as it listens.
        #[arg(long)]
        background: bool,
        /// Listen on standard input, a listening socket.
        #[arg(long, hide = true)]
        inherited: bool,
    },
    /// Much data over TCP, its sum compared.
    Bulk {
        /// Where `traffic serve` listens.
        server: SocketAddr,
        /// Who sends.
        #[arg(long)]
        direction: Direction,
        /// How much each stream carries.
        #[arg(long, default_value_t = 64 << 20)]
        bytes: u64,
        /// How many connections at once.
        #[arg(long, default_value_t = 1)]
        streams: u16,
    },
    /// Numbered datagrams, none of which may be lost, doubled or overtaken in its flow.
    Flows {
        /// Where `traffic serve` listens.
        server: SocketAddr,
        /// Who sends.
        #[arg(long)]
        direction: Direction,
        /// How many over all flows.
        #[arg(long, default_value_t = 10_000)]
        count: u32,
        /// From how many ports.
        #[arg(long, default_value_t = 1)]
        flows: u16,
        /// How many a second.
        #[arg(long, default_value_t = 2_000)]
        rate: u32,
        /// UDP payload in bytes.
        #[arg(long, default_value_t = 64)]
        size: u16,
        /// Seconds without a datagram after which the rest is lost.
        #[arg(long, default_value_t = 30)]
        silence: u16,
    },
    /// No traffic: whether this machine's monotonic clock ever goes back.
    Clock {
        /// Looks at it until there is a file of this name.
        #[arg(long)]
        until: PathBuf,
    },
    /// Datagrams of every size, sent back and compared.
    Sizes {
        /// Where `traffic serve` listens.
        server: SocketAddr,
        /// The smallest UDP payload in bytes: 18 makes an Ethernet frame of 60.
        #[arg(long, default_value_t = 18)]
        from: usize,
        /// The largest: 1472 fill an MTU of 1500.
        #[arg(long, default_value_t = 1472)]
        to: usize,
        /// How much larger each is than the one before it.
        #[arg(long, default_value_t = 1)]
        step: usize,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok((outcome, passed)) => {
            if let Err(error) = writeln!(io::stdout(), "{outcome}") {
                eprintln!("traffic: cannot write the outcome: {error}");
                return ExitCode::FAILURE;
            }
            if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("traffic: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How often the clock is looked at.
const TICK: Duration = Duration::from_millis(2);

/// Looks at the clock until there is such a file. How often it was looked at, and how often it had gone back since.
fn watch_clock(until: &Path) -> Result<(u64, u64)> {
    let now = || clock_gettime(ClockId::CLOCK_MONOTONIC);
    let (mut looks, mut back, mut last) = (0, 0, now()?);
    while !until.exists() {
        let next = now()?;
        back += u64::from(next < last);
        looks += 1;
        last = next;
        thread::sleep(TICK);
    }
    Ok((looks, back))
}

fn run(command: &Command) -> Result<(Value, bool)> {
    match *command {
        Command::Clock { ref until } => {
            let (looks, back) = watch_clock(until)?;
            Ok((json!({"looks": looks, "back": back}), back == 0))
        }
        Command::Serve { inherited: true, .. } => {
            let listener = io::stdin().as_fd().try_clone_to_owned().context("standard input is not open")?;
            traffic::serve(&TcpListener::from(listener))?;
            Ok((Value::Null, true))
        }
        Command::Serve { listen, background, .. } => {
            let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
            if background {
                return Ok((go_on(listener)?, true));
            }
            traffic::serve(&listener)?;
            Ok((Value::Null, true))
        }
        Command::Bulk { server, direction, bytes, streams } => {
            let outcome = bulk::check(server, direction, bytes, streams)?;
            Ok((serde_json::to_value(outcome)?, true))
        }
        Command::Flows { server, direction, count, flows, rate, size, silence } => {
            let plan = flows::Plan { count, flows, rate, size, silence };
            let outcome = flows::check(server, direction, plan)?;
            Ok((serde_json::to_value(&outcome)?, outcome.is_perfect()))
        }
        Command::Sizes { server, from, to, step } => {
            let outcome = sizes::check(server, (from..=to).step_by(step))?;
            Ok((serde_json::to_value(&outcome)?, outcome.is_perfect()))
        }
    }
}

/// Leaves the listening socket to a process of its own, so that whoever waits for this one knows that it listens.
fn go_on(listener: TcpListener) -> Result<Value> {
    let address = listener.local_addr()?;
    let server = process::Command::new(std::env::current_exe()?)
        .args(["serve", "--inherited"])
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start the server")?;
    Ok(json!({ "listening": address, "process": server.id() }))
}
