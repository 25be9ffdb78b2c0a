//! A session that is to move to another back-end, and what is left when one of the two fails on the way.
//!
//! A *cell* is one attempt with one fault: [`mod@kill`], [`hang`], [`starve`], [`refuse`]. After each the [`Fate`] of the
//! session is what the table says: whoever has it serves on, with nothing lost or doubled that is not allowed for, the
//! front-end has heard nothing, nobody holds more than before, and the session moves on to the next.
//! The cells of one [`Arena`] have the same front-end as long as its session lives.

pub mod hang;
pub mod kill;
pub mod refuse;
pub mod starve;

use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{BackendState, Request, SessionReport};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::backend::{Backend, Rig, TAP};
use crate::datapath::Datapath;
use crate::downscript::Downscript;
use crate::fake_frontend::net::features;
use crate::fake_frontend::{Connection, Device, Options};
use crate::faults::{Action, Faults, Party, Point, has_reached};
use crate::load::{self, Demand, Outcome};
use crate::netns;
use crate::process::{Process, until};

/// What is sent while nothing may be lost.
const WHOLE: Demand = Demand { rate: RATE, under_way: [UNDER_WAY; 2], may_lose: 0, may_double: 0 };
/// Frames a second each way.
const RATE: u32 = 20_000;
/// The most frames of a direction that wait until somebody serves them: fewer than a ring or a queue of the TAP's holds.
const UNDER_WAY: u64 = 200;

/// What becomes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The source serves on, which never gave it away.
    Stays,
    /// The source serves again: the target is dead, which had taken it.
    Returns,
    /// The target serves, to which it was committed.
    Moves,
    /// The target serves, to which nothing was committed: the source is dead.
    Inherited,
    /// Nobody serves; the front-end sees its back-end end.
    Lost,
}

/// A session, and where it is: a back-end as it is shipped has it between two cells.
#[derive(Debug)]
pub struct Arena {
    rig: Rig,
    device: Device,
    options: Options,
    /// How many descriptors a back-end has to which the session came.
    held: Option<usize>,
    /// How many frames the TAP had no room for.
    dropped: u64,
    /// For the last owner.
    downscript: Downscript,
}

/// The two ends of a cell's attempt.
#[derive(Debug)]
struct Scene<'a> {
    source: &'a mut Backend,
    target: &'a mut Target,
    point: Point,
    action: Action,
}

/// A back-end to which the session is to move.
#[derive(Debug)]
struct Target {
    backend: Backend,
    /// How many descriptors it had at first.
    held: usize,
}

/// A hand-over that is under way.
#[derive(Debug)]
struct Attempt(JoinHandle<Result<SessionReport>>);

impl Attempt {
    /// What was reported, or why nothing was.
    fn end(self) -> Result<SessionReport> {
        until("the attempt ended", || Ok(self.0.is_finished()))?;
        self.0.join().map_err(|_| anyhow!("the attempt panicked"))?
    }

    /// The session has not moved; gives where and why not.
    fn end_rolled_back(self) -> Result<(String, String)> {
        match self.end()? {
            SessionReport::RolledBack { phase, reason } => Ok((phase, reason)),
            other => bail!("not rolled back: {other:?}"),
        }
    }

    /// The session has not moved, or was not begun to; gives where and why.
    fn end_refused(self) -> Result<String> {
        match self.end() {
            Ok(SessionReport::RolledBack { phase, reason }) => Ok(format!("{phase}: {reason}")),
            Ok(other) => bail!("not refused: {other:?}"),
            Err(error) => Ok(error.to_string()),
        }
    }

    /// The session has moved.
    fn end_completed(self) -> Result<()> {
        let report = self.end()?;
        ensure!(matches!(report, SessionReport::Completed { .. }), "not completed: {report:?}");
        Ok(())
    }
}

/// All points of a party that a session comes by whose descriptors go in one packet.
pub fn points(party: Party) -> impl Iterator<Item = Point> {
    let all = Point::ALL.iter().copied().filter(|point| *point != Point::TargetSessionGathering);
    all.filter(move |point| point.party() == party)
}

