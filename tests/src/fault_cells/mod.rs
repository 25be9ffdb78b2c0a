//! A guest that is to move to another baton-vmm with its TAP, and what is left when one of the four processes fails on
//! the way.
//!
//! A *cell* is one attempt with one fault: [`mod@kill`], [`hang`], [`starve`], [`refuse`]. After each there is exactly one
//! VM, which has its network, nobody else holds its TAP, and every process that lives has let go of what it had taken.
//! The cells of one [`Arena`] have the same guest as long as it lives.

pub mod hang;
pub mod kill;
pub mod refuse;
pub mod starve;

use std::collections::HashMap;
use std::fs;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{Frontend, MigrationReport, Request, VmmState, VmmStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::faults::{Action, Faults, Party, Point, has_reached};
use crate::local_migration::{Kind, Stay, Traveller, Wanted, Way};
use crate::netns;
use crate::process::until;

/// A guest, and what is remembered from cell to cell.
#[derive(Debug)]
pub struct Arena {
    kind: Kind,
    /// How much shorter everybody's patience is.
    hurry: u32,
    /// The guest.
    traveller: Traveller,
    /// How few descriptors each process had after a cell, and after one in which the TAP was put aside: the ownership word
    /// of the last hand-over is kept.
    held: HashMap<(u32, bool), usize>,
}

/// A place to which the guest is to move.
#[derive(Debug)]
struct Target {
    stay: Stay,
    /// How many descriptors its VMM and its back-end had at first.
    held: [usize; 2],
}

/// An attempt that is under way.
#[derive(Debug)]
struct Attempt(JoinHandle<Result<MigrationReport>>);

impl Attempt {
    /// What was reported, or why nothing was.
    fn end(self) -> Result<MigrationReport> {
        until("the attempt ended", || Ok(self.0.is_finished()))?;
        self.0.join().map_err(|_| anyhow!("the attempt panicked"))?
    }

    /// The VM has not moved; gives where and why not.
    fn end_rolled_back(self) -> Result<(String, String)> {
        match self.end()? {
            MigrationReport::RolledBack { phase, reason } => Ok((phase, reason)),
            other => bail!("not rolled back: {other:?}"),
        }
    }

    /// The VM has moved.
    fn end_completed(self) -> Result<()> {
        let report = self.end()?;
        ensure!(matches!(report, MigrationReport::Completed { .. }), "not completed: {report:?}");
        Ok(())
    }
}

/// How many queues of this TAP a process holds.
fn queues_held(process: u32, tap: &str) -> Result<usize> {
    let line = format!("iff:\t{tap}");
    let mut held = 0;
    for entry in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        // One that has been closed since is not held.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        held += usize::from(info.lines().any(|said| said == line));
    }
    Ok(held)
}

