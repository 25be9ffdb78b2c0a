//! One cell of the table: a session of one size under one load, handed on again and again.

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

/// The shortest interval.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long a back-end that has just started or ended is given to be out of the way.
const REST: Duration = Duration::from_millis(5);

/// The phases of a blackout, in their order.
pub const PHASES: [&str; 5] = ["stop", "commit", "pass", "take", "start"];

/// What is handed on, under which load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Queue pairs.
    pub pairs: u16,
    /// How many of them have frames.
    pub busy: u16,
    /// The guest's memory, in MiB.
    pub memory: u64,
    /// Frames a second each way.
    pub rate: u32,
}

/// What came of it, all times in microseconds.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The cell.
    pub cell: Cell,
    /// The worst gap of each interval with a hand-over.
    pub gaps: Vec<i64>,
    /// And without.
    pub control_gaps: Vec<i64>,
    /// The slowest frame of each interval with a hand-over.
    pub delays: Vec<i64>,
    /// And without.
    pub control_delays: Vec<i64>,
    /// As it was reported.
    pub blackouts: Vec<i64>,
    /// Each of the [`PHASES`], as it was reported.
    pub phases: [Vec<i64>; PHASES.len()],
    /// What became of the frames.
    pub count: Count,
}

impl Measured {
    /// Nothing yet of `cell`.
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

    /// A quantile of the gaps less the control's, and the same for the slowest frames.
    pub fn excess(&self) -> [Quantiles; 2] {
        let less = |with: &[i64], without: &[i64]| {
            let (with, without) =
                (Quantiles::of(with.iter().copied()), Quantiles::of(without.iter().copied()));
            Quantiles {
                p50: with.p50 - without.p50,
                p99: with.p99 - without.p99,
                max: with.max - without.max,
            }
        };
        [less(&self.gaps, &self.control_gaps), less(&self.delays, &self.control_delays)]
    }
}

/// A back-end, and who drives it, in a namespace of their own.
#[derive(Debug)]
pub struct Bench {
    /// Who serves.
    pub backend: Backend,
    driver: Process,
    line: Line,
    _netns: Netns,
}

/// Leaves the last processor to the driver: everything else that this thread starts is kept off it. With one processor
/// nothing is changed.
///
/// # Errors
/// The system's.
pub fn leave_processor() -> Result<()> {
    let (others, _) = processors()?;
    Ok(sched_setaffinity(Pid::from_raw(0), &others)?)
}

/// Takes this thread, and those that it starts, to the processor that was left to it.
///
/// # Errors
/// The system's.
pub fn take_processor() -> Result<()> {
    let (_, last) = processors()?;
    Ok(sched_setaffinity(Pid::from_raw(0), &last)?)
}

/// All processors but the last, and that.
fn processors() -> Result<(CpuSet, CpuSet)> {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)?.context("no processors")?;
    let last = usize::try_from(count)?.saturating_sub(1);
    let (mut others, mut own) = (CpuSet::new(), CpuSet::new());
    (0..last.max(1)).try_for_each(|processor| others.set(processor))?;
    own.set(last)?;
    Ok((others, own))
}

impl Bench {
    /// Under the load of `cell`. A `restful` driver lets others have its processor.
    ///
    /// # Errors
    /// If anything cannot be set up.
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
                bail!("the driver ended ({status}); its log:\n{}", self.driver.log())
            }
        }
    }

    /// Ends an interval and begins the next one.
    ///
    /// # Errors
    /// If the driver has ended.
    pub fn mark(&mut self) -> Result<Worst> {
        self.order(Order::Mark)
    }

    /// Sends at this rate from now on.
    ///
    /// # Errors
    /// If the driver has ended.
    pub fn set_rate(&mut self, rate: u32) -> Result<()> {
        self.order::<Worst>(Order::Rate(rate)).map(drop)
    }

    /// Lets all arrive that is to come, and counts it.
    ///
    /// # Errors
    /// If the driver has ended.
    pub fn settle(&mut self) -> Result<Count> {
        self.order(Order::Settle)
    }

    /// Starts a back-end that waits, and gives it a moment to be quiet.
    fn target() -> Result<Backend> {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        sleep(REST);
        Ok(target)
    }

    /// Hands the session on to another process.
    ///
    /// # Errors
    /// If that fails.
    pub fn hand_on(&mut self) -> Result<SessionReport> {
        self.backend.become_target(Self::target()?)
    }

    /// Starts a back-end and ends it again, with nothing handed over: what else a hand-over costs a machine.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_another() -> Result<()> {
        Self::target().map(drop)
    }

    /// Measures so many hand-overs under the load that runs, and as many intervals without; adds them to `measured`.
    ///
    /// # Errors
    /// If a hand-over fails.
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
                all.push(i64::try_from(*phases.get(name).context("a phase is missing")?)?);
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
