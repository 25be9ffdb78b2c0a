//! The lab itself: its machine has KVM, vhost-net and TAPs, boots guests, and reports how tests end.

use std::env;
use std::fs::OpenOptions;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use baton_tests::guest::{Accelerator, Qemu};
use baton_tests::lab::{self, Place};
use baton_tests::paths;

#[test]
fn has_kvm_vhost_net_and_taps() -> Result<()> {
    lab::run(|| {
        for path in ["/dev/kvm", "/dev/vhost-net", "/dev/net/tun"] {
            OpenOptions::new().read(true).write(true).open(path).context(path)?;
        }
        ensure!(nix::unistd::geteuid().is_root());
        Ok(())
    })
}

#[test]
fn boots_a_guest_under_kvm() -> Result<()> {
    lab::run(|| {
        let mut guest = Qemu::new(Accelerator::Kvm, 2, "512M")?.start("guest")?;
        guest.wait_for_shell()?;
        ensure!(guest.check("nproc")? == "2\n");
        ensure!(guest.check("echo 'one  two'; echo three >&2")? == "one  two\nthree\n");
        ensure!(guest.run("exit_code() { return 7; }; exit_code")?.status == 7);
        guest.check("ethtool --version && traffic --help")?;
        ensure!(guest.check("cat /proc/sys/net/core/default_qdisc")? == "pfifo_fast\n");
        ensure!(guest.power_off()?.success());
        Ok(())
    })
}

#[test]
fn keeps_the_logs_of_a_test() -> Result<()> {
    lab::run(|| Ok(std::fs::write(paths::test_logs()?.join("note"), "kept")?))?;
    ensure!(std::fs::read_to_string(paths::test_logs()?.join("note"))? == "kept");
    Ok(())
}

/// Not a test by itself: the tests below run it. It fails in the way that `FAIL_BY` names.
#[test]
#[ignore = "fails on purpose"]
fn fails() -> Result<()> {
    lab::run(|| match env::var("FAIL_BY").as_deref() {
        Ok("panic") => panic!("told to panic"),
        Ok("error") => anyhow::bail!("told to fail"),
        Ok("signal") => std::process::abort(),
        Ok("crash") if is_lab_machine() => Ok(std::fs::write("/proc/sysrq-trigger", "c")?),
        _ => Ok(()),
    })
}

/// Whether this process runs in the lab's machine, rather than on a machine that needs no lab.
fn is_lab_machine() -> bool {
    std::fs::read_to_string("/proc/1/comm").is_ok_and(|name| name == "lab\n")
}

/// Runs [`fails`] as nextest would; returns whether it passed, and its output.
fn run_fails(by: &str) -> Result<(bool, String)> {
    let output = Command::new(env::current_exe()?)
        .args(["--exact", "fails", "--nocapture", "--include-ignored"])
        .env("FAIL_BY", by)
        .output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn reports_failures() -> Result<()> {
    for (by, word) in [("panic", "told to panic"), ("error", "told to fail"), ("signal", "SIGABRT")] {
        let (passed, text) = run_fails(by)?;
        ensure!(!passed, "passed in spite of {by}: {text}");
        ensure!(text.contains(word), "{by} is not mentioned: {text}");
    }
    Ok(())
}

#[test]
fn reports_success() -> Result<()> {
    let (passed, text) = run_fails("nothing")?;
    ensure!(passed, "{text}");
    Ok(())
}

#[test]
fn recovers_after_its_machine_crashes() -> Result<()> {
    // If tests need no lab, there is no machine to crash.
    if let Place::Lab(_) = Place::find()? {
        let (passed, text) = run_fails("crash")?;
        ensure!(!passed, "passed although its machine crashed: {text}");
        ensure!(text.contains("the lab's machine has ended"), "{text}");
        reports_success()?;
    }
    Ok(())
}
