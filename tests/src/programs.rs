//! The programs under test, as cargo built them along with the tests.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::places;

/// `baton-backend`.
pub fn backend() -> Result<PathBuf> {
    program("baton-backend")
}

/// `baton-vmm`.
pub fn vmm() -> Result<PathBuf> {
    program("baton-vmm")
}

/// `batonctl`.
pub fn batonctl() -> Result<PathBuf> {
    program("batonctl")
}

/// `traffic`, which sends and checks network traffic.
pub fn traffic() -> Result<PathBuf> {
    program("traffic")
}

/// `lab`, which runs the lab's machine.
pub(crate) fn lab() -> Result<PathBuf> {
    program("lab")
}

fn program(name: &str) -> Result<PathBuf> {
    let path = places::programs()?.join(name);
    if !path.is_file() {
        bail!("{} was not built; run: cargo build --workspace --bins", path.display());
    }
    Ok(path)
}
