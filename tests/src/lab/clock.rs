//! Measures the frequency of this machine's time stamp counter, which QEMU's emulated processors expose unchanged.
//!
//! A kernel calibrates the counter against other clocks when it boots. On a busy machine, the result can be several
//! times too high, and all timeouts in the lab would be wrong by that factor. So the lab's kernel gets the frequency as
//! a parameter.
#![expect(unsafe_code, reason = "reads the time stamp counter")]

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// The length of the measurement.
const SPAN: Duration = Duration::from_millis(100);
/// How often to read both clocks at each end of it. The fastest reading counts.
const LOOKS: u32 = 100;

/// Returns the frequency of the time stamp counter in kHz.
pub fn tsc_khz() -> u64 {
    let (from, begin) = look();
    thread::sleep(SPAN);
    let (to, end) = look();
    let microseconds = u64::try_from((to - from).as_micros()).unwrap_or(u64::MAX).max(1);
    end.wrapping_sub(begin).saturating_mul(1000) / microseconds
}

/// Reads both clocks, as close together as possible.
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
    fn two_measurements_agree() {
        let (first, second) = (tsc_khz(), tsc_khz());
        assert!(first.abs_diff(second) < first / 100, "{first}, {second}");
    }
}