/// Whether the process that comes by this point has the session at first.
fn is_source(point: Point) -> bool {
    point.party() == Party::SourceSession
}

/// That the front-end has been told nothing, and is still connected.
fn check_quiet(connection: &Connection) -> Result<()> {
    let mut fds = [PollFd::new(connection.stream().as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut fds, PollTimeout::ZERO)? == 0, "the front-end's socket: {:?}", fds[0].revents());
    Ok(())
}

/// A back-end ends well, by itself.
fn check_ends(process: &mut Process) -> Result<()> {
    let status = process.wait()?;
    ensure!(status.success() && !process.log().contains("panicked"), "a back-end ended with {status}");
    Ok(())
}

impl Target {
    fn new(datapath: Datapath, faults: &Faults) -> Result<Self> {
        let backend = Backend::waiting_with_faults(datapath, &[], faults)?;
        let held = backend.process.open_fds()?;
        Ok(Self { backend, held })
    }

    /// It waits for the next session, and holds nothing of the last.
    fn check_waits(&mut self) -> Result<()> {
        let Self { backend, held } = self;
        until("the target had let go of the TAP", || {
            let status = backend.status()?;
            Ok(status.state == BackendState::Waiting && status.tap.is_empty())
        })?;
        backend.process.wait_open_fds(*held)
    }

    /// It serves.
    fn wait_serving(&mut self) -> Result<()> {
        until("the target served", || Ok(self.backend.status()?.state == BackendState::Serving))
    }
}

impl Scene<'_> {
    fn attempt(&self) -> Attempt {
        let (control, path) = (self.source.control.clone(), self.target.backend.incoming());
        Attempt(thread::spawn(move || {
            let path = Some(path.display().to_string());
            let request = Request::Handover { path, on_suspend: false, dry_run: false, cancel: false };
            Ok(serde_json::from_value(ControlClient::connect(&control)?.call(&request)?)?)
        }))
    }

    /// The process that comes by the point.
    fn faulty(&mut self) -> &mut Process {
        if is_source(self.point) { &mut self.source.process } else { &mut self.target.backend.process }
    }

    /// That the point was reached, or the cell has shown nothing.
    fn check_reached(&mut self) -> Result<()> {
        let (point, action) = (self.point, self.action);
        self.faulty().wait_until("it came by the fault point", |process| {
            Ok(has_reached(&process.log(), point, action).then_some(()))
        })
    }
}

