//! What is said to the driver, one JSON object a line, and what it answers.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What the driver is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// End the interval, and begin the next one. Answered by a [`Worst`].
    Mark,
    /// Send so many frames a second each way. Answered by a [`Worst`], too.
    Rate(u32),
    /// Send nothing until all is there that is to come, and count anew. Answered by a [`Count`].
    Settle,
}

/// The worst of an interval, in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worst {
    /// The longest time between two frames that arrived in one direction, in nanoseconds.
    pub gap: u64,
    /// The longest time that a frame was on its way, in nanoseconds.
    pub delay: u64,
}

impl Worst {
    /// The worse of two directions.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { gap: self.gap.max(other.gap), delay: self.delay.max(other.delay) }
    }
}

/// What became of all frames since the last count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Frames sent each way, on average, a second.
    pub rate: u32,
    /// Frames sent.
    pub sent: u64,
    /// Of them, those that did not arrive.
    pub lost: u64,
    /// Those that arrived more than once.
    pub doubled: u64,
    /// Those that others of their flow, sent later, had overtaken.
    pub reordered: u64,
    /// The back-end said nothing to the front-end, and did not leave it.
    pub quiet: bool,
}

impl Count {
    /// With what came before it.
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

    /// Whether all arrived as it should, and the front-end heard nothing.
    pub fn is_clean(&self) -> bool {
        (self.lost, self.doubled, self.reordered, self.quiet) == (0, 0, 0, true)
    }
}

/// One end of the line.
#[derive(Debug)]
pub struct Line(BufReader<UnixStream>);

impl From<OwnedFd> for Line {
    fn from(fd: OwnedFd) -> Self {
        Self(BufReader::new(fd.into()))
    }
}

impl Line {
    /// Says something.
    ///
    /// # Errors
    /// If nobody hears it.
    pub fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.0.get_mut().write_all(&line)?)
    }

    /// Hears something. `None`: the other end is gone.
    ///
    /// # Errors
    /// If it makes no sense.
    pub fn hear<M: DeserializeOwned>(&mut self) -> Result<Option<M>> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        ensure!(line.ends_with('\n'), "half a line: {line}");
        Ok(Some(serde_json::from_str(&line)?))
    }
}
