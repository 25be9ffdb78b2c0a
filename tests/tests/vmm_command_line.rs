//! baton-vmm's command line, as far as it goes without a guest: what is wrong is said in one line.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use baton_tests::programs;

/// Runs it with these arguments, and checks its exit code and that the one line on stderr has this in it.
fn fails(arguments: &[&str], code: i32, text: &str) -> Result<()> {
    let output = Command::new(programs::vmm()?).args(arguments).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(code), "{arguments:?}: {}: {said}", output.status);
    ensure!(said.lines().count() == 1 && said.contains(text), "{arguments:?}: {said}");
    Ok(())
}

#[test]
fn a_kernel_that_is_not_there_is_a_failure() -> Result<()> {
    fails(&["--kernel=/nonexistent/kernel"], 1, "/nonexistent/kernel")
}

/// What is wrong with the user's own files and sockets is said first, on hosts without KVM, too.
#[test]
fn what_the_user_can_mend_comes_before_kvm() -> Result<()> {
    fails(&["--kernel=/dev/null"], 1, "/dev/null is no kernel")?;
    let place = tempfile::tempdir()?;
    let taken = place.path().join("taken");
    std::fs::write(&taken, "")?;
    let taken = taken.to_str().context("a path in UTF-8")?;
    fails(&[&format!("--incoming={taken}")], 1, taken)?;
    let missing = place.path().join("missing");
    let missing = missing.to_str().context("a path in UTF-8")?;
    let incoming = format!("--incoming={}", place.path().join("incoming").display());
    fails(&[&incoming, "--net", &format!("socket={missing}")], 1, missing)
}

#[test]
fn wrong_use_is_told_apart_from_failure() -> Result<()> {
    fails(&[], 2, "--kernel")?;
    fails(&["--kernel=k", "--cpus=17"], 2, "1..=16")?;
    fails(&["--kernel=k", "--cpus=0"], 2, "1..=16")?;
    fails(&["--kernel=k", "--memory=1K"], 2, "64M")?;
    fails(&["--kernel=k", "--net", "socket=/s,queue-pairs=0"], 2, "queue-pairs")?;
    fails(&["--kernel=k", "--net", "mac=02:00:00:00:00:01"], 2, "socket")?;
    fails(&["--kernel=k", "--net", "socket=/s,local-migration=maybe"], 2, "local-migration")?;
    fails(&["--kernel=k", "--serial=nowhere"], 2, "--serial")
}