fn open_fds(process: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

fn is_vmm(party: Party) -> bool {
    matches!(party, Party::SourceVmm | Party::TargetVmm)
}

fn is_source(party: Party) -> bool {
    matches!(party, Party::SourceVmm | Party::SourceBackend)
}

/// Whether the VM stays with its source when a process dies or hangs there. Once the device is offered the back-ends
/// need no more of its source; and the device is taken after the VM is.
pub fn stays(point: Point) -> bool {
    !matches!(
        point,
        Point::SourceVmmOffered
            | Point::SourceVmmCommitSent
            | Point::SourceVmmCompleted
            | Point::TargetVmmTaken
            | Point::TargetVmmResumed
            | Point::SourceBackendAdopted
            | Point::SourceBackendHandedOver
            | Point::TargetBackendTaking
            | Point::TargetBackendTaken
            | Point::TargetBackendActive
    )
}

/// The points of a party where the VM stays with its source, or those where it does not.
pub fn points(party: Party, stays: bool) -> impl Iterator<Item = Point> {
    let all = Point::ALL.iter().copied();
    all.filter(move |point| point.party() == party && self::stays(*point) == stays)
}

impl Arena {
    /// Boots a guest, at a place with these faults.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(kind: Kind, hurry: u32, faults: Faults) -> Result<Self> {
        let traveller = Traveller::with_faults(kind, &faults.hurried(hurry))?;
        let mut arena = Self { kind, hurry, traveller, held: HashMap::new() };
        arena.traveller.check_pings(3)?;
        Ok(arena)
    }

    /// Switches the guest off; everything must end well.
    ///
    /// # Errors
    /// If it does not.
    pub fn end(self) -> Result<()> {
        self.traveller.end()
    }

    /// Runs a cell, and says of a failure where it was.
    fn cell(
        &mut self,
        point: Point,
        action: Action,
        body: impl FnOnce(&mut Self, &mut Target) -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        let mut target = None;
        let result = self.prepare(point, action).and_then(|place| body(self, target.insert(place)));
        eprintln!("{}, {action:?}: {:?}", point.name(), began.elapsed());
        if let (Err(_), Some(target), Action::Stop) = (&result, &target, action) {
            // One that hangs answers nobody. It may have ended.
            let _ = signal(self.process_at(target, point).0, Signal::SIGCONT);
        }
        result.with_context(|| {
            let of_target = target.map(|mut target| target.stay.evidence());
            let here = self.traveller.evidence();
            format!(
                "{}, {action:?}\n{here}\nthe other place:\n{}",
                point.name(),
                of_target.unwrap_or_default()
            )
        })
    }

    /// Has the process that comes by this point fail there; gives a place to move to.
    fn prepare(&mut self, point: Point, action: Action) -> Result<Target> {
        let (faults, none) = (Faults::at(point, action), Faults::default());
        match point.party() {
            Party::TargetVmm | Party::TargetBackend => return self.place(faults),
            Party::SourceBackend => self.replace_backend(faults)?,
            // One that was booted with it has it.
            Party::SourceVmm if self.traveller.stay.faults.has(point) => {}
            Party::SourceVmm => self.move_to(faults)?,
            Party::SourceSession | Party::TargetSession => bail!("no session is handed over here"),
        }
        self.place(none)
    }

    fn place(&mut self, faults: Faults) -> Result<Target> {
        let faults = faults.hurried(self.hurry);
        let mut stay = self.traveller.place(Way::SameTap, |wanted| Wanted { faults, ..wanted })?;
        ensure!(stay.backend.status()?.tap.is_empty());
        let held = [open_fds(stay.guest.process())?, open_fds(stay.backend.process.pid())?];
        Ok(Target { stay, held })
    }

    /// Moves the guest, without any fault on the way.
    fn move_to(&mut self, faults: Faults) -> Result<()> {
        let target = self.place(faults)?;
        self.attempt(&target).end_completed()?;
        self.traveller.settle(target.stay)?;
        self.check_network()
    }

    /// Has the back-end where the guest is replaced by one with these faults.
    fn replace_backend(&mut self, faults: Faults) -> Result<()> {
        self.traveller.stay.replace_backend(self.kind, &faults.hurried(self.hurry))?;
        self.check_network()
    }

    fn attempt(&self, target: &Target) -> Attempt {
        let (control, path) = (self.traveller.stay.control().to_owned(), target.stay.incoming());
        Attempt(thread::spawn(move || {
            let request = Request::Migrate { path, local: true, dry_run: false };
            let mut client = ControlClient::connect(&control)?;
            let report = serde_json::from_value(client.call(&request)?)?;
            // Who has lost the answer finds it there.
            let status: VmmStatus = serde_json::from_value(client.call(&Request::Status)?)?;
            ensure!(status.migration.as_ref() == Some(&report), "{report:?}, but {status:?}");
            Ok(report)
        }))
    }

    /// The process that comes by a point, and what it has said.
    fn process_at(&self, target: &Target, point: Point) -> (Pid, String) {
        let stay = if is_source(point.party()) { &self.traveller.stay } else { &target.stay };
        let (process, log) = if is_vmm(point.party()) {
            (stay.guest.process(), stay.guest.log())
        } else {
            (stay.backend.process.pid(), stay.backend.process.log())
        };
        (Pid::from_raw(i32::try_from(process).unwrap_or(i32::MAX)), log)
    }

    /// That the point was reached, or the cell has shown nothing.
    fn check_reached(&self, target: &Target, point: Point, action: Action) -> Result<()> {
        let (_, log) = self.process_at(target, point);
        ensure!(has_reached(&log, point, action), "{} was not reached: {log}", point.name());
        Ok(())
    }

    /// The guest runs where it is, with its network; nobody else has its TAP.
    fn check_network(&mut self) -> Result<()> {
        let stay = &mut self.traveller.stay;
        until("the VM ran", || Ok(stay.status()?.state == VmmState::Running))?;
        until("its back-end was connected", || Ok(stay.status()?.net[0].backend == Frontend::Connected))?;
        stay.backend.wait_started(0)?;
        netns::wait_running(stay.tap)?;
        let held = queues_held(stay.backend.process.pid(), stay.tap)?;
        ensure!(held == usize::from(self.kind.queue_pairs), "the back-end has {held} queues of the TAP");
        self.traveller.check_pings(3)
    }

    /// The processes where the guest is hold no more than after an earlier cell.
    fn check_held(&mut self) -> Result<()> {
        let stay = &self.traveller.stay;
        let offered = stay.backend.process.log().contains("polling of the TAP is off");
        for process in [stay.guest.process(), stay.backend.process.pid()] {
            let least = self.held.entry((process, offered)).or_insert(open_fds(process)?);
            let what = format!("process {process} had {least} descriptors open");
            until(&what, || {
                // Something of the first cell may have been about to be closed.
                let open = open_fds(process)?;
                let enough = open <= *least;
                *least = open.min(*least);
                Ok(enough)
            })?;
        }
        Ok(())
    }

    /// The guest has moved: gives what it has left, which is the other place from now on.
    fn exchange<'a>(&mut self, target: &'a mut Target) -> &'a mut Stay {
        std::mem::swap(&mut self.traveller.stay, &mut target.stay);
        &mut target.stay
    }
}

