//! A guest on baton-vmm that moves: from one baton-vmm and baton-backend to another of each, its memory passed on.
//!
//! The host's address is on a bridge. The TAP where the guest is, is a port of it. In a local migration it is the same
//! all along; else the next stay has another one, and whoever moves the guest switches the network.

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

/// The guest's memory.
const MEMORY: &str = "512M";
/// What the kernel knows of its connections, and what it has counted. This thread's, which alone is in the namespace.
const TCP: &str = "/proc/thread-self/net/tcp";
const SNMP: &str = "/proc/thread-self/net/snmp";
/// Its processors.
const CPUS: u16 = 2;

/// What moves.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Who moves its frames.
    pub datapath: Datapath,
    /// How many queue pairs its network device has.
    pub queue_pairs: u16,
}

/// A guest with its network.
#[derive(Debug)]
pub struct Traveller {
    kind: Kind,
    /// Where it is.
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
    /// The TAP that its back-end has, or is to get.
    pub tap: &'static str,
    /// Its fault points.
    pub faults: Faults,
    directory: tempfile::TempDir,
}

/// How a place is to differ from that where the guest is.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its processors.
    pub cpus: u16,
    /// Its device's `local-migration`.
    pub local_migration: bool,
    /// Whether the guest stands still when it has come.
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
    /// With its TAP.
    SameTap,
}

/// Where a back-end has its TAP from.
#[derive(Clone, Copy, Debug)]
enum Tap {
    /// It opens this one.
    Own(&'static str),
    /// Another back-end will hand this one over.
    Incoming(&'static str),
}

/// How a move went.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// Before the guest was stopped at the source.
    pub before: Instant,
    /// After it ran at the target.
    pub after: Instant,
    /// How long it stood still, in microseconds, as the source says.
    pub pause_us: u64,
}

impl Traveller {
    /// Sets up the network, and boots a guest at the first place.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(kind: Kind) -> Result<Self> {
        Self::with_faults(kind, &Faults::default())
    }

