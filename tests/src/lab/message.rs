//! What is said to the lab, one JSON object a line.
//!
//! A client sends a [`Job`] to the supervisor and gets [`Report`]s until one ends it; a client that leaves ends its job.
//! The supervisor gives the agent [`Order`]s and gets [`Report`]s.

use std::env;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::place::Place;

/// How often the agent says that it is alive.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

/// A program to be run in the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    folder: PathBuf,
}

impl Job {
    /// To be run in the same folder and with the same environment as this process.
    pub fn here(program: PathBuf, arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        let folder = env::current_dir().context("cannot tell the current folder")?;
        let mut environment: Vec<_> = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name != super::PLACE)
            .collect();
        environment.push((super::PLACE.to_owned(), Place::HERE.to_owned()));
        Ok(Self { program, arguments: arguments.into_iter().collect(), environment, folder })
    }

    pub(super) fn command(&self) -> std::process::Command {
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.arguments).env_clear().envs(self.environment.clone()).current_dir(&self.folder);
        command
    }
}

/// What the supervisor tells the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Order {
    /// Run this. Only after the last job has ended.
    Run(Job),
    /// End the job that runs, if one does.
    End,
}

/// What the agent tells the supervisor, and the supervisor a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// The machine is up.
    Ready,
    /// It still is, which is said every [`HEARTBEAT`].
    Alive,
    /// A line that the job has written, with its end unless it had none.
    Output { stream: Stream, text: String },
    /// The job has ended, and nothing that it started is left.
    Ended(Outcome),
    /// The machine is gone, or never came up.
    Lost(String),
}

/// Where a job writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stream {
    Output,
    Error,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(String),
    /// It could not be started.
    NotStarted(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exit code {code}"),
            Self::Killed(signal) => write!(formatter, "ended by {signal}"),
            Self::NotStarted(reason) => write!(formatter, "not started: {reason}"),
        }
    }
}

/// Writes a message as one line.
pub(super) fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}
