//! The client side of the lab: starts a lab and runs jobs in it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::message::{Job, Outcome, Report, Stream, send};
use crate::{images, paths, programs};

/// A running lab.
#[derive(Debug)]
pub struct Running {
    socket: PathBuf,
    logs: PathBuf,
}

impl Running {
    /// Returns the lab that listens on `socket`.
    pub fn at(socket: &Path) -> Result<Self> {
        Ok(Self { socket: socket.to_owned(), logs: paths::logs()? })
    }

    /// Starts a lab that lives as long as the process `owner`. Returns before the lab is up: its clients wait. Labs
    /// that run at the same time have different numbers.
    pub fn start(owner: u32, number: usize) -> Result<Self> {
        // Creates the image once, before any test needs it.
        images::guest_initramfs()?;
        let logs = paths::logs()?;
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let log_path = logs.join(format!("lab-{number}-supervisor.log"));
        let log = File::create(&log_path).context("cannot create the lab's log")?;
        let folder =
            tempfile::Builder::new().prefix("baton-lab-").tempdir().context("cannot create a directory")?;
        let socket = folder.path().join("lab.sock");
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot bind {}", socket.display()))?;
        let mut supervisor = Command::new(programs::lab()?)
            .args(["supervise", "--number", &number.to_string(), "--owner", &owner.to_string(), "--folder"])
            .arg(folder.path())
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start the lab's supervisor")?;
        let mut line = String::new();
        if let Some(output) = supervisor.stdout.take() {
            BufReader::new(output).read_line(&mut line).context("cannot read from the lab's supervisor")?;
        }
        if line != "started\n" {
            bail!("the lab's supervisor did not start; see {}", log_path.display());
        }
        // The supervisor now owns the directory.
        let _ = folder.keep();
        Ok(Self { socket, logs })
    }

    /// Returns the socket for its clients.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the directory with the logs of its console and its supervisor.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Runs a job once the lab is up and idle. Forwards the output of the job, and also passes each line of its
    /// standard output to `look`.
    pub fn run(&self, job: &Job, look: &mut dyn FnMut(&str)) -> Result<Outcome> {
        let lab = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to the lab; see its logs in {}", self.logs.display()))?;
        send(&lab, job).context("cannot send the job to the lab")?;
        for line in BufReader::new(lab).lines() {
            let line = line.context("cannot read from the lab")?;
            match serde_json::from_str(&line).context("invalid message from the lab")? {
                Report::Output { stream, text } => {
                    if stream == Stream::Output {
                        look(&text);
                    }
                    show(stream, &text).context("cannot forward the output of the job")?;
                }
                Report::Ended(outcome) => return Ok(outcome),
                Report::Lost(reason) => bail!("{reason}; see the lab's logs in {}", self.logs.display()),
                Report::Ready | Report::Alive => (),
            }
        }
        bail!("the lab closed the connection; see its logs in {}", self.logs.display())
    }
}

fn show(stream: Stream, text: &str) -> io::Result<()> {
    match stream {
        Stream::Output => {
            io::stdout().write_all(text.as_bytes())?;
            io::stdout().flush()
        }
        Stream::Error => io::stderr().write_all(text.as_bytes()),
    }
}
