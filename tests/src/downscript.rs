//! A downscript that records each run.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Result;
use tempfile::TempDir;

/// The script, in a temporary directory.
#[derive(Debug)]
pub struct Downscript(TempDir);

impl Downscript {
    /// Writes the script.
    ///
    /// # Errors
    /// Returns an error if the script cannot be written.
    pub fn new() -> Result<Self> {
        let directory = Self(tempfile::tempdir()?);
        let script = directory.script();
        fs::write(&script, format!("#!/bin/sh\necho $1 >> {}\n", directory.trace().display()))?;
        fs::set_permissions(&script, Permissions::from_mode(0o700))?;
        Ok(directory)
    }

    fn script(&self) -> PathBuf {
        self.0.path().join("down")
    }

    fn trace(&self) -> PathBuf {
        self.0.path().join("trace")
    }

    /// The back-end's `--downscript` option.
    pub fn option(&self) -> String {
        format!("--downscript={}", self.script().display())
    }

    /// The names of the TAPs that the script was run for, in order.
    ///
    /// # Errors
    /// Returns an error if the record cannot be read.
    pub fn runs(&self) -> Result<Vec<String>> {
        match fs::read_to_string(self.trace()) {
            Ok(trace) => Ok(trace.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}
