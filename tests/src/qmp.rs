//! QEMU's monitor for programs (QMP): commands, their answers, and events in between.
//!
//! As much as the tests need. The crates for it (`qapi`) have every type of every command, from a code generator.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::PATIENCE;

/// A connection to the monitor of a QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

/// What QEMU tells unasked.
#[derive(Clone, Debug)]
pub struct Event {
    /// Such as `STOP`.
    pub name: String,
    /// What belongs to it, or null.
    pub data: Value,
    /// When it happened.
    pub time: SystemTime,
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Greeting {
        #[serde(rename = "QMP")]
        _version: Value,
    },
    Answer {
        #[serde(rename = "return")]
        value: Value,
    },
    Failure {
        error: Failure,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
        timestamp: Timestamp,
    },
}

#[derive(Debug, Deserialize)]
struct Failure {
    #[serde(rename = "desc")]
    description: String,
}

#[derive(Debug, Deserialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u64,
}

impl Qmp {
    /// Waits for the greeting, and leaves the negotiation of capabilities behind.
    ///
    /// # Errors
    /// If nobody greets.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        let greeting = monitor.read()?;
        ensure!(matches!(greeting, Line::Greeting { .. }), "not a greeting: {greeting:?}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Has a command carried out, and returns the answer. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// If QEMU refuses, or has gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).with_context(|| format!("cannot say {command}"))?;
        loop {
            match self.read().with_context(|| format!("after {command}"))? {
                Line::Answer { value } => return Ok(value),
                Line::Failure { error } => bail!("{command}: {}", error.description),
                Line::Event { event, data, timestamp } => self.keep(event, data, &timestamp),
                Line::Greeting { .. } => bail!("a greeting instead of an answer to {command}"),
            }
        }
    }

    /// The next event, in order, for which it waits if need be.
    ///
    /// # Errors
    /// If none comes.
    pub fn next_event(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            match self.read().context("waiting for an event")? {
                Line::Event { event, data, timestamp } => self.keep(event, data, &timestamp),
                other => bail!("not an event: {other:?}"),
            }
        }
    }

    /// The next event of that name; those before it are forgotten.
    ///
    /// # Errors
    /// If none comes.
    pub fn wait_event(&mut self, name: &str) -> Result<Event> {
        loop {
            let event = self.next_event().with_context(|| format!("{name} did not happen"))?;
            if event.name == name {
                return Ok(event);
            }
        }
    }

    fn read(&mut self) -> Result<Line> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("cannot hear QEMU")? == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("cannot understand {line:?}"))
    }

    fn keep(&mut self, name: String, data: Value, timestamp: &Timestamp) {
        let since = Duration::from_secs(timestamp.seconds) + Duration::from_micros(timestamp.microseconds);
        self.events.push_back(Event { name, data, time: SystemTime::UNIX_EPOCH + since });
    }
}
