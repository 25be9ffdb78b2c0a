//! Migrates a guest on one host, from one baton-vmm and baton-backend to another of each. Its memory is passed on, not
//! copied.
//!
//! The host's address is on a bridge, and the guest's current TAP is a port of the bridge. A local migration passes the
//! TAP on; otherwise the next place has another TAP, and the test switches the bridge to it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{MigrationReport, Request, VmmState, VmmStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::backend::Backend;
use crate::datapath::Datapath;
use crate::faults::{Faults, Party};
use crate::guest::{Guest, Vmm};
use crate::link::{self, GUEST, HOST, MAC};
use crate::migration::{TAPS, network, plug, unplug};
use crate::netns::{self, Netns};
use crate::ping;

/// The size of the guest's memory.
const MEMORY: &str = "512M";
/// The kernel's TCP connections and counters. Of this thread, because only it is in the namespace.
const TCP: &str = "/proc/thread-self/net/tcp";
const SNMP: &str = "/proc/thread-self/net/snmp";
/// The number of the guest's processors.
const CPUS: u16 = 2;

/// The properties of the guest's network device.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What moves its frames.
    pub datapath: Datapath,
    /// How many queue pairs it has.
    pub queue_pairs: u16,
}

/// A guest with its network, which can move from place to place.
#[derive(Debug)]
pub struct Traveller {
    kind: Kind,
    /// The current place.
    pub stay: Stay,
    stays: usize,
    _netns: Netns,
}

/// A place for a guest: a VMM and a back-end.
#[derive(Debug)]
pub struct Stay {
    /// The VMM, with the guest's console.
    pub guest: Guest,
    /// The back-end.
    pub backend: Backend,
    control: PathBuf,
    client: Option<ControlClient>,
    /// The TAP that its back-end has or will take over.
    pub tap: &'static str,
    /// Its fault points.
    pub faults: Faults,
    directory: tempfile::TempDir,
}

/// The properties in which a place can differ from the guest's current one.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The number of processors.
    pub cpus: u16,
    /// The `local-migration` option of the network device.
    pub local_migration: bool,
    /// Whether the guest is paused on arrival.
    pub paused: bool,
    /// The fault points of the VMM and the back-end.
    pub faults: Faults,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { cpus: CPUS, local_migration: true, paused: false, faults: Faults::default() }
    }
}

/// How a guest moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To another TAP.
    NewTap,
    /// Together with its TAP.
    SameTap,
}

/// How a back-end gets its TAP.
#[derive(Clone, Copy, Debug)]
enum Tap {
    /// Opens this one.
    Own(&'static str),
    /// Takes this one over from another back-end.
    Incoming(&'static str),
}

/// The times of a move.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// A time before the guest was stopped at the source.
    pub before: Instant,
    /// A time after it was resumed at the target.
    pub after: Instant,
    /// How long the guest was stopped, in microseconds, as the source reports.
    pub pause_us: u64,
}

impl Traveller {
    /// Sets up the network and boots a guest at the first place.
    ///
    /// # Errors
    /// Returns an error if the network or the first place cannot be set up, or the guest does not boot.
    pub fn new(kind: Kind) -> Result<Self> {
        Self::with_faults(kind, &Faults::default())
    }

    /// As [`Self::new`], with fault points at the first place.
    ///
    /// # Errors
    /// Returns the errors of [`Self::new`].
    pub fn with_faults(kind: Kind, faults: &Faults) -> Result<Self> {
        let netns = network(kind.queue_pairs)?;
        let mut stay = Stay::new(kind, 0, Tap::Own(TAPS[0]), "", faults, |_| Vmm::new(CPUS, MEMORY))?;
        plug(stay.tap)?;
        stay.guest.wait_for_shell()?;
        link::bring_up(&mut stay.guest, kind.queue_pairs)?;
        Ok(Self { kind, stay, stays: 1, _netns: netns })
    }

