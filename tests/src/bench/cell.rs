//! Measures one cell of the table: a session of one size under one load, handed over repeatedly.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_protocol::control::SessionReport;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::message::{Count, Line, Order, Worst};
use super::numbers::Quantiles;
use crate::backend::{Backend, TAP};
use crate::datapath::Datapath;
use crate::netns::Netns;
use crate::process::Process;
use crate::programs;

/// The minimum length of an interval.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long to wait after a back-end starts or ends, until it no longer competes for processors.
const REST: Duration = Duration::from_millis(5);

/// The phases of a blackout, in order.
pub const PHASES: [&str; 5] = ["stop", "commit", "pass", "take", "start"];

/// The size of the session that is handed over, and the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Queue pairs.
    pub pairs: u16,
    /// How many of them carry frames.
    pub busy: u16,
    /// The guest's memory, in MiB.
    pub memory: u64,
    /// Frames a second each way.
    pub rate: u32,
}

/// The measurements of a cell. All times are in microseconds.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The cell.
    pub cell: Cell,
    /// The longest gap of each interval with a hand-over.
    pub gaps: Vec<i64>,
    /// The longest gap of each control interval.
    pub control_gaps: Vec<i64>,
    /// The longest delay of a frame in each interval with a hand-over.
    pub delays: Vec<i64>,
    /// The longest delay of a frame in each control interval.
    pub control_delays: Vec<i64>,
    /// The blackout that each hand-over reported.
    pub blackouts: Vec<i64>,
    /// The duration of each of the [`PHASES`] that each hand-over reported.
    pub phases: [Vec<i64>; PHASES.len()],
    /// The frames sent, lost, duplicated and reordered.
    pub count: Count,
}

impl Measured {
    /// Measurements of `cell` before the first hand-over.
    pub fn nothing(cell: Cell) -> Self {
        Self {
            cell,
            gaps: Vec::new(),
            control_gaps: Vec::new(),
            delays: Vec::new(),
            control_delays: Vec::new(),
            blackouts: Vec::new(),
            phases: Default::default(),
            count: Count { quiet: true, ..Count::default() },
        }
    }

    /// How much longer the median gap is with a hand-over than without.
    pub fn excess_gap(&self) -> i64 {
        let median = |gaps: &[i64]| Quantiles::of(gaps.iter().copied()).p50;
        median(&self.gaps) - median(&self.control_gaps)
    }
}

/// A back-end and the process that drives it, in a private network namespace.
#[derive(Debug)]
pub struct Bench {
    /// The back-end that has the session.
    pub backend: Backend,
    driver: Process,
    line: Line,
    _netns: Netns,
}

/// Keeps this thread, and everything that it starts, off the last processor, which is reserved for the driver. Has no
/// effect on a machine with one processor.
///
/// # Errors
/// Returns an error if the affinity cannot be set.
pub fn leave_processor() -> Result<()> {
    let (others, _) = processors()?;
    Ok(sched_setaffinity(Pid::from_raw(0), &others)?)
}

/// Binds this thread, and those that it starts, to the processor reserved by [`leave_processor`].
///
/// # Errors
/// Returns an error if the affinity cannot be set.
pub fn take_processor() -> Result<()> {
    let (_, last) = processors()?;
    Ok(sched_setaffinity(Pid::from_raw(0), &last)?)
}

/// Returns the set of all processors but the last, and the set of the last one.
fn processors() -> Result<(CpuSet, CpuSet)> {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)?.context("no processors")?;
    let last = usize::try_from(count)?.saturating_sub(1);
    let (mut others, mut own) = (CpuSet::new(), CpuSet::new());
    (0..last.max(1)).try_for_each(|processor| others.set(processor))?;
    own.set(last)?;
    Ok((others, own))
}