    /// As [`Self::new`], with fault points at the first place.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_faults(kind: Kind, faults: &Faults) -> Result<Self> {
        let netns = network(kind.queue_pairs)?;
        let mut stay = Stay::new(kind, 0, Tap::Own(TAPS[0]), "", faults, |_| Vmm::new(CPUS, MEMORY))?;
        plug(stay.tap)?;
        stay.guest.wait_for_shell()?;
        link::bring_up(&mut stay.guest, kind.queue_pairs)?;
        Ok(Self { kind, stay, stays: 1, _netns: netns })
    }

    /// A place to which the guest could move.
    ///
    /// # Errors
    /// If it cannot be started.
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
        // It answers as soon as it waits for a guest.
        let status = stay.status()?;
        ensure!(status.state == VmmState::Incoming, "{status:?}");
        Ok(stay)
    }

    fn other_tap(&self) -> &'static str {
        if self.stay.tap == TAPS[0] { TAPS[1] } else { TAPS[0] }
    }

    /// The counters of the TAP where the guest is.
    ///
    /// # Errors
    /// Where there is none.
    pub fn tap_counters(&self) -> Result<netns::Counters> {
        netns::counters(self.stay.tap)
    }

    /// Moves the guest together with its TAP. What it leaves ends before it is looked at again.
    ///
    /// # Errors
    /// If anything fails.
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

    /// Hands the session on to another back-end: the guest and its VMM stay where they are.
    ///
    /// # Errors
    /// If anything fails.
    pub fn hand_over(&mut self) -> Result<()> {
        let target = Backend::waiting_for_session(self.kind.datapath, &["--log-level=debug"])?;
        self.stay.backend.become_busy_target(target)?;
        Ok(())
    }

    /// Moves the guest the ordinary way: to a place with a TAP of its own, where it waits until the network is
    /// switched. What it leaves ends before it goes on.
    ///
    /// # Errors
    /// If anything fails.
    pub fn move_with_new_tap(&mut self) -> Result<Move> {
        let mut target = self.place(Way::NewTap, |wanted| Wanted { paused: true, ..wanted })?;
        let before = Instant::now();
        let pause_us = self.stay.migrate_away(&target, Way::NewTap)?;
        ensure!(self.stay.status()?.state == VmmState::Postmigrate, "{:?}", self.stay.status()?);
        ensure!(target.status()?.state == VmmState::Paused, "{:?}", target.status()?);
        // First the new port: what is sent to the guest waits there until it runs.
        plug(target.tap)?;
        unplug(self.stay.tap)?;
        target.ask(&Request::Resume)?;
        let after = Instant::now();
        self.settle(target)?;
        Ok(Move { before, after, pause_us })
    }

    /// Ends what the guest has left, and finds it at the new place.
    ///
    /// # Errors
    /// If something does not end well, or the guest is not there.
    pub fn settle(&mut self, target: Stay) -> Result<()> {
        let source = std::mem::replace(&mut self.stay, target);
        source.end()?;
        self.stay.guest.check("true").context("the guest's shell after the move")?;
        Ok(())
    }

    /// Pings both ways, none may be lost.
    ///
    /// # Errors
    /// If one is.
    pub fn check_pings(&mut self, count: u16) -> Result<()> {
        ping::check(GUEST, count)?;
        self.stay.guest.check_pings(HOST, count)
    }

    /// As [`Guest::check_dmesg`].
    ///
    /// # Errors
    /// If it has said something.
    pub fn check_dmesg(&mut self) -> Result<()> {
        self.stay.guest.check_dmesg()
    }

    /// What to look at when something has failed.
    pub fn evidence(&mut self) -> String {
        self.stay.evidence()
    }

    /// Switches the guest off; everything must end well.
    ///
    /// # Errors
    /// If it does not.
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
            // A bridge sends nothing to a port without a carrier, which this one has got from the back-end.
            netns::wait_running(tap)?;
        }
        let control = directory.path().join("vmm");
        let socket = backend.socket.to_str().context("a path that is not UTF-8")?;
        let option = format!("--control-socket={}", control.display());
        let net = format!("socket={socket},mac={MAC},queue-pairs={}{net}", kind.queue_pairs);
        let vmm = vmm(directory.path())?.args(["--net", &net, &option]);
        let of_vmm = faults.of(&[Party::SourceVmm, Party::TargetVmm]);
        let guest = vmm.with_faults(&of_vmm)?.start(&format!("guest-{number}"))?;
        let (Tap::Own(tap) | Tap::Incoming(tap)) = tap;
        Ok(Self { guest, backend, control, client: None, tap, faults: faults.clone(), directory })
    }

    /// Where it waits for a guest.
    pub fn incoming(&self) -> PathBuf {
        self.directory.path().join("incoming")
    }

    /// The VMM's control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Kills the back-end, and starts another one in its place, which opens the TAP itself.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn replace_backend(&mut self, kind: Kind, faults: &Faults) -> Result<()> {
        let arguments = [
            format!("--tap={}", self.tap),
            format!("--queue-pairs={}", kind.queue_pairs),
            "--log-level=debug".to_owned(),
        ];
        self.backend.replace(kind.datapath, &arguments.each_ref().map(String::as_str), faults)
    }

    /// Asks the VMM something. The connection is kept, so that it is among the open descriptors always.
    ///
    /// # Errors
    /// If it refuses, or gives no answer.
    pub fn ask(&mut self, request: &Request) -> Result<serde_json::Value> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                let control = &self.control;
                let connect = |_: &crate::process::Process| Ok(ControlClient::connect(control).ok());
                // The back-end lives as long as the VMM must.
                let what = "the VMM served its control socket";
                self.client.insert(self.backend.process.wait_until(what, connect)?)
            }
        };
        Ok(client.call(request)?)
    }

    /// How long the guest has been up, as it says.
    ///
    /// # Errors
    /// If it does not.
    pub fn uptime(&mut self) -> Result<Duration> {
        let text = self.guest.check("cut -d ' ' -f 1 /proc/uptime")?;
        Ok(Duration::try_from_secs_f64(text.trim().parse()?)?)
    }

    /// Sends the VMM a signal.
    ///
    /// # Errors
    /// If there is none.
    pub fn signal_vmm(&self, signal: Signal) -> Result<()> {
        let process = Pid::from_raw(i32::try_from(self.guest.process())?);
        Ok(kill(process, signal)?)
    }

    /// The VMM's status.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn status(&mut self) -> Result<VmmStatus> {
        serde_json::from_value(self.ask(&Request::Status)?).context("a VMM's status")
    }

    /// Has the guest moved to another place.
    ///
    /// # Errors
    /// If the VMM refuses, or gives no answer; not if the guest has not moved.
    pub fn migrate(&mut self, target: &Self, way: Way) -> Result<MigrationReport> {
        self.migrate_with(target, way, false)
    }

    /// Whether the guest could move to another place.
    ///
    /// # Errors
    /// If the VMM refuses, or gives no answer; not if the guest cannot.
    pub fn ask_migrate(&mut self, target: &Self, way: Way) -> Result<MigrationReport> {
        self.migrate_with(target, way, true)
    }

    fn migrate_with(&mut self, target: &Self, way: Way, dry_run: bool) -> Result<MigrationReport> {
        let local = way == Way::SameTap;
        let request = Request::Migrate { path: target.incoming(), local, dry_run };
        serde_json::from_value(self.ask(&request)?).context("a migration's report")
    }

    /// Has the guest moved to another place, which must succeed; gives how long it stood still.
    fn migrate_away(&mut self, target: &Self, way: Way) -> Result<u64> {
        match self.migrate(target, way)? {
            MigrationReport::Completed { pause_us, .. } => Ok(pause_us),
            other => bail!("{other:?}\nthe target: {}\n{}", target.guest.log(), target.backend.process.log()),
        }
    }

    /// Ends what the guest has left.
    fn end(mut self) -> Result<()> {
        self.ask(&Request::Quit)?;
        let log = self.guest.log();
        ensure!(self.guest.wait()?.success(), "the VMM that the guest has left failed: {log}");
        if self.backend.status().is_ok_and(|status| status.handover.is_none()) {
            return end(self.backend);
        }
        // Without its TAP it ends by itself.
        let status = self.backend.process.wait()?;
        let log = self.backend.process.log();
        ensure!(status.success() && !log.contains("panicked"), "the back-end ended with {status}:\n{log}");
        Ok(())
    }

    /// What to look at when something has failed.
    pub fn evidence(&mut self) -> String {
        let here = [TCP, SNMP].map(|path| std::fs::read_to_string(path).unwrap_or_default()).concat();
        let there = self.guest.run(&format!("cat {TCP} {SNMP} /proc/interrupts; ethtool -S eth0"));
        format!(
            "VMM: {:?}\n{}\nback-end: {:?}\n{:?}\n{}\nthe network's end: {here}\nthe guest's: {}",
            self.status(),
            self.guest.log(),
            self.backend.status(),
            self.backend.stats(),
            self.backend.process.log(),
            there.map_or_else(|error| format!("{error:#}"), |there| there.output),
        )
    }
}

/// Ends a back-end, which must be well.
fn end(mut backend: Backend) -> Result<()> {
    backend.check_healthy()?;
    backend.process.signal(Signal::SIGTERM)?;
    let status = backend.process.wait()?;
    ensure!(status.success(), "the back-end ended with {status}:\n{}", backend.process.log());
    Ok(())
}
