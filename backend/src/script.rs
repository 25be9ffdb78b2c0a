//! The operator's programs that set up and clean up the network around the TAP (`--script`, `--downscript`).
#![expect(unsafe_code, reason = "sets a child's signal mask before it runs the program")]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use baton_protocol::handover::wire::device::Place;
use nix::sys::signal::SigSet;

/// Why a script failed.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The program could not be started.
    #[error("{option}: cannot run {path}; use the path of an executable file", path = .path.display())]
    Start {
        /// `--script` or `--downscript`.
        option: &'static str,
        /// The program.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The program failed.
    #[error("{option}: {path} {tap} failed with {status}", path = .path.display())]
    Failed {
        /// `--script` or `--downscript`.
        option: &'static str,
        /// The program.
        path: PathBuf,
        /// The TAP.
        tap: String,
        /// Its exit status.
        status: ExitStatus,
    },
}

/// Runs the program at `path` with the TAP's name and waits for it. No signal is blocked in the program, although this
/// process blocks some.
///
/// # Errors
/// Returns an error if the program cannot be started or fails.
pub fn run(option: &'static str, path: &Path, tap: &str) -> Result<(), ScriptError> {
    let mut command = Command::new(path);
    command.arg(tap);
    // SAFETY: sigprocmask(2) may be called between fork and exec.
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
    let status =
        command.status().map_err(|source| ScriptError::Start { option, path: path.to_owned(), source })?;
    if status.success() {
        Ok(())
    } else {
        Err(ScriptError::Failed { option, path: path.to_owned(), tap: tap.to_owned(), status })
    }
}

/// Returns the namespaces and the root directory in which this process runs a script, or `None` if `/proc` does not
/// show them.
pub fn place() -> Option<Place> {
    let inode = |path: &str| std::fs::metadata(path).ok().map(|metadata| metadata.ino());
    let root = std::fs::metadata("/").ok()?;
    Some(Place {
        net: inode("/proc/self/ns/net")?,
        mnt: inode("/proc/self/ns/mnt")?,
        root: (root.dev(), root.ino()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use std::os::unix::fs::PermissionsExt;

    fn script(text: &str) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn script_gets_tap_name_and_its_failure_is_reported() {
        let path = script("test \"$1\" = tap7");
        run("--script", &path, "tap7").unwrap();
        let error = run("--script", &path, "tap8").unwrap_err();
        assert!(error.to_string().ends_with("tap8 failed with exit status: 1"), "{error}");
        assert!(matches!(run("--script", Path::new("/"), "tap7"), Err(ScriptError::Start { .. })));
    }

    #[test]
    fn script_does_not_inherit_blocked_signals() {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.thread_block().unwrap();
        let path = script("kill -TERM $$");
        assert!(matches!(run("--script", &path, "tap7"), Err(ScriptError::Failed { .. })));
    }
}
