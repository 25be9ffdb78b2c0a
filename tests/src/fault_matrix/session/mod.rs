//! The part of the fault matrix where a session moves from one back-end to another, and one of the two fails.
//!
//! After each case of [`mod@kill`], [`hang`], [`starve`] and [`refuse`] the session has the [`Fate`] that the matrix
//! expects: its owner serves with no more frames lost or duplicated than the case allows, the front-end has received
//! nothing, no process has more descriptors than before, and the session moves on to the next back-end.

pub mod hang;
pub mod kill;
pub mod refuse;
pub mod starve;

use anyhow::{Context, Result, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{BackendState, Request, SessionReport};
use nix::sys::signal::Signal;

use super::{Attempt, check_ends, run_case};
use crate::backend::{Backend, Rig, TAP};
use crate::datapath::Datapath;
use crate::downscript::Downscript;
use crate::fake_frontend::net::features;
use crate::fake_frontend::{Device, Options};
use crate::faults::{Action, Faults, Party, Point, has_reached};
use crate::load::{self, Demand, Outcome};
use crate::netns;
use crate::process::{Process, until};

/// The load of a case in which no frame may be lost.
const LOSSLESS: Demand = Demand { rate: RATE, in_flight: [IN_FLIGHT; 2], may_lose: 0, may_double: 0 };
/// Frames a second each way.
const RATE: u32 = 20_000;
/// The maximum number of frames in flight per direction: fewer than a ring or a queue of the TAP holds.
const IN_FLIGHT: u64 = 200;

/// What becomes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The source serves on; it never gave the session away.
    Stays,
    /// The target took the session and died; the source serves again.
    Returns,
    /// The source committed the session; the target serves.
    Moves,
    /// The source died before it committed the session; the target serves.
    Inherited,
    /// No process serves; the front-end sees the connection close.
    Lost,
}

/// A front-end with a session. Between two cases a back-end without fault points has the session.
#[derive(Debug)]
pub struct Fixture {
    rig: Rig,
    device: Device,
    options: Options,
    /// How many descriptors a back-end has after it took the session.
    held: Option<usize>,
    /// How many frames the TAP has dropped so far.
    dropped: u64,
    /// The downscript, which only the last owner of the TAP may run.
    downscript: Downscript,
}

/// The source and the target of one case.
#[derive(Debug)]
struct Case<'a> {
    source: &'a mut Backend,
    target: &'a mut Target,
    point: Point,
    action: Action,
}

/// A back-end to which the session is to move.
#[derive(Debug)]
struct Target {
    backend: Backend,
    /// How many descriptors it had before the attempt.
    held: usize,
}

impl Attempt<SessionReport> {
    /// Expects a rollback, or an error before the hand-over began; returns its text.
    fn end_refused(self) -> Result<String> {
        match self.end() {
            Ok(SessionReport::RolledBack { phase, reason }) => Ok(format!("{phase}: {reason}")),
            Ok(other) => bail!("not refused: {other:?}"),
            Err(error) => Ok(error.to_string()),
        }
    }
}

/// The fault points of a party that it reaches where the descriptors of the session fit in one packet.
fn points(party: Party) -> impl Iterator<Item = Point> {
    super::points(party).filter(|point| *point != Point::TargetSessionGathering)
}

/// Runs a case at each of the points, with one session.
fn at_each(
    points: impl IntoIterator<Item = Point>,
    datapath: Datapath,
    queue_pairs: u16,
    mut case: impl FnMut(&mut Fixture, Point) -> Result<()>,
) -> Result<()> {
    let mut fixture = Fixture::new(datapath, queue_pairs, 256)?;
    points.into_iter().try_for_each(|point| case(&mut fixture, point))?;
    fixture.end()
}

/// Runs a case at each fault point of the target and of the source, with one session.
fn everywhere(
    datapath: Datapath,
    queue_pairs: u16,
    case: impl FnMut(&mut Fixture, Point) -> Result<()>,
) -> Result<()> {
    let parties = [Party::TargetSession, Party::SourceSession];
    at_each(parties.into_iter().flat_map(points), datapath, queue_pairs, case)
}

/// Whether the source reaches this point.
fn is_source(point: Point) -> bool {
    point.party() == Party::SourceSession
}

impl Target {
    fn new(datapath: Datapath, faults: &Faults) -> Result<Self> {
        let backend = Backend::waiting_with_faults(datapath, &[], faults)?;
        let held = backend.process.open_fds()?;
        Ok(Self { backend, held })
    }

    /// Waits until the target accepts a session again and has no more descriptors than before the attempt.
    fn check_waits(&mut self) -> Result<()> {
        let Self { backend, held } = self;
        until("the target had let go of the TAP", || {
            let status = backend.status()?;
            Ok(status.state == BackendState::Waiting && status.tap.is_empty())
        })?;
        backend.process.wait_open_fds(*held)
    }

    /// Waits until the target serves.
    fn wait_serving(&mut self) -> Result<()> {
        until("the target served", || Ok(self.backend.status()?.state == BackendState::Serving))
    }
}

