//! The supervisor: a process that starts the lab's machine, passes the jobs of its clients to the agent one by one, and
//! stops the machine when the owner of the lab ends.
//!
//! ```text
//!  Booting ──Ready──▶ Idle ──job──▶ Busy ──Ended──▶ Idle
//!     │                              └──client disconnects──▶ Ending ──Ended──▶ Idle
//!     └── the machine ends or is silent ──▶ Lost: reports the reason to every client
//!  Idle, Busy, Ending ── the machine ends or is silent ──▶ Booting: a new machine; reports the reason to the client
//! ```
//!
//! A machine that fails thus fails the one test that it runs. No test is repeated.

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
use crate::paths;

/// How long the machine may take to boot: some 5 seconds if the host is idle.
const BOOT: Duration = Duration::from_secs(180);

/// How long the machine may be silent: a multiple of the agent's heartbeat, because a busy machine delays it.
const SILENCE: Duration = Duration::from_secs(90);

/// How long a client may take to send its job.
const REQUEST: Duration = Duration::from_secs(60);

/// Runs lab number `number` for as long as the process `owner` runs. Standard input is the listening socket for
/// clients. Writes "started" to standard output once the supervisor watches the owner. Removes `folder`, which contains
/// the socket, when the lab ends.
pub fn supervise(owner: u32, number: usize, folder: &Path) -> Result<()> {
    let owner = i32::try_from(owner).ok().and_then(Pid::from_raw).context("invalid process id")?;
    let owner = pidfd_open(owner, PidfdFlags::empty()).context("cannot watch the owner of the lab")?;
    let listener = io::stdin().as_fd().try_clone_to_owned().context("standard input is not open")?;
    let mut output = io::stdout();
    output
        .write_all(b"started\n")
        .and_then(|()| output.flush())
        .context("cannot write to standard output")?;

    let result = Supervisor::start(UnixListener::from(listener), number).and_then(|mut lab| lab.run(&owner));
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    result
}

struct Supervisor {
    /// The number of the lab.
    number: usize,
    listener: UnixListener,
    port: UnixStream,
    state: State,
    /// The received part of the agent's next line.
    line: Vec<u8>,
    /// When the agent last sent something.
    heard: Instant,
    machine: Option<Machine>,
    /// How many machines were started.
    machines: u32,
}

enum State {
    Booting,
    Idle,
    Busy(UnixStream),
    Ending,
    Lost(String),
}

/// An event that [`Supervisor::wait`] waits for.
enum Event {
    OwnerEnded,
    Port,
    Client,
    Timeout,
}

impl Supervisor {
    fn start(listener: UnixListener, number: usize) -> Result<Self> {
        let (port, _) = UnixStream::pair().context("cannot create a socket pair")?;
        let (state, line, heard) = (State::Booting, Vec::new(), Instant::now());
        let mut supervisor = Self { number, listener, port, state, line, heard, machine: None, machines: 0 };
        supervisor.boot();
        Ok(supervisor)
    }

    /// Starts a machine. If that fails, the lab is lost, and every client is told why.
    fn boot(&mut self) {
        self.machines += 1;
        self.line.clear();
        self.heard = Instant::now();
        let name = format!("lab-{}-{}", self.number, self.machines);
        match paths::logs().and_then(|logs| Machine::start(&logs, &name)) {
            Ok((machine, port)) => {
                (self.machine, self.port, self.state) = (Some(machine), port, State::Booting);
            }
            Err(error) => self.state = State::Lost(format!("{error:#}")),
        }
    }

    fn run(&mut self, owner: &OwnedFd) -> Result<()> {
        loop {
            match self.wait(owner)? {
                Event::OwnerEnded => return Ok(()),
                Event::Port => self.read_port(),
                Event::Client => self.hear_client()?,
                Event::Timeout => {
                    self.lose(format!("the lab's machine was silent for {:?}", self.heard.elapsed()));
                }
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
            State::Booting | State::Ending => (),
        }
        let patience = match self.state {
            State::Booting => Some(BOOT),
            State::Idle | State::Busy(_) | State::Ending => Some(SILENCE),
            State::Lost(_) => None,
        };
        let timeout = patience.map_or(PollTimeout::NONE, |patience| {
            let left = (self.heard + patience).saturating_duration_since(Instant::now());
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        loop {
            match poll(&mut fds, timeout) {
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => (),
                Err(error) => return Err(error).context("cannot wait for events"),
            }
        }
        let ready = fds.iter().position(|fd| fd.any() != Some(false));
        Ok(ready.map_or(Event::Timeout, |index| events.swap_remove(index)))
    }

    /// Reads from the agent, and handles every complete line.
    fn read_port(&mut self) {
        let mut bytes = [0; 65536];
        match self.port.read(&mut bytes) {
            Ok(0) => self.lose("the lab's machine has ended".to_owned()),
            Err(error) => self.lose(format!("cannot read from the lab's machine: {error}")),
            Ok(length) => {
                self.heard = Instant::now();
                self.line.extend_from_slice(&bytes[..length]);
                while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                    let line: Vec<u8> = self.line.drain(..=end).collect();
                    match serde_json::from_slice(&line) {
                        Ok(report) => self.handle(&report),
                        Err(error) => self.lose(format!("invalid message from the lab's agent: {error}")),
                    }
                }
            }
        }
    }

    fn handle(&mut self, report: &Report) {
        let ended = matches!(report, Report::Ended(_));
        match &self.state {
            _ if *report == Report::Alive => (),
            State::Booting if *report == Report::Ready => self.state = State::Idle,
            State::Busy(client) => {
                // Fails if the client has disconnected, which `hear_client` notices.
                let _ = send(client, report);
                if ended {
                    self.state = State::Idle;
                }
            }
            State::Ending if ended => self.state = State::Idle,
            State::Ending | State::Lost(_) => (),
            State::Booting | State::Idle => {
                self.lose(format!("unexpected message from the lab's agent: {report:?}"));
            }
        }
    }

    /// Handles a client that connects or disconnects.
    fn hear_client(&mut self) -> Result<()> {
        match &self.state {
            State::Busy(_) => {
                // A client sends nothing after its job, so it has disconnected.
                self.order(&Order::End);
                if matches!(self.state, State::Busy(_)) {
                    self.state = State::Ending;
                }
            }
            State::Lost(reason) => {
                let (client, _) = self.listener.accept().context("cannot accept a client")?;
                let _ = send(&client, &Report::Lost(reason.clone()));
            }
            State::Booting | State::Idle | State::Ending => {
                let (client, _) = self.listener.accept().context("cannot accept a client")?;
                // Ignores a client that does not send a valid job.
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
            self.lose(format!("cannot write to the lab's machine: {error}"));
        }
    }

    /// Stops the machine. Starts a new one, unless it has never booted.
    fn lose(&mut self, reason: String) {
        eprintln!("machine {}: {reason}", self.machines);
        self.machine = None;
        match &self.state {
            State::Booting | State::Lost(_) => self.state = State::Lost(reason),
            State::Busy(client) => {
                let _ = send(client, &Report::Lost(reason));
                self.boot();
            }
            State::Idle | State::Ending => self.boot(),
        }
    }
}

fn request(client: &UnixStream) -> Result<Job> {
    client.set_read_timeout(Some(REQUEST))?;
    let mut line = String::new();
    if BufReader::new(client).read_line(&mut line)? == 0 {
        bail!("the client disconnected");
    }
    Ok(serde_json::from_str(&line)?)
}
