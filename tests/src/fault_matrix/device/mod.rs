//! The part of the fault matrix where a VM moves with its TAP from one baton-vmm and baton-backend to another of each,
//! and one of the four processes fails.
//!
//! After each case of [`mod@kill`], [`hang`], [`starve`] and [`refuse`] exactly one VM runs and has its network, no
//! other process holds its TAP, and every process that lives has closed what it took for the attempt.

pub mod hang;
pub mod kill;
pub mod refuse;
pub mod starve;

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{Frontend, MigrationReport, Request, VmmState, VmmStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Attempt, check_ends, points, run_case};
use crate::faults::{Action, Faults, Party, Point, has_reached};
use crate::local_migration::{Kind, Stay, Traveller, Wanted, Way};
use crate::netns;
use crate::process::{open_fds, until};

/// All parties, in the order in which they fail.
const PARTIES: [Party; 4] = [Party::TargetVmm, Party::TargetBackend, Party::SourceBackend, Party::SourceVmm];

/// The divisor of the timeouts in cases where a process hangs. In the lab the other processes need some time, too.
pub const HURRY: u32 = 4;

/// A guest that moves from case to case.
#[derive(Debug)]
pub struct Fixture {
    kind: Kind,
    /// The divisor of the timeouts that `BATON_HURRY` shortens.
    hurry: u32,
    traveller: Traveller,
    /// The fewest descriptors that each process had after a case. Counted separately once the back-end has put the TAP
    /// aside, because it then keeps the ownership word of the last hand-over.
    held: HashMap<(u32, bool), usize>,
}

/// A VMM and a back-end that wait for the guest.
#[derive(Debug)]
struct Target {
    stay: Stay,
    /// How many descriptors the VMM and the back-end had before the first attempt.
    held: [usize; 2],
}

/// How many queues of this TAP a process holds.
fn queues_held(process: u32, tap: &str) -> Result<usize> {
    let line = format!("iff:\t{tap}");
    let mut held = 0;
    for entry in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        // A descriptor that was closed meanwhile is not held.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        held += usize::from(info.lines().any(|said| said == line));
    }
    Ok(held)
}

fn is_vmm(party: Party) -> bool {
    matches!(party, Party::SourceVmm | Party::TargetVmm)
}

fn is_source(party: Party) -> bool {
    matches!(party, Party::SourceVmm | Party::SourceBackend)
}

