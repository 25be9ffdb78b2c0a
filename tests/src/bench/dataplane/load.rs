//! The load on a back-end, with guest and network in one thread, and its results.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::guest::{Guest, HEADER, Pair};
use super::scenario::{Scenario, Traffic};
use super::source::{Burst, STAMP, frame};
use super::usage::Usage;
use crate::bench::cell::take_processor;
use crate::netns;
use crate::packet_socket::PacketSocket;

/// How long the load runs before the measurement.
const WARM_UP: Duration = Duration::from_millis(200);
/// Frames that the network sends with one system call.
const BURST: usize = 32;
/// Chains that the driver publishes together.
const BATCH: usize = 32;
/// The timeout for everything. Only catches a back-end that hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How long a frame may take there and back before the next one is sent.
const RESEND: Duration = Duration::from_millis(500);

/// The options of the load's process.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The scenario as JSON
    #[arg(long, value_parser = scenario)]
    pub scenario: Scenario,
    /// The back-end's socket; none for a TAP without virtio, which has no guest
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// Name of the TAP
    #[arg(long)]
    pub tap: String,
    /// The back-end's process ID
    #[arg(long)]
    pub pid: u32,
    /// Duration of the measurement in milliseconds
    #[arg(long)]
    pub milliseconds: u64,
    /// Run on the last processor
    #[arg(long)]
    pub pinned: bool,
}

fn scenario(text: &str) -> Result<Scenario, serde_json::Error> {
    serde_json::from_str(text)
}

/// The result of a cell.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The duration of the measurement, in seconds.
    pub seconds: f64,
    /// Frames that arrived; in the scenarios there and back and ping-pong, those that came back.
    pub frames: u64,
    /// Of these, the frames that arrived on the network, if both directions are loaded.
    pub transmitted: u64,
    /// The resources that the back-end used.
    pub used: Usage,
    /// Number of kicks.
    pub kicks: u64,
    /// Number of calls that the driver read.
    pub calls: u64,
    /// The times of frames in nanoseconds, ascending, if the scenario measures them.
    pub times: Vec<u64>,
}

/// Runs the load and writes the [`Outcome`] to `output` as JSON: `null` if the back-end does not offer the features
/// that the scenario needs.
///
/// # Errors
/// Returns an error if the back-end refuses a message or moves no frame, or if a system call fails.
pub fn run(arguments: &Arguments, output: OwnedFd) -> Result<()> {
    if arguments.pinned {
        take_processor()?;
    }
    // By default the kernel may prolong a short sleep by 50 µs.
    nix::sys::prctl::set_timerslack(1)?;
    let outcome = measure(arguments)?;
    let mut output = std::fs::File::from(output);
    Ok(output.write_all(&serde_json::to_vec(&outcome)?)?)
}

fn measure(arguments: &Arguments) -> Result<Option<Outcome>> {
    let scenario = arguments.scenario;
    let guest = match &arguments.socket {
        Some(socket) => match Guest::connect(socket, &scenario)? {
            Some(guest) => Some(guest),
            None => return Ok(None),
        },
        None => None,
    };
    wait_interface(&arguments.tap)?;
    let mut load = Load::new(scenario, guest, &arguments.tap)?;
    load.run_for(WARM_UP)?;
    load.restart();
    let before = (Usage::of(arguments.pid)?, load.counters()?, Instant::now());
    load.run_for(Duration::from_millis(arguments.milliseconds))?;
    let used = Usage::of(arguments.pid)?.since(before.0);
    let seconds = before.2.elapsed().as_secs_f64();
    let after = load.counters()?;
    let mut outcome = load.outcome;
    outcome.times.sort_unstable();
    // The TAP counts the frames that its owner moved, including those that the guest does not see.
    if scenario.traffic == Traffic::BothWays {
        outcome.transmitted = after.rx_packets - before.1.rx_packets;
        outcome.frames = load.received + outcome.transmitted;
    }
    outcome.frames = match scenario.traffic {
        Traffic::Transmit | Traffic::ThereAndBack => after.rx_packets - before.1.rx_packets,
        Traffic::Receive if load.guest.is_none() => after.tx_packets - before.1.tx_packets,
        _ => outcome.frames,
    };
    Ok(Some(Outcome { seconds, used, ..outcome }))
}

/// Waits until the back-end has created the TAP, and brings its interface up.
fn wait_interface(tap: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !netns::exists(tap) {
        ensure!(Instant::now() < deadline, "timed out before {tap} existed");
        std::thread::sleep(Duration::from_millis(1));
    }
    netns::set_up(tap)?;
    netns::wait_running(tap)
}