impl Case<'_> {
    fn attempt(&self) -> Attempt<SessionReport> {
        let (control, path) = (self.source.control.clone(), self.target.backend.incoming());
        Attempt::start(move || {
            let path = Some(path.display().to_string());
            let request = Request::Handover { path, on_suspend: false, dry_run: false, cancel: false };
            Ok(serde_json::from_value(ControlClient::connect(&control)?.call(&request)?)?)
        })
    }

    /// The process that reaches the point.
    fn faulty(&mut self) -> &mut Process {
        if is_source(self.point) { &mut self.source.process } else { &mut self.target.backend.process }
    }

    /// Checks that the process reached the point; otherwise the case has shown nothing.
    fn check_reached(&mut self) -> Result<()> {
        let (point, action) = (self.point, self.action);
        self.faulty().wait_until("it reached the fault point", |process| {
            Ok(has_reached(&process.log(), point, action).then_some(()))
        })
    }
}

impl Fixture {
    /// Starts a back-end and a front-end, and checks that their session works.
    ///
    /// # Errors
    /// Returns an error if the back-end or the front-end cannot be set up, or the session does not work.
    pub fn new(datapath: Datapath, queue_pairs: u16, queue_size: u16) -> Result<Self> {
        let downscript = Downscript::new()?;
        let mut rig = Rig::new(datapath, queue_pairs, &[&downscript.option()])?;
        let features = Options::default().features | features::MQ;
        let options = Options { queue_pairs, queue_size, features, ..Options::default() };
        let mut device = rig.device(options.clone())?;
        rig.check_traffic(&mut device)?;
        let mut fixture = Self { rig, device, options, held: None, dropped: 0, downscript };
        fixture.hand_on(None, &Faults::default())?;
        Ok(fixture)
    }

    /// Restarts the rings, disconnects the front-end and ends the back-end.
    ///
    /// # Errors
    /// Returns an error if one of these steps fails, or the downscript was not run exactly once.
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

    /// Runs a case under the load `demand`, whose outcome is returned; `body` returns the fate of the session. The
    /// process that reaches the point has the fault, and `hurry` divides the timeouts of the other one.
    fn case(
        &mut self,
        point: Point,
        action: Action,
        hurry: u32,
        demand: Demand,
        body: impl FnOnce(&mut Case<'_>) -> Result<Fate>,
    ) -> Result<Outcome> {
        run_case(point, action, || {
            let mut log = String::new();
            let result = self.run(point, action, hurry, demand, body, &mut log);
            result.with_context(|| format!("{}\nthe target:\n{log}", self.rig.backend.process.log()))
        })
    }

    fn run(
        &mut self,
        point: Point,
        action: Action,
        hurry: u32,
        demand: Demand,
        body: impl FnOnce(&mut Case<'_>) -> Result<Fate>,
        log: &mut String,
    ) -> Result<Outcome> {
        let (fault, other) = (Faults::at(point, action), Faults::default().hurried(hurry));
        let (source, target) = if is_source(point) { (&fault, &other) } else { (&other, &fault) };
        if source.any() {
            self.hand_on(None, source).context("hand-over to the source")?;
        }
        let mut target = Target::new(self.rig.datapath, target)?;
        let held = self.rig.backend.process.open_fds()?;
        let Rig { network, backend, .. } = &mut self.rig;
        let mut case = Case { source: backend, target: &mut target, point, action };
        let result = load::run_with(&mut self.device, network, demand, || body(&mut case));
        *log = target.backend.process.log();
        let (fate, outcome) = result?;
        eprintln!("{}, {action:?}: {fate:?}, {outcome:?}", point.name());
        if demand.in_flight[0] > IN_FLIGHT {
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
                // A killed source does not exit successfully.
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
        self.hand_on(next.map(|target| target.backend), &Faults::default())
            .context("hand-over after the case")?;
        Ok(outcome)
    }

    /// Checks that the session works and that the front-end has received nothing.
    fn check(&mut self) -> Result<()> {
        self.rig.check_traffic(&mut self.device)?;
        self.device.connection.check_quiet()?;
        let dropped = netns::counters(TAP)?.tx_dropped;
        ensure!(self.downscript.runs()?.is_empty(), "the downscript was run while the TAP has an owner");
        ensure!(dropped == self.dropped, "the TAP dropped {dropped} frames instead of {}", self.dropped);
        self.rig.backend.check_healthy()
    }

    /// Hands the session on to this back-end, or to a new one with these faults.
    fn hand_on(&mut self, target: Option<Backend>, faults: &Faults) -> Result<()> {
        let target = match target {
            Some(target) => target,
            None => Backend::waiting_with_faults(self.rig.datapath, &[], faults)?,
        };
        self.rig.backend.become_target(target)?;
        self.check()?;
        // Once the back-end answers, it has closed the descriptors that it used for the hand-over.
        self.rig.backend.status()?;
        let held = *self.held.get_or_insert(self.rig.backend.process.open_fds()?);
        self.rig.backend.process.wait_open_fds(held)
    }
}
