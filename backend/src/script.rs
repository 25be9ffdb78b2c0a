//! The operator's programs that set up and clean up the network around the TAP (`--script`, `--downscript`).
#![expect(unsafe_code, reason = "sets a child's signal mask before it runs the program")]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use baton_protocol::handover::wire::device::Place;
use nix::sys::signal::SigSet;

/// Why a script did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// It could not be started.
    #[error("{option}: cannot run {path}; it must be an executable file", path = .path.display())]
    Start {
        /// `--script` or `--downscript`.
        option: &'static str,
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("{option}: {path} {tap} failed with {status}", path = .path.display())]
    Failed {
        /// `--script` or `--downscript`.
        option: &'static str,
        /// The program.
        path: PathBuf,
        /// The TAP.
        tap: String,
        /// How it ended.
        status: ExitStatus,
    },
}

/// Runs the program at `path` with the TAP's name and waits for it. Signals end it as usual, though they are blocked
/// in this process.
///
/// # Errors
/// [`ScriptError`].
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

/// Where this process runs a script. `None` where `/proc` does not tell.
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
    fn it_gets_the_name_and_its_failure_is_told() {
        let path = script("test \"$1\" = tap7");
        run("--script", &path, "tap7").unwrap();
        let error = run("--script", &path, "tap8").unwrap_err();
        assert!(error.to_string().ends_with("tap8 failed with exit status: 1"), "{error}");
        assert!(matches!(run("--script", Path::new("/"), "tap7"), Err(ScriptError::Start { .. })));
    }

    #[test]
    fn signals_that_are_blocked_here_are_not_blocked_there() {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.thread_block().unwrap();
        let path = script("kill -TERM $$");
        assert!(matches!(run("--script", &path, "tap7"), Err(ScriptError::Failed { .. })));
    }
}
