//! The side of the lab that a test sees: starting a lab, and having a job done.

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

/// A lab that was started.
#[derive(Debug)]
pub struct Running {
    socket: PathBuf,
    logs: PathBuf,
}

impl Running {
    /// The lab whose socket this is.
    pub fn at(socket: &Path) -> Result<Self> {
        Ok(Self { socket: socket.to_owned(), logs: paths::logs()? })
    }

    /// Starts a lab that runs as long as the process `owner`. Returns before it is up: clients wait. Labs that run side
    /// by side have numbers of their own.
    pub fn start(owner: u32, number: usize) -> Result<Self> {
        // Made once, before any test asks for them.
        images::guest_initramfs()?;
        let logs = paths::logs()?;
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let log_path = logs.join(format!("lab-{number}-supervisor.log"));
        let log = File::create(&log_path).context("cannot write the lab's logs")?;
        let folder =
            tempfile::Builder::new().prefix("baton-lab-").tempdir().context("cannot make a folder")?;
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
            BufReader::new(output).read_line(&mut line).context("cannot hear the lab's supervisor")?;
        }
        if line != "started\n" {
            bail!("the lab's supervisor did not start; see {}", log_path.display());
        }
        // It is the supervisor's from now on.
        let _ = folder.keep();
        Ok(Self { socket, logs })
    }

    /// Where its clients connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where its console and its supervisor's messages are kept.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Has a job done, when the lab is up and others' jobs are done. What it writes is written here, and each line of
    /// its standard output is shown to `look`, too.
    pub fn run(&self, job: &Job, look: &mut dyn FnMut(&str)) -> Result<Outcome> {
        let lab = UnixStream::connect(&self.socket)
            .with_context(|| format!("the lab is gone; see its logs in {}", self.logs.display()))?;
        send(&lab, job).context("cannot ask the lab")?;
        for line in BufReader::new(lab).lines() {
            let line = line.context("cannot hear the lab")?;
            match serde_json::from_str(&line).context("cannot understand the lab")? {
                Report::Output { stream, text } => {
                    if stream == Stream::Output {
                        look(&text);
                    }
                    show(stream, &text).context("cannot write what the lab has written")?;
                }
                Report::Ended(outcome) => return Ok(outcome),
                Report::Lost(reason) => bail!("{reason}; see the lab's logs in {}", self.logs.display()),
                Report::Ready | Report::Alive => (),
            }
        }
        bail!("the lab has ended; see its logs in {}", self.logs.display())
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