impl Bench {
    /// Starts a back-end and a driver with the load of `cell`. A `restful` driver shares its processor.
    ///
    /// # Errors
    /// Returns an error if the namespace, the back-end or the driver cannot be set up.
    pub fn new(cell: Cell, restful: bool) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, cell.pairs > 1)?;
        let arguments = [format!("--tap={TAP}"), format!("--queue-pairs={}", cell.pairs)];
        let mut backend =
            Backend::listening(Datapath::Userspace, &arguments.each_ref().map(String::as_str), &[])?;
        backend.status()?;
        let (here, there) = UnixStream::pair()?;
        let there = OwnedFd::from(there);
        let mut arguments = vec![
            "drive".to_owned(),
            format!("--line={}", there.as_raw_fd()),
            format!("--socket={}", backend.socket.display()),
            format!("--tap={TAP}"),
            format!("--pairs={}", cell.pairs),
            format!("--busy={}", cell.busy),
            format!("--memory={}", cell.memory << 20),
            format!("--rate={}", cell.rate),
        ];
        arguments.extend(restful.then(|| "--restful".to_owned()));
        let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
        let driver = Process::start(&programs::bench_handover()?, &arguments, &[there.as_fd()])?;
        drop(there);
        let line = Line::from(OwnedFd::from(here));
        Ok(Self { backend, driver, line, _netns: netns })
    }

    fn order<T: serde::de::DeserializeOwned>(&mut self, order: Order) -> Result<T> {
        self.line.say(&order)?;
        match self.line.hear()? {
            Some(answer) => Ok(answer),
            None => {
                let status = self.driver.wait()?;
                bail!("the driver exited with {status}; log:\n{}", self.driver.log())
            }
        }
    }

    /// Ends an interval and begins the next one. Returns the longest gap and delay of the one that ended.
    ///
    /// # Errors
    /// Returns an error if the driver has ended.
    pub fn mark(&mut self) -> Result<Worst> {
        self.order(Order::Mark)
    }

    /// Changes the rate of the load, in frames a second each way.
    ///
    /// # Errors
    /// Returns an error if the driver has ended.
    pub fn set_rate(&mut self, rate: u32) -> Result<()> {
        self.order::<Worst>(Order::Rate(rate)).map(drop)
    }

    /// Pauses the load until all frames in flight have arrived. Returns the counts since the last call.
    ///
    /// # Errors
    /// Returns an error if the driver has ended.
    pub fn settle(&mut self) -> Result<Count> {
        self.order(Order::Settle)
    }

    /// Starts a back-end that waits for a session, and waits for [`REST`].
    fn target() -> Result<Backend> {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        sleep(REST);
        Ok(target)
    }

    /// Hands the session over to a new back-end.
    ///
    /// # Errors
    /// Returns an error if the hand-over fails.
    pub fn hand_on(&mut self) -> Result<SessionReport> {
        self.backend.become_target(Self::target()?)
    }

    /// Starts a back-end and ends it without a hand-over, as the control of [`super::row`]: the load that comes with a
    /// hand-over but is not part of it.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started.
    pub fn start_another() -> Result<()> {
        Self::target().map(drop)
    }

    /// Measures `handovers` hand-overs and as many control intervals under the current load. Adds them to `measured`.
    ///
    /// # Errors
    /// Returns an error if a hand-over fails.
    pub fn measure(&mut self, measured: &mut Measured, handovers: usize) -> Result<()> {
        self.settle()?;
        for handover in 0..handovers {
            let target = Self::target()?;
            self.mark()?;
            let began = Instant::now();
            let report =
                self.backend.become_target(target).with_context(|| format!("hand-over {handover}"))?;
            let took = began.elapsed().max(INTERVAL);
            sleep(took.saturating_sub(began.elapsed()));
            let worst = self.mark()?;
            measured.gaps.push(microseconds(worst.gap));
            measured.delays.push(microseconds(worst.delay));
            let SessionReport::Completed { blackout_us, phases } = report else { bail!("{report:?}") };
            measured.blackouts.push(i64::try_from(blackout_us)?);
            for (all, name) in measured.phases.iter_mut().zip(PHASES) {
                all.push(i64::try_from(*phases.get(name).with_context(|| format!("no phase {name}"))?)?);
            }
            sleep(REST);
            self.mark()?;
            sleep(took);
            let worst = self.mark()?;
            measured.control_gaps.push(microseconds(worst.gap));
            measured.control_delays.push(microseconds(worst.delay));
        }
        measured.count = self.settle()?.and(measured.count);
        Ok(())
    }
}

fn microseconds(nanoseconds: u64) -> i64 {
    i64::try_from(nanoseconds / 1000).unwrap_or(i64::MAX)
}
