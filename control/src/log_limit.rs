//! Rate limits for log messages that a peer can trigger. Each message has its own limit, so a flood of one message does
//! not suppress the others.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a message is logged within a [`WINDOW`].
const MESSAGES: u32 = 20;
/// The period after which the count starts again.
const WINDOW: Duration = Duration::from_secs(10);

/// The rate limit of one message.
#[derive(Debug)]
pub struct Limit(Mutex<State>);

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    logged: u32,
    left_out: u64,
}

/// Logs a message at `$level` like the macros of `tracing`, at a limited rate. Each invocation has its own limit.
/// The field `left_out` counts the messages that were suppressed before this one.
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
    /// Creates a limit with nothing logged yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State { since: None, logged: 0, left_out: 0 }))
    }

    /// Returns how often the message was suppressed since it was last logged, or `None` if it must be suppressed now.
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
    use std::io::{Read, Seek, SeekFrom};
    use std::sync::Arc;

    use super::*;

    #[test]
    fn suppressed_messages_are_counted_in_the_next_window() {
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
    fn a_flood_of_one_message_does_not_suppress_another() {
        let log = Arc::new(tempfile::tempfile().unwrap());
        let subscriber = tracing_subscriber::fmt().with_writer(Arc::clone(&log)).finish();
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                crate::limited!(warn, "noisy");
            }
            crate::limited!(warn, "important");
        });
        let mut text = String::new();
        log.as_ref().seek(SeekFrom::Start(0)).unwrap();
        log.as_ref().read_to_string(&mut text).unwrap();
        let count = |message| text.lines().filter(|line| line.contains(message)).count();
        assert_eq!((count("noisy"), count("important")), (20, 1), "{text}");
    }
}
