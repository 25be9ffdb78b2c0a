//! The protocol between the benchmark and its driver: orders and answers, one JSON value per line.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A request to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// End the interval and begin the next one. The answer is a [`Worst`].
    Mark,
    /// Send this many frames a second each way. Also ends the interval; the answer is a [`Worst`].
    Rate(u32),
    /// Send nothing until all frames in flight have arrived, and restart the counts. The answer is a [`Count`].
    Settle,
}

/// The longest gap and the longest delay of an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worst {
    /// The longest time between the arrivals of two consecutive frames of one direction, in nanoseconds.
    pub gap: u64,
    /// The longest time from sending to receiving a frame, in nanoseconds.
    pub delay: u64,
}

impl Worst {
    /// The maximum of each value.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { gap: self.gap.max(other.gap), delay: self.delay.max(other.delay) }
    }
}

/// The frames sent since the last count, and how many of them went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Frames sent a second each way, on average.
    pub rate: u32,
    /// Frames sent, both ways together.
    pub sent: u64,
    /// Frames that did not arrive.
    pub lost: u64,
    /// Frames that arrived again.
    pub doubled: u64,
    /// Frames that arrived after later ones of their flow.
    pub reordered: u64,
    /// Whether the back-end sent the front-end nothing and kept the connection open.
    pub quiet: bool,
}

impl Count {
    /// Adds this count to an earlier one; the rate is this one's.
    #[must_use]
    pub fn and(self, before: Self) -> Self {
        Self {
            rate: self.rate,
            sent: before.sent + self.sent,
            lost: before.lost + self.lost,
            doubled: before.doubled + self.doubled,
            reordered: before.reordered + self.reordered,
            quiet: before.quiet && self.quiet,
        }
    }

    /// Whether every frame arrived once and in order, and the front-end's socket was quiet.
    pub fn is_clean(&self) -> bool {
        (self.lost, self.doubled, self.reordered, self.quiet) == (0, 0, 0, true)
    }
}

/// One end of the connection between benchmark and driver.
#[derive(Debug)]
pub struct Line(BufReader<UnixStream>);

impl From<OwnedFd> for Line {
    fn from(fd: OwnedFd) -> Self {
        Self(BufReader::new(fd.into()))
    }
}

impl Line {
    /// Sends a message.
    ///
    /// # Errors
    /// Returns an error if the other end is closed.
    pub fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.0.get_mut().write_all(&line)?)
    }

    /// Waits for a message. Returns `None` if the other end is closed.
    ///
    /// # Errors
    /// Returns an error if the message is incomplete or malformed.
    pub fn hear<M: DeserializeOwned>(&mut self) -> Result<Option<M>> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        ensure!(line.ends_with('\n'), "incomplete message: {line}");
        Ok(Some(serde_json::from_str(&line)?))
    }
}
