//! `traffic`: sends and checks network traffic between two machines. Prints one line of JSON. Exits with 0 only if all
//! traffic arrived as required.

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

/// Send and check network traffic between two machines
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve as the other end of the checks, until killed
    Serve {
        /// Address to listen on
        #[arg(long, default_value = "0.0.0.0:7000")]
        listen: SocketAddr,
        /// Continue in the background once the server listens
        #[arg(long)]
        background: bool,
        /// Use standard input as the listening socket
        #[arg(long, hide = true)]
        inherited: bool,
    },
    /// Send bulk data over TCP and compare checksums
    Bulk {
        /// Address of `traffic serve`
        server: SocketAddr,
        /// Which end sends
        #[arg(long)]
        direction: Direction,
        /// Bytes on each connection
        #[arg(long, default_value_t = 64 << 20)]
        bytes: u64,
        /// Number of parallel connections
        #[arg(long, default_value_t = 1)]
        streams: u16,
    },
    /// Send numbered datagrams, none of which may be lost, duplicated or reordered within its flow
    Flows {
        /// Address of `traffic serve`
        server: SocketAddr,
        /// Which end sends
        #[arg(long)]
        direction: Direction,
        /// Datagrams over all flows
        #[arg(long, default_value_t = 10_000)]
        count: u32,
        /// Number of flows, each from its own port
        #[arg(long, default_value_t = 1)]
        flows: u16,
        /// Datagrams a second
        #[arg(long, default_value_t = 2_000)]
        rate: u32,
        /// UDP payload in bytes
        #[arg(long, default_value_t = 64)]
        size: u16,
        /// Seconds without a datagram after which the rest counts as lost
        #[arg(long, default_value_t = 30)]
        silence: u16,
    },
    /// Check that the monotonic clock of this machine never goes backwards; sends no traffic
    Clock {
        /// Stop when this file exists
        #[arg(long)]
        until: PathBuf,
    },
    /// Send datagrams of every size, and compare what the server echoes
    Sizes {
        /// Address of `traffic serve`
        server: SocketAddr,
        /// Smallest UDP payload in bytes; 18 bytes make an Ethernet frame of 60
        #[arg(long, default_value_t = 18)]
        from: usize,
        /// Largest UDP payload in bytes; 1472 bytes fill an MTU of 1500
        #[arg(long, default_value_t = 1472)]
        to: usize,
        /// Difference between consecutive sizes
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

/// How often the clock is read.
const TICK: Duration = Duration::from_millis(2);

/// Reads the clock until the file `until` exists. Returns how often it was read, and how often it had gone backwards.
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

/// Passes the listening socket to a new process. When this process exits, its parent knows that the server listens.
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
