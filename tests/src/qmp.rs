//! A client of QEMU's machine protocol (QMP): sends commands, and receives replies and events.
//!
//! Covers only what the tests need. The existing crate (`qapi`) has generated types for all commands.

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

/// An event from QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// The name of the event, such as `STOP`.
    pub name: String,
    /// The data of the event, or null.
    pub data: Value,
    /// The time of the event.
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
    /// Waits for the greeting, and negotiates capabilities.
    ///
    /// # Errors
    /// Returns an error if QEMU does not greet in time, or if the negotiation fails.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        let greeting = monitor.read()?;
        ensure!(matches!(greeting, Line::Greeting { .. }), "expected a greeting from QEMU: {greeting:?}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command, and returns the reply. Queues events that arrive before the reply.
    ///
    /// # Errors
    /// Returns an error if the command fails, or if QEMU has ended.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).with_context(|| format!("cannot send {command}"))?;
        loop {
            match self.read().with_context(|| format!("no reply to {command}"))? {
                Line::Answer { value } => return Ok(value),
                Line::Failure { error } => bail!("{command} failed: {}", error.description),
                Line::Event { event, data, timestamp } => self.keep(event, data, &timestamp),
                Line::Greeting { .. } => bail!("received a greeting instead of the reply to {command}"),
            }
        }
    }

    /// Returns the next event, in order. Waits for one if none is queued.
    ///
    /// # Errors
    /// Returns an error if no event arrives in time.
    pub fn next_event(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            match self.read().context("no event")? {
                Line::Event { event, data, timestamp } => self.keep(event, data, &timestamp),
                other => bail!("expected an event from QEMU: {other:?}"),
            }
        }
    }

    /// Returns the next event with this name. Discards other events before it.
    ///
    /// # Errors
    /// Returns an error if it does not arrive in time.
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
        if self.stream.read_line(&mut line).context("cannot read from QEMU")? == 0 {
            bail!("QEMU closed the monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("invalid line from QEMU: {line:?}"))
    }

    fn keep(&mut self, name: String, data: Value, timestamp: &Timestamp) {
        let since = Duration::from_secs(timestamp.seconds) + Duration::from_micros(timestamp.microseconds);
        self.events.push_back(Event { name, data, time: SystemTime::UNIX_EPOCH + since });
    }
}
