//! A limit for log messages that a peer can bring about as often as it likes.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How many such messages are logged in a [`WINDOW`].
const MESSAGES: u32 = 20;
/// How long a window is.
const WINDOW: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Limit {
    since: Option<Instant>,
    logged: u32,
    left_out: u64,
}

static LIMIT: Mutex<Limit> = Mutex::new(Limit { since: None, logged: 0, left_out: 0 });

/// Whether a message may be logged now; if so, how many were left out since the last one.
pub fn allow() -> Option<u64> {
    LIMIT.lock().unwrap_or_else(PoisonError::into_inner).allow(Instant::now())
}

impl Limit {
    fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            self.since = Some(now);
            self.logged = 0;
        }
        if self.logged == MESSAGES {
            self.left_out += 1;
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
        let mut limit = Limit { since: None, logged: 0, left_out: 0 };
        let start = Instant::now();
        for _ in 0..MESSAGES {
            assert_eq!(limit.allow(start), Some(0));
        }
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start + WINDOW / 2), None);
        assert_eq!(limit.allow(start + WINDOW), Some(2));
        assert_eq!(limit.allow(start + WINDOW), Some(0));
    }
}