impl Arena {
    /// A front-end with a session that works.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(datapath: Datapath, queue_pairs: u16, queue_size: u16) -> Result<Self> {
        let downscript = Downscript::new()?;
        let mut rig = Rig::new(datapath, queue_pairs, &[&downscript.option()])?;
        let features = Options::default().features | features::MQ;
        let options = Options { queue_pairs, queue_size, features, ..Options::default() };
        let mut device = rig.device(options.clone())?;
        rig.check_traffic(&mut device)?;
        let mut arena = Self { rig, device, options, held: None, dropped: 0, downscript };
        arena.hand_on(None, &Faults::default())?;
        Ok(arena)
    }

    /// The front-end stops its rings, starts them again and leaves, and the back-end ends; all goes well.
    ///
    /// # Errors
    /// If it does not.
    pub fn end(mut self) -> Result<()> {
        self.device.suspend()?;
        self.device.restart_rings()?;
        self.rig.check_traffic(&mut self.device)?;
        drop(self.device);
        self.rig.backend.fds_at_rest()?;
        self.rig.backend.check_healthy()?;
        self.rig.backend.process.signal(Signal::SIGTERM)?;
        check_ends(&mut self.rig.backend.process)?;
        let runs = self.downscript.runs()?;
        ensure!(runs == [TAP], "the downscript was run for {runs:?}");
        Ok(())
    }

    /// Runs a cell: `body` says what it is to lead to, while this load goes on, whose outcome is given. The process that
    /// comes by the point has the fault, the other one this hurry.
    fn cell(
        &mut self,
        point: Point,
        action: Action,
        hurry: u32,
        demand: Demand,
        body: impl FnOnce(&mut Scene<'_>) -> Result<Fate>,
    ) -> Result<Outcome> {
        let began = Instant::now();
        let mut log = String::new();
        let result = self.run(point, action, hurry, demand, body, &mut log);
        eprintln!("{}, {action:?}: {:?}", point.name(), began.elapsed());
        result.with_context(|| {
            let here = self.rig.backend.process.log();
            format!("{}, {action:?}\n{here}\nthe other one:\n{log}", point.name())
        })
    }

    fn run(
        &mut self,
        point: Point,
        action: Action,
        hurry: u32,
        demand: Demand,
        body: impl FnOnce(&mut Scene<'_>) -> Result<Fate>,
        log: &mut String,
    ) -> Result<Outcome> {
        let (fault, other) = (Faults::at(point, action), Faults::default().hurried(hurry));
        let (source, target) = if is_source(point) { (&fault, &other) } else { (&other, &fault) };
        if source.any() {
            self.hand_on(None, source).context("to the source")?;
        }
        let mut target = Target::new(self.rig.datapath, target)?;
        let held = self.rig.backend.process.open_fds()?;
        let Rig { network, backend, .. } = &mut self.rig;
        let mut scene = Scene { source: backend, target: &mut target, point, action };
        let result = load::run_with(&mut self.device, network, demand, || body(&mut scene));
        *log = target.backend.process.log();
        let (fate, outcome) = result?;
        eprintln!("{}, {action:?}: {fate:?}, {outcome:?}", point.name());
        if demand.under_way[0] > UNDER_WAY {
            self.dropped = netns::counters(TAP)?.tx_dropped;
        }
        let next = match fate {
            Fate::Stays | Fate::Returns => {
                self.rig.backend.process.wait_open_fds(held)?;
                if target.backend.process.is_running()? {
                    target.check_waits()?;
                    Some(target)
                } else {
                    None
                }
            }
            Fate::Moves | Fate::Inherited => {
                let mut source = self.rig.backend.succeeded_by(target.backend);
                // One that was killed has ended otherwise.
                if !is_source(point) || !action.kills() {
                    check_ends(&mut source)?;
                }
                None
            }
            Fate::Lost => {
                self.device.connection.wait_closed()?;
                self.rig.restart_backend()?;
                self.device = self.rig.device(self.options.clone())?;
                let waits = target.backend.process.is_running()?;
                if waits {
                    target.check_waits()?;
                }
                waits.then_some(target)
            }
        };
        self.check()?;
        self.hand_on(next.map(|target| target.backend), &Faults::default()).context("afterwards")?;
        Ok(outcome)
    }

    /// The session works, and the front-end has heard nothing.
    fn check(&mut self) -> Result<()> {
        self.rig.check_traffic(&mut self.device)?;
        check_quiet(&self.device.connection)?;
        let dropped = netns::counters(TAP)?.tx_dropped;
        ensure!(self.downscript.runs()?.is_empty(), "the downscript was run while there is an owner");
        ensure!(dropped == self.dropped, "the TAP dropped {dropped} frames instead of {}", self.dropped);
        self.rig.backend.check_healthy()
    }

    /// Hands the session on, to this back-end or a new one with these faults.
    fn hand_on(&mut self, target: Option<Backend>, faults: &Faults) -> Result<()> {
        let target = match target {
            Some(target) => target,
            None => Backend::waiting_with_faults(self.rig.datapath, &[], faults)?,
        };
        self.rig.backend.become_target(target)?;
        self.check()?;
        // What it had for the hand-over is closed when it answers.
        self.rig.backend.status()?;
        let held = *self.held.get_or_insert(self.rig.backend.process.open_fds()?);
        self.rig.backend.process.wait_open_fds(held)
    }
}
