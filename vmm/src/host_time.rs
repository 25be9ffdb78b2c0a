//! The host's boot-time clock. Both VMMs of a migration share it, so the target can compute the guest's clock from it.

use nix::time::{ClockId, clock_gettime};

/// Returns the nanoseconds since the host booted (`CLOCK_BOOTTIME`).
pub fn now() -> u64 {
    // The clock exists since Linux 2.6.39, and is never negative.
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(std::time::Duration::ZERO, Into::into);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
