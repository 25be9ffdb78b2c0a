//! How fast this machine's time stamp counter goes, which QEMU's emulated processors show as theirs.
//!
//! A kernel compares it with other clocks when it boots. Where the machine under it is busy just then that may come out
//! several times too fast, and so would everything's patience in the lab.
#![expect(unsafe_code, reason = "reads the time stamp counter")]

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long to look.
const SPAN: Duration = Duration::from_millis(100);
/// How often to look at both at each end: the closest look counts.
const LOOKS: u32 = 100;

/// Its frequency in kHz.
pub fn tsc_khz() -> u64 {
    let (from, begin) = look();
    thread::sleep(SPAN);
    let (to, end) = look();
    let microseconds = u64::try_from((to - from).as_micros()).unwrap_or(u64::MAX).max(1);
    end.wrapping_sub(begin).saturating_mul(1000) / microseconds
}

/// Both clocks, as close together as can be had.
fn look() -> (Instant, u64) {
    let once = || {
        let before = Instant::now();
        // SAFETY: every x86_64 processor has the counter.
        let ticks = unsafe { _rdtsc() };
        (before.elapsed(), before, ticks)
    };
    let (_, time, ticks) = (1..LOOKS).map(|_| once()).fold(once(), Ord::min);
    (time, ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_measured_twice() {
        let (first, second) = (tsc_khz(), tsc_khz());
        assert!(first.abs_diff(second) < first / 100, "{first}, {second}");
    }
}
