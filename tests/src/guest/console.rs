//! The output of a console. A thread reads it, keeps it in memory and in a file, and wakes waiting threads.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The receiving side of a console.
#[derive(Debug)]
pub(super) struct Console {
    shared: Arc<Shared>,
    /// The end of the text that was waited for last.
    position: usize,
}

#[derive(Debug, Default)]
struct Shared {
    received: Mutex<Received>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Received> {
        // A panic cannot leave the contents inconsistent: they are valid after every statement.
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// Starts a thread that reads from `from` until the end, and also writes everything to the file `log`.
    pub(super) fn read(mut from: impl Read + Send + 'static, log: &Path) -> Result<Self> {
        let mut log = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        let reader = Arc::clone(&shared);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length) = from.read(&mut bytes)
                && length > 0
            {
                // The file is only for debugging, so the test continues without it.
                let _ = log.write_all(&bytes[..length]);
                reader.lock().bytes.extend_from_slice(&bytes[..length]);
                reader.changed.notify_all();
            }
            reader.lock().ended = true;
            reader.changed.notify_all();
        });
        Ok(Self { shared, position: 0 })
    }

    /// Waits for `text` after the text that was waited for last, and returns the output between them.
    pub(super) fn wait_for(&mut self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let mut received = self.shared.lock();
        loop {
            let new = &received.bytes[self.position..];
            if let Some(start) = new.windows(text.len()).position(|bytes| bytes == text.as_bytes()) {
                let before = String::from_utf8_lossy(&new[..start]).into_owned();
                self.position += start + text.len();
                return Ok(before);
            }
            if received.ended {
                bail!("the console was closed");
            }
            received = self.wait(received, deadline)?;
        }
    }

    /// Waits until the console is closed.
    pub(super) fn wait_for_end(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let mut received = self.shared.lock();
        while !received.ended {
            received = self.wait(received, deadline)?;
        }
        Ok(())
    }

    pub(super) fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    fn wait<'a>(
        &self,
        received: MutexGuard<'a, Received>,
        until: Instant,
    ) -> Result<MutexGuard<'a, Received>> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("timed out");
        }
        let waited = self.shared.changed.wait_timeout(received, left);
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}
