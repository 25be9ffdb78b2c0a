//! A guest and the network, joined by a back-end and its TAP: addresses at both ends, and checks of the traffic.
//!
//! The same checks serve every front-end that runs a Linux guest. The network's end is the TAP's own interface, in the
//! namespace of the test; `traffic serve` runs at both ends.

mod checks;
mod handover;

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{BackendStats, BackendStatus, Frontend, Request};

pub use self::handover::Successor;
use crate::datapath::{self, Datapath};
use crate::guest::{Accelerator, Guest, Qemu, Vmm};
use crate::netns::{self, Netns};
use crate::process::Process;
use crate::programs;

/// The TAP's interface.
pub const TAP: &str = "tap0";
/// The address of the network's end.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
/// The guest's MAC address.
pub const MAC: &str = "02:ba:70:00:00:02";
/// Where `traffic serve` listens at both ends.
pub const PORT: u16 = 7000;

/// How many segments TCP puts into a frame at least; on a slow machine it would be few.
const SEGMENTS: &str = "/proc/sys/net/ipv4/tcp_min_tso_segs";
/// As many as make 64 KiB.
const FULL_SEGMENTS: &str = "45";

/// How back-end and front-end find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The back-end listens.
    BackendListens,
    /// The front-end listens; the back-end is a client.
    FrontendListens,
}

/// A back-end on a TAP that outlives it, with the network's end ready.
#[derive(Debug)]
pub struct Link {
    /// The running back-end.
    pub backend: Process,
    arguments: Vec<OsString>,
    socket: PathBuf,
    control: PathBuf,
    datapath: Datapath,
    meeting: Meeting,
    queue_pairs: u16,
    hand_overs: u32,
    /// Kept, so that it is among the back-end's descriptors always.
    client: Option<ControlClient>,
    _directory: tempfile::TempDir,
    _network: Network,
}

/// The network's end of a link, and its TAP, which outlives the back-ends.
#[derive(Debug)]
pub struct Network {
    _server: Process,
    _netns: Netns,
}

impl Network {
    /// Sets up both in a namespace that this thread enters.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(multi_queue: bool) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, multi_queue)?;
        ip(&["addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
        ip(&["link", "set", "lo", "up"])?;
        std::fs::write(SEGMENTS, FULL_SEGMENTS).context(SEGMENTS)?;
        // What the guest resolves once it need not again, however slow it is.
        ip(&["neigh", "add", &GUEST.to_string(), "lladdr", MAC, "dev", TAP])?;
        let listen = format!("--listen={HOST}:{PORT}");
        let server = Process::start(&programs::traffic()?, &["serve".into(), listen.into()], &[])?;
        Ok(Self { _server: server, _netns: netns })
    }
}

impl Link {
    /// Sets up the network and starts a back-end of so many queue pairs.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<Self> {
        let network = Network::new(queue_pairs > 1)?;
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("vhost-user");
        let control = directory.path().join("control");
        let mut arguments = vec![
            option("--socket-path=", &socket),
            option("--control-socket=", &control),
            format!("--tap={TAP}").into(),
            format!("--queue-pairs={queue_pairs}").into(),
            "--log-level=debug".into(),
        ];
        arguments.extend(datapath::options(datapath).iter().map(OsString::from));
        if meeting == Meeting::FrontendListens {
            arguments.push("--client".into());
        }
        let backend = Process::start(&programs::backend()?, &arguments, &[])?;
        let mut link = Self {
            backend,
            arguments,
            socket,
            control,
            datapath,
            meeting,
            queue_pairs,
            hand_overs: 0,
            client: None,
            _directory: directory,
            _network: network,
        };
        link.status()?;
        Ok(link)
    }

    /// Who moves the frames.
    pub fn datapath(&self) -> Datapath {
        self.datapath
    }

    /// How many queue pairs the device has.
    pub fn queue_pairs(&self) -> u16 {
        self.queue_pairs
    }

    /// The vhost-user socket.
    ///
    /// # Errors
    /// If its path is not UTF-8.
    pub fn socket(&self) -> Result<&str> {
        self.socket.to_str().context("a path that is not UTF-8")
    }

    /// The back-end's control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The back-end's command line, for people.
    pub fn command_line(&self) -> String {
        command_line(&self.arguments)
    }

    /// Kills the back-end and starts another one in its place.
    ///
    /// # Errors
    /// If that does not start.
    pub fn restart_backend(&mut self) -> Result<()> {
        self.backend.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.backend.wait()?;
        self.backend = Process::start(&programs::backend()?, &self.arguments, &[])?;
        self.client = None;
        self.status()?;
        Ok(())
    }

