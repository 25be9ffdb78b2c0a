//! `reference-backend`: a network back-end built on the rust-vmm crates, without Baton's code.

use std::path::PathBuf;
use std::process::ExitCode;

use baton_tests::reference_backend;
use clap::Parser;

/// A vhost-user network back-end built on the rust-vmm crates, which serves one front-end at a time
#[derive(Debug, Parser)]
struct Arguments {
    /// Listen for front-ends on this socket
    #[arg(long)]
    socket_path: PathBuf,
    /// Send and receive frames through this TAP
    #[arg(long)]
    tap: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Err(error) = reference_backend::serve(&arguments.socket_path, &arguments.tap);
    eprintln!("reference-backend: {error:#}");
    ExitCode::FAILURE
}