/// Whether the VM stays at the source when a process dies or hangs at this point. The source's back-end is no longer
/// needed once it has sent its offer, and the target's back-end takes the device only after the target has taken the
/// VM.
fn rolls_back(point: Point) -> bool {
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

/// Runs a case at every fault point of every party, with one guest.
fn everywhere(kind: Kind, mut case: impl FnMut(&mut Fixture, Point) -> Result<()>) -> Result<()> {
    let mut fixture = Fixture::new(kind, HURRY, Faults::default())?;
    PARTIES.into_iter().flat_map(points).try_for_each(|point| case(&mut fixture, point))?;
    fixture.end()
}

impl Fixture {
    /// Boots a guest on a VMM and a back-end with these faults.
    ///
    /// # Errors
    /// Returns an error if the VMM or the back-end cannot be set up, or the guest's network does not work.
    pub fn new(kind: Kind, hurry: u32, faults: Faults) -> Result<Self> {
        let traveller = Traveller::with_faults(kind, &faults.hurried(hurry))?;
        let mut fixture = Self { kind, hurry, traveller, held: HashMap::new() };
        fixture.traveller.check_pings(3)?;
        Ok(fixture)
    }

    /// Switches the guest off.
    ///
    /// # Errors
    /// Returns an error if the VMM or the back-end fails.
    pub fn end(self) -> Result<()> {
        self.traveller.end()
    }

    fn case(
        &mut self,
        point: Point,
        action: Action,
        body: impl FnOnce(&mut Self, &mut Target) -> Result<()>,
    ) -> Result<()> {
        run_case(point, action, || {
            let mut target = None;
            let result = self.prepare(point, action).and_then(|place| body(self, target.insert(place)));
            if let (Err(_), Some(target), Action::Stop) = (&result, &target, action) {
                // A stopped process cannot answer the queries below. It may also have ended.
                let _ = signal(self.process_at(target, point).0, Signal::SIGCONT);
            }
            result.with_context(|| {
                let target = target.map(|mut target| target.stay.evidence()).unwrap_or_default();
                format!("{}\nthe other place:\n{target}", self.traveller.evidence())
            })
        })
    }

    /// Arms the fault point in the process that reaches it. Returns a target to move to.
    fn prepare(&mut self, point: Point, action: Action) -> Result<Target> {
        let (faults, none) = (Faults::at(point, action), Faults::default());
        match point.party() {
            Party::TargetVmm | Party::TargetBackend => return self.place(faults),
            Party::SourceBackend => self.replace_backend(faults)?,
            // The VMM was started with the fault.
            Party::SourceVmm if self.traveller.stay.faults.has(point) => {}
            Party::SourceVmm => self.move_to(faults)?,
            Party::SourceSession | Party::TargetSession => bail!("a migration hands over no session"),
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

    /// Moves the guest to a place with these faults, which this move does not reach.
    fn move_to(&mut self, faults: Faults) -> Result<()> {
        let target = self.place(faults)?;
        self.attempt(&target).end_completed()?;
        self.traveller.settle(target.stay)?;
        self.check_network()
    }

    /// Replaces the back-end of the guest's place by one with these faults.
    fn replace_backend(&mut self, faults: Faults) -> Result<()> {
        self.traveller.stay.replace_backend(self.kind, &faults.hurried(self.hurry))?;
        self.check_network()
    }

    fn attempt(&self, target: &Target) -> Attempt<MigrationReport> {
        let (control, path) = (self.traveller.stay.control().to_owned(), target.stay.incoming());
        Attempt::start(move || {
            let request = Request::Migrate { path, local: true, dry_run: false };
            let mut client = ControlClient::connect(&control)?;
            let report = serde_json::from_value(client.call(&request)?)?;
            // A client that loses the answer finds the report in the status.
            let status: VmmStatus = serde_json::from_value(client.call(&Request::Status)?)?;
            ensure!(status.migration.as_ref() == Some(&report), "{report:?}, but {status:?}");
            Ok(report)
        })
    }

    /// The process that reaches a point, and its log.
    fn process_at(&self, target: &Target, point: Point) -> (u32, String) {
        let stay = if is_source(point.party()) { &self.traveller.stay } else { &target.stay };
        if is_vmm(point.party()) {
            (stay.guest.process(), stay.guest.log())
        } else {
            (stay.backend.process.pid(), stay.backend.process.log())
        }
    }

    /// Checks that the process reached the point; otherwise the case has shown nothing.
    fn check_reached(&self, target: &Target, point: Point, action: Action) -> Result<()> {
        let (_, log) = self.process_at(target, point);
        ensure!(
            has_reached(&log, point, action),
            "fault point {} was not reached; log:\n{log}",
            point.name()
        );
        Ok(())
    }

    /// Checks that the guest runs at its current place and has its network and all queues of its TAP.
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

    /// Checks that the guest's VMM and back-end have no more descriptors than after an earlier case.
    fn check_held(&mut self) -> Result<()> {
        let stay = &self.traveller.stay;
        let offered = stay.backend.process.log().contains("set the TAP aside");
        for process in [stay.guest.process(), stay.backend.process.pid()] {
            let least = self.held.entry((process, offered)).or_insert(open_fds(process)?);
            let what = format!("process {process} had {least} descriptors open");
            until(&what, || {
                // After the first case a process may still have had descriptors to close.
                let open = open_fds(process)?;
                let enough = open <= *least;
                *least = open.min(*least);
                Ok(enough)
            })?;
        }
        Ok(())
    }

    /// Records that the guest has moved. Returns the place that it left.
    fn exchange<'a>(&mut self, target: &'a mut Target) -> &'a mut Stay {
        std::mem::swap(&mut self.traveller.stay, &mut target.stay);
        &mut target.stay
    }
}

/// Waits until the target accepts a guest again and has no more descriptors than before the attempt.
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

/// Waits until a back-end has no TAP.
fn check_no_tap(stay: &Stay) -> Result<()> {
    let process = stay.backend.process.pid();
    // A back-end that has ended has no TAP.
    until("the back-end had no TAP", || Ok(queues_held(process, stay.tap).unwrap_or(0) == 0))
}

/// Checks that a VMM whose guest has moved refuses to resume it, and exits successfully.
fn quit_left(source: &mut Stay) -> Result<()> {
    until(
        "the source knew that the guest had moved",
        || Ok(source.status()?.state == VmmState::Postmigrate),
    )?;
    let refused = source.ask(&Request::Resume).err().context("the source resumed")?;
    ensure!(refused.to_string().contains("the target's"), "{refused}");
    source.ask(&Request::Quit)?;
    let status = source.guest.wait_end()?;
    ensure!(status.success(), "the source VMM ended with {status}: {}", source.guest.log());
    Ok(())
}

/// Waits until a back-end ends, after a signal if `told`, and checks that it succeeds.
fn end_backend(stay: &mut Stay, told: bool) -> Result<()> {
    let process = &mut stay.backend.process;
    if told && process.is_running()? {
        process.signal(Signal::SIGTERM)?;
    }
    check_ends(process)
}

fn signal(process: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(process)?), signal)
        .with_context(|| format!("cannot send {signal} to process {process}"))
}
