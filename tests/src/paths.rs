//! Where things are: cargo's target folder, what `tests/setup` put there, and a folder for each test's logs.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use anyhow::{Context, Result, bail};

/// The folder of the programs that cargo built along with the running one.
pub fn programs() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell which program runs")?;
    let folder = program.parent().context("the running program is in no folder")?;
    // Test executables are one folder below the programs.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_owned())
}

/// Cargo's target folder, as one can tell by what `tests/setup` puts there.
pub fn target() -> Result<PathBuf> {
    let programs = programs()?;
    match programs.ancestors().find(|folder| folder.join("lab/guest-kernel").exists()) {
        Some(folder) => Ok(folder.to_owned()),
        None => bail!("nothing is set up for {}; run tests/setup", programs.display()),
    }
}

/// What `tests/setup` and the images made from it are kept in.
pub fn lab() -> Result<PathBuf> {
    Ok(target()?.join("lab"))
}

/// What the tests and the lab's machine leave for whoever looks into a failure.
pub fn logs() -> Result<PathBuf> {
    Ok(target()?.join("lab-logs"))
}

/// The running test's own folder of [`logs`], which is there and, the first time a process asks, empty.
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
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// The folder of [`logs`] of a test in the running executable.
pub fn test_logs_of(test: &str) -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell which program runs")?;
    let name =
        program.file_stem().and_then(|name| name.to_str()).context("the running program has no name")?;
    // Cargo adds a hash to the names of test executables.
    let name = name.rsplit_once('-').map_or(name, |(name, _)| name);
    Ok(logs()?.join(name).join(test.replace("::", "/")))
}

/// The running test's name as its executable knows it: `module::function`.
pub(crate) fn test_name() -> Result<String> {
    let mut arguments = env::args();
    if arguments.by_ref().any(|argument| argument == "--exact")
        && let Some(name) = arguments.find(|argument| !argument.starts_with('-'))
    {
        return Ok(name);
    }
    match thread::current().name() {
        Some(name) if name != "main" => Ok(name.to_owned()),
        _ => bail!("cannot tell which test runs: this thread has no test's name"),
    }
}

/// A file that `tests/setup` makes.
pub(crate) fn set_up(path: &Path) -> Result<PathBuf> {
    let path = lab()?.join(path);
    if !path.exists() {
        bail!("{} is missing; run tests/setup", path.display());
    }
    Ok(path)
}