struct Load {
    scenario: Scenario,
    guest: Option<Guest>,
    network: PacketSocket,
    burst: Burst,
    tap: String,
    began: Instant,
    /// When the next burst is due, in nanoseconds.
    due: u64,
    /// Frames that the guest has received.
    received: u64,
    outcome: Outcome,
}

impl Load {
    fn new(scenario: Scenario, guest: Option<Guest>, tap: &str) -> Result<Self> {
        let burst = match scenario.traffic {
            Traffic::Paced { burst, .. } => usize::try_from(burst)?,
            Traffic::PingPong => 1,
            _ => BURST,
        };
        let mut load = Self {
            scenario,
            guest,
            network: PacketSocket::open(tap)?,
            burst: Burst::new(burst, scenario.frame),
            tap: tap.to_owned(),
            began: Instant::now(),
            due: 0,
            received: 0,
            outcome: Outcome::default(),
        };
        // All frames that the guest sends are the same.
        let (header, bytes) = frame(scenario.frame);
        let bytes = [&header.encode()[..], &bytes].concat();
        for pair in load.guest.iter_mut().flat_map(|guest| &mut guest.pairs) {
            let mut heads = Vec::new();
            while let Some(head) = pair.transmit.take() {
                pair.transmit.buffer(head).write(0, &bytes);
                heads.push(head);
            }
            heads.into_iter().for_each(|head| pair.transmit.release(head));
        }
        Ok(load)
    }

    fn restart(&mut self) {
        self.outcome = Outcome::default();
        self.received = 0;
        for pair in self.guest.iter_mut().flat_map(|guest| &mut guest.pairs) {
            pair.receive.kicks = 0;
            pair.transmit.kicks = 0;
        }
    }

    fn counters(&self) -> Result<netns::Counters> {
        netns::counters(&self.tap)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn run_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let mut progress = (Instant::now(), 0);
        while Instant::now() < end {
            match (self.scenario.traffic, self.guest.is_some()) {
                (Traffic::Transmit, true) => self.transmit(end)?,
                // The process with the bare TAP sends by itself.
                (_, false) if self.scenario.traffic == Traffic::Transmit => {
                    std::thread::sleep(end.saturating_duration_since(Instant::now()));
                }
                (Traffic::Receive | Traffic::ThereAndBack, _) => self.receive()?,
                (Traffic::BothWays, _) => {
                    self.transmit(end)?;
                    self.receive()?;
                }
                (Traffic::PingPong, _) => self.ping_pong()?,
                (Traffic::Paced { rate, burst }, _) => self.paced(rate, burst, end)?,
                (Traffic::Transmit, false) => bail!("no guest to transmit"),
            }
            if self.outcome.frames > progress.1 {
                progress = (Instant::now(), self.outcome.frames);
            }
            ensure!(self.guest.is_none() || progress.0.elapsed() < PATIENCE, "the back-end moves no frames");
        }
        let pairs = self.guest.iter().flat_map(|guest| &guest.pairs);
        self.outcome.kicks = pairs.map(|pair| pair.receive.kicks + pair.transmit.kicks).sum();
        Ok(())
    }

    /// Guest to TAP: keeps the transmit rings full.
    fn transmit(&mut self, end: Instant) -> Result<()> {
        let Some(guest) = &mut self.guest else { return Ok(()) };
        let mut any = false;
        for pair in &mut guest.pairs {
            while let Some((head, _)) = pair.transmit.pop() {
                pair.transmit.release(head);
                self.outcome.frames += 1;
                any = true;
            }
            loop {
                let mut added = 0;
                while added < BATCH
                    && let Some(head) = pair.transmit.take()
                {
                    pair.transmit.add(head);
                    added += 1;
                }
                pair.transmit.publish()?;
                if added < BATCH {
                    break;
                }
            }
            if !any {
                pair.transmit.disable_calls();
            }
        }
        if !any && self.scenario.sleeps {
            self.sleep(|pair| [false, true].map(|transmit| (transmit, pair)), Some(end))?;
        }
        Ok(())
    }

    /// TAP to guest, and back if the scenario requires it.
    fn receive(&mut self) -> Result<()> {
        self.burst.send(self.network.as_fd(), BURST)?;
        self.take_received()?;
        Ok(())
    }

