//! A limit for log messages that a peer can bring about as often as it likes: one for each place in the code, so that a
//! noisy peer hides no message of another kind. The back-end and the VMM both use it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many messages of one place are logged in a [`WINDOW`].
const MESSAGES: u32 = 20;
/// How long a window is.
const WINDOW: Duration = Duration::from_secs(10);

/// The limit of one place.
#[derive(Debug)]
pub struct Limit(Mutex<State>);

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    logged: u32,
    left_out: u64,
}

/// Logs as the macro of `tracing` that `$level` names, within the limit of this place. `left_out` says how many
/// messages were left out before this one.
#[macro_export]
macro_rules! limited {
    ($level:ident, $($message:tt)+) => {{
        static LIMIT: $crate::log_limit::Limit = $crate::log_limit::Limit::new();
        if let Some(left_out) = LIMIT.allow() {
            ::tracing::$level!(left_out = (left_out > 0).then_some(left_out), $($message)+);
        }
    }};
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

impl Limit {
    /// A limit under which nothing was logged yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State { since: None, logged: 0, left_out: 0 }))
    }

    /// Whether a message may be logged now; if so, how many were left out since the last one.
    pub fn allow(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).allow(Instant::now())
    }
}

impl State {
    fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            self.since = Some(now);
            self.logged = 0;
        }
        if self.logged == MESSAGES {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_counted_and_told_later() {
        let mut state = State { since: None, logged: 0, left_out: 0 };
        let start = Instant::now();
        for _ in 0..MESSAGES {
            assert_eq!(state.allow(start), Some(0));
        }
        assert_eq!(state.allow(start), None);
        assert_eq!(state.allow(start + WINDOW / 2), None);
        assert_eq!(state.allow(start + WINDOW), Some(2));
        assert_eq!(state.allow(start + WINDOW), Some(0));
    }

    #[test]
    fn each_place_has_a_limit_of_its_own() {
        let noisy = Limit::new();
        assert!(std::iter::from_fn(|| noisy.allow()).take(1000).count() < 1000);
        assert_eq!(Limit::new().allow(), Some(0));
    }
}