    /// Starts a place to which the guest can move.
    ///
    /// # Errors
    /// Returns an error if the back-end or the VMM cannot be started.
    pub fn place(&mut self, way: Way, change: impl FnOnce(Wanted) -> Wanted) -> Result<Stay> {
        let wanted = change(Wanted::default());
        let tap = match way {
            Way::NewTap => Tap::Own(self.other_tap()),
            Way::SameTap => Tap::Incoming(self.stay.tap),
        };
        let local = if wanted.local_migration { "on" } else { "off" };
        let net = format!(",local-migration={local}");
        let paused = wanted.paused.then_some("--paused");
        let mut stay = Stay::new(self.kind, self.stays, tap, &net, &wanted.faults, |directory| {
            Ok(Vmm::incoming(&directory.join("incoming"), wanted.cpus, MEMORY)?.args(paused))
        })?;
        self.stays += 1;
        // The VMM answers as soon as it waits for a guest.
        let status = stay.status()?;
        ensure!(status.state == VmmState::Incoming, "{status:?}");
        Ok(stay)
    }

    fn other_tap(&self) -> &'static str {
        if self.stay.tap == TAPS[0] { TAPS[1] } else { TAPS[0] }
    }

    /// Reads the counters of the guest's current TAP.
    ///
    /// # Errors
    /// Returns an error if the TAP does not exist.
    pub fn tap_counters(&self) -> Result<netns::Counters> {
        netns::counters(self.stay.tap)
    }

    /// Moves the guest together with its TAP, and ends the place that it left.
    ///
    /// # Errors
    /// Returns an error if the migration fails, or the source fails to end.
    pub fn move_with_tap(&mut self) -> Result<Move> {
        let mut target = self.place(Way::SameTap, |wanted| wanted)?;
        let before = Instant::now();
        let pause_us = self.stay.migrate_away(&target, Way::SameTap)?;
        let after = Instant::now();
        ensure!(self.stay.status()?.state == VmmState::Postmigrate, "{:?}", self.stay.status()?);
        ensure!(target.status()?.state == VmmState::Running, "{:?}", target.status()?);
        self.settle(target)?;
        Ok(Move { before, after, pause_us })
    }

    /// Hands the session over to another back-end. The guest and its VMM stay.
    ///
    /// # Errors
    /// Returns an error if the hand-over fails.
    pub fn hand_over(&mut self) -> Result<()> {
        let target = Backend::waiting_for_session(self.kind.datapath, &["--log-level=debug"])?;
        self.stay.backend.become_busy_target(target)?;
        Ok(())
    }

    /// Moves the guest to a place with another TAP. The guest arrives paused and is resumed after the bridge is
    /// switched to the new TAP. Ends the place that it left.
    ///
    /// # Errors
    /// Returns an error if the migration fails, or the source fails to end.
    pub fn move_with_new_tap(&mut self) -> Result<Move> {
        let mut target = self.place(Way::NewTap, |wanted| Wanted { paused: true, ..wanted })?;
        let before = Instant::now();
        let pause_us = self.stay.migrate_away(&target, Way::NewTap)?;
        ensure!(self.stay.status()?.state == VmmState::Postmigrate, "{:?}", self.stay.status()?);
        ensure!(target.status()?.state == VmmState::Paused, "{:?}", target.status()?);
        // Adds the new port first: frames for the guest wait there until it runs.
        plug(target.tap)?;
        unplug(self.stay.tap)?;
        target.ask(&Request::Resume)?;
        let after = Instant::now();
        self.settle(target)?;
        Ok(Move { before, after, pause_us })
    }

    /// Ends the place that the guest left, and checks that the guest responds at the new one.
    ///
    /// # Errors
    /// Returns an error if the VMM or the back-end of the source fails, or the guest does not respond.
    pub fn settle(&mut self, target: Stay) -> Result<()> {
        let source = std::mem::replace(&mut self.stay, target);
        source.end()?;
        self.stay.guest.check("true").context("the guest's shell after the move")?;
        Ok(())
    }

