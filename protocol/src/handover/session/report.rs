//! The duration of a hand-over by phase. Both ends take their time stamps from the same clock.

use std::time::Duration;

use crate::handover::wire::session::{FreezeTimes, TakeTimes};

/// The durations of the phases, in order, and of the blackout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// From the start of the freeze until all rings run again, in microseconds.
    pub blackout_us: u64,
    /// The duration of each phase, in microseconds.
    pub phases: Vec<(&'static str, u64)>,
}

impl Report {
    /// Computes the phases of the blackout: `stop` until all rings are stopped, `commit` until COMMIT is sent, `pass`
    /// until the target receives it, `take` until the word is swapped, `start` until all rings run.
    pub fn of_freeze(freeze: &FreezeTimes, take: &TakeTimes) -> Self {
        let marks = [
            ("stop", freeze.freeze, freeze.stopped),
            ("commit", freeze.stopped, freeze.sent),
            ("pass", freeze.sent, take.received),
            ("take", take.received, take.taken),
            ("start", take.taken, take.running),
        ];
        // The peer's time stamps are untrusted.
        let took = |from: u64, to: u64| to.saturating_sub(from) / 1000;
        Self {
            blackout_us: took(freeze.freeze, take.running),
            phases: marks.into_iter().map(|(phase, from, to)| (phase, took(from, to))).collect(),
        }
    }

    /// Prepends the phases before the freeze: `check` until the target is ready, `stage` until the session is staged.
    #[must_use]
    pub fn after(mut self, check: Duration, stage: Duration) -> Self {
        let took = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.phases.splice(0..0, [("check", took(check)), ("stage", took(stage))]);
        self
    }
}

/// Converts a time to nanoseconds, as it is sent.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freeze_phases_add_up_to_the_blackout() {
        let freeze = FreezeTimes { freeze: 1_000_000, stopped: 1_040_000, sent: 1_050_000 };
        let take = TakeTimes { received: 1_070_000, taken: 1_071_000, running: 1_100_000 };
        let report =
            Report::of_freeze(&freeze, &take).after(Duration::from_millis(1), Duration::from_millis(2));
        let phases = [
            ("check", 1000),
            ("stage", 2000),
            ("stop", 40),
            ("commit", 10),
            ("pass", 20),
            ("take", 1),
            ("start", 29),
        ];
        assert_eq!(report, Report { blackout_us: 100, phases: phases.to_vec() });
    }

    #[test]
    fn invalid_peer_times_yield_a_zero_blackout() {
        let freeze = FreezeTimes { freeze: u64::MAX, ..FreezeTimes::default() };
        assert_eq!(Report::of_freeze(&freeze, &TakeTimes::default()).blackout_us, 0);
    }
}
