//! `batonctl`: sends a request to a running back-end or VMM over its control socket, and prints the reply.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use baton_control::command_line::Arguments;
use baton_control::{ControlClient, listing::listing};
use clap::Parser;

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("batonctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The results in replies to requests that failed after the process had accepted them.
const NOT_DONE: [&str; 2] = ["rolled-back", "refused"];

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let reply = ControlClient::connect(&arguments.control_socket)?.call(&arguments.command.into())?;
    let text = if arguments.json { format!("{reply}\n") } else { listing(&reply) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the reply")?;
    let result = reply.get("result").and_then(serde_json::Value::as_str);
    let not_done = result.is_some_and(|result| NOT_DONE.contains(&result));
    Ok(if not_done { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
