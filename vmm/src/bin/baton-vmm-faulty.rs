//! `baton-vmm` with its fault points, for tests: see `baton_faults`.

use std::process::ExitCode;

#[path = "../main.rs"]
mod program;

fn main() -> ExitCode {
    match baton_faults::arm() {
        Ok(()) => program::main(),
        Err(error) => {
            eprintln!("baton-vmm-faulty: {error}");
            ExitCode::from(2)
        }
    }
}
