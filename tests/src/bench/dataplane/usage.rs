//! The resources that a process has used.

use std::fs;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// The resources that a process has used, in all or between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time of all its threads, in nanoseconds.
    pub cpu: u64,
    /// Number of system calls that read or write.
    pub transfers: u64,
    /// How often a thread went to sleep.
    pub sleeps: u64,
}

impl Usage {
    /// Returns what process `pid` has used so far.
    ///
    /// # Errors
    /// Returns an error if the process does not exist, or the kernel does not report its usage.
    pub fn of(pid: u32) -> Result<Self> {
        let clock: ClockId = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
        let cpu = std::time::Duration::from(clock.now()?);
        let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
        let transfers = field(&io, "syscr:")? + field(&io, "syscw:")?;
        let mut sleeps = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            sleeps += field(&status, "voluntary_ctxt_switches:")?;
        }
        Ok(Self { cpu: u64::try_from(cpu.as_nanos())?, transfers, sleeps })
    }

    /// Returns what it has used since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            transfers: self.transfers.saturating_sub(before.transfers),
            sleeps: self.sleeps.saturating_sub(before.sleeps),
        }
    }
}

fn field(text: &str, name: &str) -> Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(value.with_context(|| format!("{name} is missing"))?.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_increases_usage() {
        let before = Usage::of(std::process::id()).unwrap();
        let until = before.cpu + 1_000_000;
        while Usage::of(std::process::id()).unwrap().cpu < until {}
        let used = Usage::of(std::process::id()).unwrap().since(before);
        assert!(used.cpu >= 1_000_000 && used.transfers > 0, "{used:?}");
    }
}
