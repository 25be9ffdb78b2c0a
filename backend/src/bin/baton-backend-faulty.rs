//! `baton-backend` with its fault points enabled, for tests. See `baton_faults`.

use std::process::ExitCode;

#[path = "../main.rs"]
mod program;

fn main() -> ExitCode {
    match baton_faults::arm() {
        Ok(()) => program::main(),
        Err(error) => {
            eprintln!("baton-backend-faulty: {error}");
            ExitCode::from(2)
        }
    }
}
