//! Paths: cargo's target directory, the files of `tests/setup` in it, and a directory for the logs of each test.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use anyhow::{Context, Result, bail};

/// Returns the directory of the programs that cargo built together with the running one.
pub fn programs() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot determine the running program")?;
    let folder = program.parent().context("the running program has no parent directory")?;
    // Test executables are one directory below the programs.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_owned())
}

/// Returns cargo's target directory, which it recognises by the files of `tests/setup`.
pub fn target() -> Result<PathBuf> {
    let programs = programs()?;
    match programs.ancestors().find(|folder| folder.join("lab/guest-kernel").exists()) {
        Some(folder) => Ok(folder.to_owned()),
        None => bail!("{} is not set up for tests; run tests/setup", programs.display()),
    }
}

/// Returns the directory of the files of `tests/setup`, and of the images built from them.
pub fn lab() -> Result<PathBuf> {
    Ok(target()?.join("lab"))
}

/// Returns the directory of the logs of the tests and the lab.
pub fn logs() -> Result<PathBuf> {
    Ok(target()?.join("lab-logs"))
}

/// Returns the directory of the running test in [`logs`]. Creates it, and empties it on the first call in a process.
pub fn test_logs() -> Result<PathBuf> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = test_logs_of(&test_name()?)?;
    if FOLDER.set(folder.clone()).is_ok() {
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot empty {}", folder.display()));
            }
            _ => (),
        }
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Returns the directory in [`logs`] of a test in the running executable.
pub fn test_logs_of(test: &str) -> Result<PathBuf> {
    let program = env::current_exe().context("cannot determine the running program")?;
    let name = program
        .file_stem()
        .and_then(|name| name.to_str())
        .context("the running program has no valid name")?;
    // Cargo appends a hash to the names of test executables.
    let name = name.rsplit_once('-').map_or(name, |(name, _)| name);
    Ok(logs()?.join(name).join(test.replace("::", "/")))
}

/// Returns the name of the running test in its executable: `module::function`.
pub(crate) fn test_name() -> Result<String> {
    let mut arguments = env::args();
    if arguments.by_ref().any(|argument| argument == "--exact")
        && let Some(name) = arguments.find(|argument| !argument.starts_with('-'))
    {
        return Ok(name);
    }
    match thread::current().name() {
        Some(name) if name != "main" => Ok(name.to_owned()),
        _ => bail!("cannot determine the running test: this thread is not named after a test"),
    }
}

/// Returns the path of a file that `tests/setup` provides.
pub(crate) fn set_up(path: &Path) -> Result<PathBuf> {
    let path = lab()?.join(path);
    if !path.exists() {
        bail!("{} is missing; run tests/setup", path.display());
    }
    Ok(path)
}
