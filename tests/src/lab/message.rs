//! The messages of the lab: one JSON object a line.
//!
//! A client sends a [`Job`] to the supervisor, which answers with [`Report`]s until one says that the job has ended. If
//! the client disconnects, its job is killed. The supervisor sends [`Order`]s to the agent, which answers with
//! [`Report`]s.

use std::env;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::place::Place;

/// How often the agent reports that it is alive.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

/// A program to run in the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    folder: PathBuf,
}

impl Job {
    /// Creates a job with the current directory and environment of this process.
    pub fn here(program: PathBuf, arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        let folder = env::current_dir().context("cannot determine the current directory")?;
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

/// A message from the supervisor to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Order {
    /// Runs a job. Sent only if no job is running.
    Run(Job),
    /// Kills the running job, if any.
    End,
}

/// A message from the agent to the supervisor, or from the supervisor to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// The machine is up.
    Ready,
    /// The machine is still up. Sent every [`HEARTBEAT`].
    Alive,
    /// A line of the job's output, with its newline if it has one.
    Output { stream: Stream, text: String },
    /// The job has ended, and all its processes are dead.
    Ended(Outcome),
    /// The machine has ended or hangs, or did not boot.
    Lost(String),
}

/// The output stream of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stream {
    Output,
    Error,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(String),
    /// It could not be started, for this reason.
    NotStarted(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exit code {code}"),
            Self::Killed(signal) => write!(formatter, "killed by {signal}"),
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