/// A place that no guest has come to waits for the next one, and holds what it held before.
fn check_waits(target: &mut Target) -> Result<()> {
    let Target { stay, held } = target;
    until("the target waited again", || Ok(stay.status()?.state == VmmState::Incoming))?;
    check_no_tap(stay)?;
    ensure!(stay.backend.status()?.tap.is_empty());
    for (process, before) in [stay.guest.process(), stay.backend.process.pid()].into_iter().zip(*held) {
        let what = format!("the target's process {process} had {before} descriptors open");
        until(&what, || Ok(open_fds(process)? == before))?;
    }
    Ok(())
}

/// Whether a place that no guest has come to holds what it held before, and no more.
fn waits(target: &Target) -> Result<bool> {
    let Target { stay, held } = target;
    let processes = [stay.guest.process(), stay.backend.process.pid()].into_iter().zip(*held);
    for (process, before) in processes {
        if open_fds(process)? != before {
            return Ok(false);
        }
    }
    Ok(queues_held(stay.backend.process.pid(), stay.tap)? == 0)
}

/// A back-end has no TAP, or soon none.
fn check_no_tap(stay: &Stay) -> Result<()> {
    let process = stay.backend.process.pid();
    // One that has ended has none.
    until("it had no TAP", || Ok(queues_held(process, stay.tap).unwrap_or(0) == 0))
}

/// A VMM whose guest has moved refuses to run it, and ends well.
fn quit_left(source: &mut Stay) -> Result<()> {
    until("the source knew", || Ok(source.status()?.state == VmmState::Postmigrate))?;
    let refused = source.ask(&Request::Resume).err().context("the source resumed")?;
    ensure!(refused.to_string().contains("the target's"), "{refused}");
    source.ask(&Request::Quit)?;
    let status = source.guest.wait_end()?;
    ensure!(status.success(), "the VMM that the guest has left ended with {status}: {}", source.guest.log());
    Ok(())
}

/// A back-end ends well, by itself or told to.
fn end_backend(stay: &mut Stay, told: bool) -> Result<()> {
    let process = &mut stay.backend.process;
    if told && process.is_running()? {
        process.signal(Signal::SIGTERM)?;
    }
    let status = process.wait()?;
    let log = process.log();
    ensure!(status.success() && !log.contains("panicked"), "a back-end ended with {status}:\n{log}");
    Ok(())
}

fn signal(process: Pid, signal: Signal) -> Result<()> {
    kill(process, signal).with_context(|| format!("{signal} to {process}"))
}
