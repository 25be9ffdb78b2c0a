//! The supervisor: a process that starts the lab's machine, takes one client's job after the other to its agent, and
//! ends the machine when the lab's owner ends.
//!
//! ```text
//!  Booting ──Ready──▶ Idle ──a client's job──▶ Busy ──Ended──▶ Idle
//!     │                 │                        ├──client leaves──▶ Ending ──Ended──▶ Idle
//!     └───────── the machine ends ───────────────┴──▶ Lost: every client is told why
//! ```

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::machine::Machine;
use super::message::{Job, Order, Report, send};
use crate::places;

/// How long the machine may take to come up: it needs some 5 seconds on a machine with nothing else to do.
const BOOT: Duration = Duration::from_secs(180);

/// How long a client may take to say what it wants.
const REQUEST: Duration = Duration::from_secs(10);

/// Runs the lab for as long as the process `owner` runs. Clients connect to standard input, a listening socket;
/// "started" is written to standard output when the supervisor watches its owner. The folder, in which the socket is,
/// goes away with the lab.
pub fn supervise(owner: u32, folder: &Path) -> Result<()> {
    let owner = i32::try_from(owner).ok().and_then(Pid::from_raw).context("no process has such an id")?;
    let owner = pidfd_open(owner, PidfdFlags::empty()).context("cannot watch the lab's owner")?;
    let listener = io::stdin().as_fd().try_clone_to_owned().context("standard input is not open")?;
    let mut output = io::stdout();
    output
        .write_all(b"started\n")
        .and_then(|()| output.flush())
        .context("cannot tell who started the lab")?;

    let result = Supervisor::start(UnixListener::from(listener)).and_then(|mut lab| lab.run(&owner));
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    result
}

struct Supervisor {
    listener: UnixListener,
    port: UnixStream,
    state: State,
    /// What has arrived of the agent's next line.
    line: Vec<u8>,
    machine: Option<Machine>,
}

enum State {
    Booting { until: Instant },
    Idle,
    Busy(UnixStream),
    Ending,
    Lost(String),
}

/// What [`Supervisor::wait`] waited for.
enum Event {
    OwnerEnded,
    Port,
    Client,
    Timeout,
}

impl Supervisor {
    /// A machine that cannot be started is lost, so that the clients learn why.
    fn start(listener: UnixListener) -> Result<Self> {
        let logs = places::logs()?;
        let (machine, port, state) = match Machine::start(&logs) {
            Ok((machine, port)) => (Some(machine), port, State::Booting { until: Instant::now() + BOOT }),
            Err(error) => (None, UnixStream::pair()?.0, State::Lost(format!("{error:#}"))),
        };
        Ok(Self { listener, port, state, line: Vec::new(), machine })
    }

    fn run(&mut self, owner: &OwnedFd) -> Result<()> {
        loop {
            match self.wait(owner)? {
                Event::OwnerEnded => return Ok(()),
                Event::Port => self.read_port(),
                Event::Client => self.hear_client()?,
                Event::Timeout => self.lose(format!("the lab's machine did not come up within {BOOT:?}")),
            }
        }
    }

    fn wait(&self, owner: &OwnedFd) -> Result<Event> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(owner.as_fd())];
        let mut events = vec![Event::OwnerEnded];
        if !matches!(self.state, State::Lost(_)) {
            fds.push(readable(self.port.as_fd()));
            events.push(Event::Port);
        }
        match &self.state {
            State::Idle | State::Lost(_) => {
                fds.push(readable(self.listener.as_fd()));
                events.push(Event::Client);
            }
            State::Busy(client) => {
                fds.push(readable(client.as_fd()));
                events.push(Event::Client);
            }
            State::Booting { .. } | State::Ending => (),
        }
        let timeout = match self.state {
            State::Booting { until } => {
                PollTimeout::try_from(until.saturating_duration_since(Instant::now()))
                    .unwrap_or(PollTimeout::MAX)
            }
            _ => PollTimeout::NONE,
        };
        loop {
            match poll(&mut fds, timeout) {
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => (),
                Err(error) => return Err(error).context("cannot wait"),
            }
        }
        let ready = fds.iter().position(|fd| fd.any() != Some(false));
        Ok(ready.map_or(Event::Timeout, |index| events.swap_remove(index)))
    }

    /// Takes what the agent has written, and handles every whole line.
    fn read_port(&mut self) {
        let mut bytes = [0; 65536];
        match self.port.read(&mut bytes) {
            Ok(0) => self.lose("the lab's machine has ended".to_owned()),
            Err(error) => self.lose(format!("the lab's machine cannot be reached: {error}")),
            Ok(length) => {
                self.line.extend_from_slice(&bytes[..length]);
                while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                    let line: Vec<u8> = self.line.drain(..=end).collect();
                    match serde_json::from_slice(&line) {
                        Ok(report) => self.handle(&report),
                        Err(error) => self.lose(format!("the lab's agent said something strange: {error}")),
                    }
                }
            }
        }
    }

    fn handle(&mut self, report: &Report) {
        let ended = matches!(report, Report::Ended(_));
        match &self.state {
            State::Booting { .. } if *report == Report::Ready => self.state = State::Idle,
            State::Busy(client) => {
                // A client that has gone is noticed when it is read from.
                let _ = send(client, report);
                if ended {
                    self.state = State::Idle;
                }
            }
            State::Ending if ended => self.state = State::Idle,
            State::Ending | State::Lost(_) => (),
            State::Booting { .. } | State::Idle => {
                self.lose(format!("the lab's agent said {report:?} unasked"));
            }
        }
    }

    /// A client connects, or leaves.
    fn hear_client(&mut self) -> Result<()> {
        match &self.state {
            State::Busy(_) => {
                // It has nothing more to say.
                self.order(&Order::End);
                if matches!(self.state, State::Busy(_)) {
                    self.state = State::Ending;
                }
            }
            State::Lost(reason) => {
                let (client, _) = self.listener.accept().context("cannot accept a client")?;
                let _ = send(&client, &Report::Lost(reason.clone()));
            }
            State::Booting { .. } | State::Idle | State::Ending => {
                let (client, _) = self.listener.accept().context("cannot accept a client")?;
                // One that says nothing, or nothing of sense, is no client.
                if let Ok(job) = request(&client) {
                    self.state = State::Busy(client);
                    self.order(&Order::Run(job));
                }
            }
        }
        Ok(())
    }

    fn order(&mut self, order: &Order) {
        if let Err(error) = send(&self.port, order) {
            self.lose(format!("the lab's machine cannot be reached: {error}"));
        }
    }

    fn lose(&mut self, reason: String) {
        if let State::Busy(client) = &self.state {
            let _ = send(client, &Report::Lost(reason.clone()));
        }
        self.machine = None;
        self.state = State::Lost(reason);
    }
}

fn request(client: &UnixStream) -> Result<Job> {
    client.set_read_timeout(Some(REQUEST))?;
    let mut line = String::new();
    if BufReader::new(client).read_line(&mut line)? == 0 {
        bail!("the client left");
    }
    Ok(serde_json::from_str(&line)?)
}
