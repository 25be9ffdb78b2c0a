//! The reference back-end as a process of a test.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::process::Process;
use crate::programs;

/// A running `reference-backend`.
#[derive(Debug)]
pub struct Program {
    /// The process.
    pub process: Process,
    /// The vhost-user socket, on which it listens.
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Program {
    /// Starts the program with the TAP of this name and waits until it listens.
    ///
    /// # Errors
    /// Returns an error if the program cannot be started or does not listen.
    pub fn start(tap: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("vhost-user");
        let mut option = OsString::from("--socket-path=");
        option.push(&socket);
        let arguments = [option, format!("--tap={tap}").into()];
        let mut process = Process::start(&programs::reference_backend()?, &arguments, &[])?;
        process.connect(&socket)?;
        Ok(Self { process, socket, _directory: directory })
    }
}