    /// Pings both ways. No ping may be lost.
    ///
    /// # Errors
    /// Returns an error if a ping is lost.
    pub fn check_pings(&mut self, count: u16) -> Result<()> {
        ping::check(GUEST, count)?;
        self.stay.guest.check_pings(HOST, count)
    }

    /// As [`Guest::check_dmesg`].
    ///
    /// # Errors
    /// Returns the errors of [`Guest::check_dmesg`].
    pub fn check_dmesg(&mut self) -> Result<()> {
        self.stay.guest.check_dmesg()
    }

    /// Status, counters and logs, for the message of a failed test.
    pub fn evidence(&mut self) -> String {
        self.stay.evidence()
    }

    /// Switches the guest off and ends the back-end.
    ///
    /// # Errors
    /// Returns an error if the VMM or the back-end fails.
    pub fn end(self) -> Result<()> {
        let Stay { guest, backend, .. } = self.stay;
        ensure!(guest.power_off()?.success(), "the VMM failed");
        end(backend)
    }
}

impl Stay {
    fn new(
        kind: Kind,
        number: usize,
        tap: Tap,
        net: &str,
        faults: &Faults,
        vmm: impl FnOnce(&Path) -> Result<Vmm>,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let from = match tap {
            Tap::Own(tap) => format!("--tap={tap}"),
            Tap::Incoming(_) => format!("--incoming-fds={}", directory.path().join("tap").display()),
        };
        let arguments = [from, format!("--queue-pairs={}", kind.queue_pairs), "--log-level=debug".to_owned()];
        let arguments = arguments.each_ref().map(String::as_str);
        let of_backend = faults.of(&[Party::SourceBackend, Party::TargetBackend]);
        let mut backend = Backend::with_faults(kind.datapath, &arguments, &of_backend)?;
        backend.status()?;
        if let Tap::Own(tap) = tap {
            // A bridge sends nothing to a port without a carrier, which the back-end sets.
            netns::wait_running(tap)?;
        }
        let control = directory.path().join("vmm");
        let socket = backend.socket.to_str().context("socket path is not UTF-8")?;
        let option = format!("--control-socket={}", control.display());
        let net = format!("socket={socket},mac={MAC},queue-pairs={}{net}", kind.queue_pairs);
        let vmm = vmm(directory.path())?.args(["--net", &net, &option]);
        let of_vmm = faults.of(&[Party::SourceVmm, Party::TargetVmm]);
        let guest = vmm.with_faults(&of_vmm)?.start(&format!("guest-{number}"))?;
        let (Tap::Own(tap) | Tap::Incoming(tap)) = tap;
        Ok(Self { guest, backend, control, client: None, tap, faults: faults.clone(), directory })
    }

    /// The socket path on which the VMM waits for a guest.
    pub fn incoming(&self) -> PathBuf {
        self.directory.path().join("incoming")
    }

    /// The path of the VMM's control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Kills the back-end and starts another one in its place, which opens the TAP itself.
    ///
    /// # Errors
    /// Returns an error if the new back-end cannot be started.
    pub fn replace_backend(&mut self, kind: Kind, faults: &Faults) -> Result<()> {
        let arguments = [
            format!("--tap={}", self.tap),
            format!("--queue-pairs={}", kind.queue_pairs),
            "--log-level=debug".to_owned(),
        ];
        self.backend.replace(kind.datapath, &arguments.each_ref().map(String::as_str), faults)
    }

