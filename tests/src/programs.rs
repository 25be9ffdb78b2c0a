//! The programs under test, which cargo builds together with the tests.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::paths;

/// `baton-backend`.
pub fn backend() -> Result<PathBuf> {
    program("baton-backend")
}

/// `baton-vmm`.
pub fn vmm() -> Result<PathBuf> {
    program("baton-vmm")
}

/// `baton-backend` with fault points.
pub fn faulty_backend() -> Result<PathBuf> {
    faulty("baton-backend-faulty")
}

/// `baton-vmm` with fault points.
pub fn faulty_vmm() -> Result<PathBuf> {
    faulty("baton-vmm-faulty")
}

/// `batonctl`.
pub fn batonctl() -> Result<PathBuf> {
    program("batonctl")
}

/// `traffic`, which sends and checks network traffic.
pub fn traffic() -> Result<PathBuf> {
    program("traffic")
}

/// `bench-handover`, which measures hand-overs.
pub fn bench_handover() -> Result<PathBuf> {
    program("bench-handover")
}

/// `bench-dataplane`, which measures back-ends.
pub fn bench_dataplane() -> Result<PathBuf> {
    program("bench-dataplane")
}

/// `reference-backend`, a back-end without Baton's code.
pub fn reference_backend() -> Result<PathBuf> {
    program("reference-backend")
}

/// `lab`, which runs the lab's machine.
pub(crate) fn lab() -> Result<PathBuf> {
    program("lab")
}

fn program(name: &str) -> Result<PathBuf> {
    built(name, "cargo build --workspace --bins")
}

fn faulty(name: &str) -> Result<PathBuf> {
    built(name, "tests/build-faulty")
}

fn built(name: &str, by: &str) -> Result<PathBuf> {
    let path = paths::programs()?.join(name);
    if !path.is_file() {
        bail!("{} was not built; run: {by}", path.display());
    }
    Ok(path)
}
