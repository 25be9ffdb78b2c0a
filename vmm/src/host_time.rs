//! The host's time, which all processes on it share: what two VMMs reckon a guest's clock by.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the host's boot (`CLOCK_BOOTTIME`).
pub fn now() -> u64 {
    // The clock exists since Linux 2.6.39, and is never negative.
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(std::time::Duration::ZERO, Into::into);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
