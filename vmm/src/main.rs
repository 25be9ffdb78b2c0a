//! `baton-vmm`: reads the command line, runs the VM, and reports a failure in one line on stderr.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use baton_control::error_chain;
use baton_vmm::config::{Config, EarlyExit};

const FAILURE: u8 = 1;
const USAGE: u8 = 2;

pub(crate) fn main() -> ExitCode {
    let config = match Config::from_arguments(std::env::args_os()) {
        Ok(config) => config,
        Err(EarlyExit::Information(text)) => {
            let written = std::io::stdout().write_all(text.as_bytes());
            return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) };
        }
        Err(EarlyExit::Usage(line)) => {
            eprintln!("baton-vmm: {line}");
            return ExitCode::from(USAGE);
        }
    };
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_ansi(terminal)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
    match baton_vmm::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-vmm: {}", error_chain(&error));
            ExitCode::from(FAILURE)
        }
    }
}
