//! The lab: an emulated machine whose Linux provides KVM, vhost-net and TAPs, for machines that lack them.
//!
//! ```text
//!  nextest ─ set-up script ─▶ `lab up` ─ starts ─▶ supervisor ─ starts ─▶ QEMU (TCG, which emulates AMD's SVM)
//!     └─ test process ── Job ─▶ (its socket) ────────▶ ┘ ── virtio-serial ──▶ agent, the machine's first process
//!             ◀── output, verdict ───────────────────────────────────────────── └─ the same test, with KVM
//! ```
//!
//! A test that needs them passes its body to [`run`], which calls the body if this machine has them. Otherwise, the
//! lab runs the same test executable. The lab's machine sees the files of this machine read-only, under the same paths.
//! Files written there vanish with the machine, except in [`crate::paths::test_logs`], which both machines share. The
//! lab runs one job at a time, as root. When a job ends, all its processes are killed.
//!
//! The lab lives as long as the process that owns it: nextest, or a test that was started without nextest. For nextest,
//! there are two independent labs if this machine has the resources, so that two tests can run at a time.

mod agent;
mod client;
mod clock;
mod machine;
mod message;
mod place;
mod probe;
mod supervisor;

use std::env;

use anyhow::{Context, Result, bail};

pub use self::agent::agent;
pub use self::client::Running;
pub use self::message::{Job, Outcome};
pub use self::place::Place;
pub use self::supervisor::supervise;
use crate::paths;

/// The environment variable that says where tests that need the lab run: a [`Place`].
pub const PLACE: &str = "BATON_LAB";

/// Runs the body of a test that needs KVM, vhost-net, TAPs and root: on this machine if it has them, else in the lab.
pub fn run(body: impl FnOnce() -> Result<()>) -> Result<()> {
    match Place::find()? {
        Place::Here => body(),
        Place::Lab(lab) => run_in(&lab),
    }
}

/// Runs the body of a test that needs root, TAPs and a KVM that can create VMs, and that runs no guest: on this machine
/// if it has them, else in the lab. If it runs in the lab, prints why.
pub fn run_without_guest(body: impl FnOnce() -> Result<()>) -> Result<()> {
    match Place::find_without_guest()? {
        Place::Here => body(),
        Place::Lab(lab) => run_in(&lab),
    }
}

/// Runs the current test in the lab.
fn run_in(lab: &Running) -> Result<()> {
    let name = paths::test_name()?;
    let logs = paths::test_logs()?;
    let program = env::current_exe().context("cannot determine the running program")?;
    let arguments = ["--exact", &name, "--nocapture", "--include-ignored"].map(str::to_owned);
    let mut passed = false;
    let outcome = lab.run(&Job::here(program, arguments)?, &mut |line| {
        // The executable also exits with 0 if it has no such test. This line proves that the test has run.
        passed |= line.starts_with("test result: ok. 1 passed;");
    })?;
    if passed && outcome == Outcome::Exited(0) {
        return Ok(());
    }
    bail!(
        "{name} failed in the lab: {outcome}\n  logs of the test: {}\n  logs of the lab: {}",
        logs.display(),
        lab.logs().display()
    )
}
