//! Errors of baton-vmm before it has a guest: each is reported in one line.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use baton_tests::programs;

/// Runs it with these arguments; checks its exit code, and that it writes one line to stderr, which contains `text`.
fn fails(arguments: &[&str], code: i32, text: &str) -> Result<()> {
    let output = Command::new(programs::vmm()?).args(arguments).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(code), "{arguments:?}: {}: {stderr}", output.status);
    ensure!(stderr.lines().count() == 1 && stderr.contains(text), "{arguments:?}: {stderr}");
    Ok(())
}

#[test]
fn missing_kernel_is_an_error() -> Result<()> {
    fails(&["--kernel=/nonexistent/kernel"], 1, "/nonexistent/kernel")
}

/// Problems with the operator's files and sockets are reported first, also on hosts without KVM.
#[test]
fn errors_in_files_and_sockets_are_reported_before_kvm() -> Result<()> {
    fails(&["--kernel=/dev/null"], 1, "cannot load kernel /dev/null")?;
    let place = tempfile::tempdir()?;
    let taken = place.path().join("taken");
    std::fs::write(&taken, "")?;
    let taken = taken.to_str().context("a path that is not UTF-8")?;
    fails(&[&format!("--incoming={taken}")], 1, taken)?;
    let missing = place.path().join("missing");
    let missing = missing.to_str().context("a path that is not UTF-8")?;
    let incoming = format!("--incoming={}", place.path().join("incoming").display());
    fails(&[&incoming, "--net", &format!("socket={missing}")], 1, missing)
}

#[test]
fn usage_errors_have_exit_code_2() -> Result<()> {
    fails(&[], 2, "--kernel")?;
    fails(&["--kernel=k", "--cpus=17"], 2, "1..=16")?;
    fails(&["--kernel=k", "--cpus=0"], 2, "1..=16")?;
    fails(&["--kernel=k", "--memory=1K"], 2, "64M")?;
    fails(&["--kernel=k", "--net", "socket=/s,queue-pairs=0"], 2, "queue-pairs")?;
    fails(&["--kernel=k", "--net", "mac=02:00:00:00:00:01"], 2, "socket")?;
    fails(&["--kernel=k", "--net", "socket=/s,local-migration=maybe"], 2, "local-migration")?;
    fails(&["--kernel=k", "--serial=nowhere"], 2, "--serial")
}