    fn ask<T: serde::de::DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                self.backend.connect(&self.control)?;
                self.client.insert(ControlClient::connect(&self.control)?)
            }
        };
        serde_json::from_value(client.call(request)?).context("the back-end's answer")
    }

    /// The back-end's status.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&mut self) -> Result<BackendStatus> {
        self.ask(&Request::Status)
    }

    /// The back-end's counters.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn stats(&mut self) -> Result<BackendStats> {
        self.ask(&Request::Stats)
    }

    /// Waits until the front-end's first rings run, and the kernel lets frames through to the TAP: it notices some time
    /// after a back-end has taken it.
    ///
    /// # Errors
    /// If they never do.
    pub fn wait_serving(&mut self) -> Result<()> {
        self.wait_status("a front-end's rings ran", |status| {
            status.vrings[..2].iter().all(|vring| vring.started && vring.enabled)
        })?;
        netns::wait_running(TAP)
    }

    /// Waits until there is no front-end.
    ///
    /// # Errors
    /// If there always is.
    pub fn wait_left(&mut self) -> Result<()> {
        self.wait_status("the front-end had left", |status| status.frontend == Frontend::Disconnected)
    }

    /// Waits until the back-end's status is as it should be.
    ///
    /// # Errors
    /// If it never is.
    pub fn wait_status(&mut self, what: &str, condition: impl Fn(&BackendStatus) -> bool) -> Result<()> {
        // Not by a client of its own: the back-end would hold a descriptor for that until it notices that it has gone.
        self.status()?;
        let client = self.client.as_mut().context("a client that has asked")?;
        self.backend.wait_until(what, |_| {
            let status: BackendStatus = serde_json::from_value(client.call(&Request::Status)?)?;
            Ok(condition(&status).then_some(()))
        })
    }

    /// Boots a guest on `baton-vmm`, with a processor for each queue pair, and brings its network up.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn boot_vmm(&self, name: &str) -> Result<Guest> {
        let vmm = Vmm::new(self.queue_pairs, "512M")?.net(self.socket()?, MAC, self.queue_pairs);
        self.brought_up(vmm.start(name)?)
    }

    /// The same on QEMU.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn boot_qemu(&self, accelerator: Accelerator, name: &str) -> Result<Guest> {
        let qemu = Qemu::new(accelerator, self.queue_pairs, "512M")?.rebooting();
        let qemu = qemu.vhost_user("net0", self.socket()?, self.meeting, MAC, self.queue_pairs);
        self.brought_up(qemu.start(name)?)
    }

    fn brought_up(&self, mut guest: Guest) -> Result<Guest> {
        guest.wait_for_shell()?;
        self.bring_up(&mut guest)?;
        Ok(guest)
    }

    /// As [`bring_up`], with this link's queue pairs.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn bring_up(&self, guest: &mut Guest) -> Result<()> {
        bring_up(guest, self.queue_pairs)
    }

    /// What to look at when a check has failed.
    pub fn evidence(&mut self) -> String {
        format!("status: {:?}\nstats: {:?}\nlog:\n{}", self.status(), self.stats(), self.backend.log())
    }

    /// Waits until the back-end, whose device is another one's, has ended; it must be well.
    ///
    /// # Errors
    /// If it is not, or does not end.
    pub fn wait_backend_ended(&mut self) -> Result<()> {
        let status = self.backend.wait()?;
        ensure!(status.success(), "it ended with {status}:\n{}", self.backend.log());
        Ok(())
    }

    /// That the back-end runs and has not panicked.
    ///
    /// # Errors
    /// If not so.
    pub fn check_healthy(&mut self) -> Result<()> {
        let log = self.backend.log();
        ensure!(self.backend.is_running()?, "the back-end has ended:\n{log}");
        ensure!(!log.contains("panicked"), "the back-end has panicked:\n{log}");
        Ok(())
    }
}

/// Gives a guest that has just booted its address and its end of the checks.
///
/// # Errors
/// If it cannot be.
pub fn bring_up(guest: &mut Guest, queue_pairs: u16) -> Result<()> {
    guest.check("ip link set lo up; ip link set eth0 up")?;
    guest.check(&format!("echo {FULL_SEGMENTS} > {SEGMENTS}"))?;
    guest.check(&format!("ip addr add {GUEST}/24 dev eth0"))?;
    if queue_pairs > 1 {
        // Linux begins with as many as it has processors.
        let command = format!("ethtool -L eth0 combined {queue_pairs}");
        guest.check(&format!("{command} || ethtool -l eth0 | grep -q 'Combined:.*{queue_pairs}'"))?;
    }
    guest.check(&format!("traffic serve --listen={GUEST}:{PORT} --background"))?;
    Ok(())
}

/// Runs `ip`.
///
/// # Errors
/// If it fails.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot run ip")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {text}", arguments.join(" "));
    Ok(())
}

fn command_line(arguments: &[OsString]) -> String {
    let arguments = arguments.iter().map(|argument| argument.to_string_lossy());
    let words: Vec<_> = ["baton-backend".into()].into_iter().chain(arguments).collect();
    words.join(" ")
}

fn option(name: &str, path: &Path) -> OsString {
    let mut option = OsString::from(name);
    option.push(path);
    option
}