    /// Takes the frames that the guest has received, and sends them back if the scenario requires it. Returns whether
    /// there were any.
    fn take_received(&mut self) -> Result<bool> {
        let now = self.now();
        let Some(guest) = &mut self.guest else { return Ok(false) };
        let (back, timed) = match self.scenario.traffic {
            Traffic::ThereAndBack | Traffic::PingPong => (true, false),
            Traffic::Paced { .. } => (false, true),
            _ => (false, false),
        };
        let mut any = false;
        for pair in &mut guest.pairs {
            let Pair { receive, transmit } = pair;
            if back {
                while let Some((head, _)) = transmit.pop() {
                    transmit.release(head);
                }
            }
            let mut pieces = 0;
            while let Some((head, length)) = receive.pop() {
                if pieces == 0 {
                    let buffer = receive.buffer(head);
                    let mut number = [0; 2];
                    if guest.mergeable {
                        buffer.read(HEADER - 2, &mut number);
                    }
                    pieces = u16::from_le_bytes(number).max(1);
                    self.outcome.frames += 1;
                    self.received += 1;
                    if timed {
                        let mut stamp = [0; 8];
                        buffer.read(HEADER + STAMP, &mut stamp);
                        self.outcome.times.push(now.saturating_sub(u64::from_le_bytes(stamp)));
                    }
                    if back && let Some(reply) = transmit.take() {
                        let mut bytes = [0; 64];
                        buffer.read(HEADER, &mut bytes[..(length - HEADER).min(64)]);
                        transmit.buffer(reply).write(HEADER, &bytes);
                        transmit.add(reply);
                    }
                    any = true;
                }
                pieces -= 1;
                receive.add(head);
            }
            if back {
                transmit.publish()?;
                transmit.disable_calls();
            }
            receive.publish()?;
            receive.disable_calls();
        }
        Ok(any)
    }

    /// Sends one frame there and back.
    fn ping_pong(&mut self) -> Result<()> {
        let overdue = Instant::now() + PATIENCE;
        // A back-end may drop frames until its network is up. A frame that takes this long is sent again, and not timed.
        let (mut began, mut resend) = (Instant::now(), Instant::now());
        loop {
            let now = Instant::now();
            ensure!(now < overdue, "timed out before a frame came back");
            if now >= resend {
                while self.network.try_receive()?.is_some() {}
                began = Instant::now();
                resend = began + RESEND;
                self.burst.send(self.network.as_fd(), 1)?;
            }
            if self.take_received()? {
                break;
            }
            if self.scenario.sleeps {
                self.sleep(|pair| [(false, pair)], Some(resend))?;
            }
        }
        while self.network.try_receive()?.is_none() {
            let left = resend.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if self.scenario.sleeps {
                let mut fds = [PollFd::new(self.network.as_fd(), PollFlags::POLLIN)];
                nix::poll::ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None)?;
            }
        }
        self.outcome.times.push(u64::try_from(began.elapsed().as_nanos())?);
        Ok(())
    }

    /// TAP to guest: sends the burst that is due, if any.
    fn paced(&mut self, rate: u32, burst: u32, end: Instant) -> Result<()> {
        let interval = 1_000_000_000 * u64::from(burst) / u64::from(rate);
        let now = self.now();
        // Do not make up for bursts that were not sent in time.
        self.due = self.due.max(now.saturating_sub(interval));
        if self.due <= now {
            let burst = usize::try_from(burst)?;
            (0..burst).for_each(|nth| self.burst.stamp(nth, now));
            self.burst.send(self.network.as_fd(), burst)?;
            self.due += interval;
        }
        if !self.take_received()? && self.scenario.sleeps {
            let due = self.began + Duration::from_nanos(self.due);
            self.sleep(|pair| [(false, pair)], Some(due.min(end)))?;
        }
        Ok(())
    }

    /// Sleeps until the device calls, as a guest does, or until `end`. `rings` returns the rings of a pair whose calls
    /// end the sleep: its transmit ring (`true`) or its receive ring.
    fn sleep<const N: usize>(
        &mut self,
        rings: impl for<'a> Fn(&'a Pair) -> [(bool, &'a Pair); N],
        end: Option<Instant>,
    ) -> Result<()> {
        let Some(guest) = &self.guest else { return Ok(()) };
        let rings = guest.pairs.iter().flat_map(rings);
        let rings: Vec<_> =
            rings.map(|(transmit, pair)| if transmit { &pair.transmit } else { &pair.receive }).collect();
        if rings.iter().any(|ring| ring.enable_calls()) {
            return Ok(());
        }
        let mut fds: Vec<_> =
            rings.iter().map(|ring| PollFd::new(ring.call.as_fd(), PollFlags::POLLIN)).collect();
        let left = end.map(|end| TimeSpec::from_duration(end.saturating_duration_since(Instant::now())));
        nix::poll::ppoll(&mut fds, left, None).context("cannot wait for a call")?;
        for ring in rings {
            self.outcome.calls += ring.take_calls()?;
        }
        Ok(())
    }
}