    /// Sends the VMM a request. Keeps the connection open, so that the number of the VMM's descriptors does not change
    /// between requests.
    ///
    /// # Errors
    /// Returns an error if the VMM refuses or does not answer.
    pub fn ask(&mut self, request: &Request) -> Result<serde_json::Value> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                let control = &self.control;
                let connect = |_: &crate::process::Process| Ok(ControlClient::connect(control).ok());
                // The back-end must live as long as the VMM, so the wait watches its process.
                let what = "the VMM served its control socket";
                self.client.insert(self.backend.process.wait_until(what, connect)?)
            }
        };
        Ok(client.call(request)?)
    }

    /// Reads the guest's uptime from its `/proc/uptime`.
    ///
    /// # Errors
    /// Returns an error if the guest does not respond.
    pub fn uptime(&mut self) -> Result<Duration> {
        let text = self.guest.check("cut -d ' ' -f 1 /proc/uptime")?;
        Ok(Duration::try_from_secs_f64(text.trim().parse()?)?)
    }

    /// Sends the VMM a signal.
    ///
    /// # Errors
    /// Returns an error if the VMM has ended.
    pub fn signal_vmm(&self, signal: Signal) -> Result<()> {
        let process = Pid::from_raw(i32::try_from(self.guest.process())?);
        Ok(kill(process, signal)?)
    }

    /// Requests the VMM's status.
    ///
    /// # Errors
    /// Returns an error if the VMM does not answer.
    pub fn status(&mut self) -> Result<VmmStatus> {
        serde_json::from_value(self.ask(&Request::Status)?).context("a VMM's status")
    }

    /// Asks the VMM to migrate the guest to another place. A migration that does not complete is a report, not an
    /// error.
    ///
    /// # Errors
    /// Returns an error if the VMM refuses the request or does not answer.
    pub fn migrate(&mut self, target: &Self, way: Way) -> Result<MigrationReport> {
        self.migrate_with(target, way, false)
    }

    /// Asks the VMM for a dry run of a migration to another place. A negative result is a report, not an error.
    ///
    /// # Errors
    /// Returns an error if the VMM refuses the request or does not answer.
    pub fn ask_migrate(&mut self, target: &Self, way: Way) -> Result<MigrationReport> {
        self.migrate_with(target, way, true)
    }

    fn migrate_with(&mut self, target: &Self, way: Way, dry_run: bool) -> Result<MigrationReport> {
        let local = way == Way::SameTap;
        let request = Request::Migrate { path: target.incoming(), local, dry_run };
        serde_json::from_value(self.ask(&request)?).context("invalid migration report")
    }

    /// Migrates the guest to another place, which must succeed. Returns how long the guest was stopped, in
    /// microseconds.
    fn migrate_away(&mut self, target: &Self, way: Way) -> Result<u64> {
        match self.migrate(target, way)? {
            MigrationReport::Completed { pause_us, .. } => Ok(pause_us),
            other => bail!("{other:?}\nthe target: {}\n{}", target.guest.log(), target.backend.process.log()),
        }
    }

    /// Ends a place that the guest has left.
    fn end(mut self) -> Result<()> {
        self.ask(&Request::Quit)?;
        let log = self.guest.log();
        ensure!(self.guest.wait()?.success(), "the source VMM failed; log:\n{log}");
        if self.backend.status().is_ok_and(|status| status.handover.is_none()) {
            return end(self.backend);
        }
        // A back-end that has handed over its TAP exits by itself.
        let status = self.backend.process.wait()?;
        let log = self.backend.process.log();
        ensure!(status.success() && !log.contains("panicked"), "the back-end ended with {status}:\n{log}");
        Ok(())
    }

    /// Status, counters and logs, for the message of a failed test.
    pub fn evidence(&mut self) -> String {
        let here = [TCP, SNMP].map(|path| std::fs::read_to_string(path).unwrap_or_default()).concat();
        let there = self.guest.run(&format!("cat {TCP} {SNMP} /proc/interrupts; ethtool -S eth0"));
        format!(
            "VMM: {:?}\n{}\nback-end: {:?}\n{:?}\n{}\nthe host's network: {here}\nthe guest's: {}",
            self.status(),
            self.guest.log(),
            self.backend.status(),
            self.backend.stats(),
            self.backend.process.log(),
            there.map_or_else(|error| format!("{error:#}"), |there| there.output),
        )
    }
}

/// Ends a back-end, which must be healthy.
fn end(mut backend: Backend) -> Result<()> {
    backend.check_healthy()?;
    backend.process.signal(Signal::SIGTERM)?;
    let status = backend.process.wait()?;
    ensure!(status.success(), "the back-end ended with {status}:\n{}", backend.process.log());
    Ok(())
}
