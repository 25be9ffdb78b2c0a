//! The lab: a virtual machine with KVM, vhost-net and TAPs of a real kernel, for machines that lack them.
//!
//! ```text
//!  nextest ─ set-up script ─▶ `lab up` ─ starts ─▶ supervisor ─ starts ─▶ QEMU (TCG, which emulates AMD's SVM)
//!     └─ test process ── Job ─▶ (its socket) ────────▶ ┘ ── virtio-serial ──▶ agent, the machine's first process
//!             ◀── output, verdict ───────────────────────────────────────────── └─ the same test, with KVM
//! ```
//!
//! A test that needs them has its body called by [`run`]. Where this machine can do it, that is all that happens. Else
//! the lab runs the very same test executable: its machine sees this one's files, so every path means the same there.
//! Its files are read-only and what is written is gone with the machine, except in [`crate::paths::test_logs`],
//! which both share. Jobs are done one after the other, as root; whatever a job started ends with it.
//!
//! The lab runs as long as the process that owns it: nextest, or a test that was started without it. For nextest there
//! are two where this machine has room for them, which share nothing: tests that run side by side have each their own.

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

/// The environment variable that says where tests which need the lab are run: a [`Place`].
pub const PLACE: &str = "BATON_LAB";

/// Runs the body of a test that needs KVM, vhost-net, TAPs and root: here if this machine has them, else in the lab.
pub fn run(body: impl FnOnce() -> Result<()>) -> Result<()> {
    match Place::find()? {
        Place::Here => body(),
        Place::Lab(lab) => run_in(&lab),
    }
}

/// Has the running test run by the lab.
fn run_in(lab: &Running) -> Result<()> {
    let name = paths::test_name()?;
    let logs = paths::test_logs()?;
    let program = env::current_exe().context("cannot tell which program runs")?;
    let arguments = ["--exact", &name, "--nocapture", "--include-ignored"].map(str::to_owned);
    let mut passed = false;
    let outcome = lab.run(&Job::here(program, arguments)?, &mut |line| {
        // Without it the executable had no such test, and then it does not fail.
        passed |= line.starts_with("test result: ok. 1 passed;");
    })?;
    if passed && outcome == Outcome::Exited(0) {
        return Ok(());
    }
    bail!(
        "{name} failed in the lab: {outcome}\n  its logs: {}\n  the lab's: {}",
        logs.display(),
        lab.logs().display()
    )
}
