//! Connects a guest and the network by a back-end and its TAP, and checks the traffic between them.
//!
//! The checks suit every front-end that runs a Linux guest. The network's end is the TAP's interface in the test's
//! namespace. `traffic serve` runs at both ends.

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
/// The port on which `traffic serve` listens at both ends.
pub const PORT: u16 = 7000;

/// The minimum number of segments that TCP puts into a frame. On a slow machine TCP would use few.
const SEGMENTS: &str = "/proc/sys/net/ipv4/tcp_min_tso_segs";
/// The number of segments that make 64 KiB.
const FULL_SEGMENTS: &str = "45";

/// How back-end and front-end connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The back-end listens.
    BackendListens,
    /// The front-end listens and the back-end connects.
    FrontendListens,
}

/// A back-end on a TAP that outlives it, with the network's end set up.
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
    /// Stays connected, so that the number of the back-end's descriptors does not change.
    client: Option<ControlClient>,
    _directory: tempfile::TempDir,
    _network: Network,
}

/// The network's end of a link with its TAP, which outlives the back-ends.
#[derive(Debug)]
pub struct Network {
    _server: Process,
    _netns: Netns,
}

impl Network {
    /// Sets up both in a new namespace, which this thread enters.
    ///
    /// # Errors
    /// Returns an error if anything cannot be set up.
    pub fn new(multi_queue: bool) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, multi_queue)?;
        ip(&["addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
        ip(&["link", "set", "lo", "up"])?;
        std::fs::write(SEGMENTS, FULL_SEGMENTS).context(SEGMENTS)?;
        // A permanent neighbour entry: a slow guest may not answer ARP in time.
        ip(&["neigh", "add", &GUEST.to_string(), "lladdr", MAC, "dev", TAP])?;
        let listen = format!("--listen={HOST}:{PORT}");
        let server = Process::start(&programs::traffic()?, &["serve".into(), listen.into()], &[])?;
        Ok(Self { _server: server, _netns: netns })
    }
}

impl Link {
    /// Sets up the network and starts a back-end with so many queue pairs.
    ///
    /// # Errors
    /// Returns an error if anything cannot be set up.
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

    /// Returns what moves the frames.
    pub fn datapath(&self) -> Datapath {
        self.datapath
    }

    /// Returns the number of the device's queue pairs.
    pub fn queue_pairs(&self) -> u16 {
        self.queue_pairs
    }

    /// Returns the path of the vhost-user socket.
    ///
    /// # Errors
    /// Returns an error if the path is not UTF-8.
    pub fn socket(&self) -> Result<&str> {
        self.socket.to_str().context("the path of the socket is not UTF-8")
    }

    /// Returns the path of the back-end's control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Returns the back-end's command line, for a person to read.
    pub fn command_line(&self) -> String {
        command_line(&self.arguments)
    }

    /// Kills the back-end and starts another one in its place.
    ///
    /// # Errors
    /// Returns an error if the new back-end does not start.
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
        serde_json::from_value(client.call(request)?).context("the back-end sent an invalid answer")
    }

    /// Returns the back-end's status.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer.
    pub fn status(&mut self) -> Result<BackendStatus> {
        self.ask(&Request::Status)
    }

    /// Returns the back-end's counters.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer.
    pub fn stats(&mut self) -> Result<BackendStats> {
        self.ask(&Request::Stats)
    }

    /// Waits until the front-end's first rings run and the kernel lets frames through to the TAP, which it does some
    /// time after a back-end has opened the TAP.
    ///
    /// # Errors
    /// Returns an error if this does not happen in time.
    pub fn wait_serving(&mut self) -> Result<()> {
        self.wait_status("a front-end's rings ran", |status| {
            status.vrings[..2].iter().all(|vring| vring.started && vring.enabled)
        })?;
        netns::wait_running(TAP)
    }

    /// Waits until the back-end has no front-end.
    ///
    /// # Errors
    /// Returns an error if the front-end stays connected.
    pub fn wait_left(&mut self) -> Result<()> {
        self.wait_status("the front-end had left", |status| status.frontend == Frontend::Disconnected)
    }

    /// Waits until the back-end's status meets `condition`.
    ///
    /// # Errors
    /// Returns an error if it does not in time.
    pub fn wait_status(&mut self, what: &str, condition: impl Fn(&BackendStatus) -> bool) -> Result<()> {
        // Uses the existing client: the back-end would keep a descriptor for a new one until it notices its end.
        self.status()?;
        let client = self.client.as_mut().context("no control client")?;
        self.backend.wait_until(what, |_| {
            let status: BackendStatus = serde_json::from_value(client.call(&Request::Status)?)?;
            Ok(condition(&status).then_some(()))
        })
    }

    /// Boots a guest on `baton-vmm`, with a processor for each queue pair, and brings up its network.
    ///
    /// # Errors
    /// Returns an error if the guest does not boot or its network cannot be brought up.
    pub fn boot_vmm(&self, name: &str) -> Result<Guest> {
        let vmm = Vmm::new(self.queue_pairs, "512M")?.net(self.socket()?, MAC, self.queue_pairs);
        self.brought_up(vmm.start(name)?)
    }

    /// Like [`Self::boot_vmm`], on QEMU.
    ///
    /// # Errors
    /// As for [`Self::boot_vmm`].
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

    /// Calls [`bring_up`] with this link's queue pairs.
    ///
    /// # Errors
    /// As for [`bring_up`].
    pub fn bring_up(&self, guest: &mut Guest) -> Result<()> {
        bring_up(guest, self.queue_pairs)
    }

    /// Returns the back-end's status, counters and log, for the message of a failed check.
    pub fn evidence(&mut self) -> String {
        format!("status: {:?}\nstats: {:?}\nlog:\n{}", self.status(), self.stats(), self.backend.log())
    }

    /// Waits until the back-end, which has handed its device over, has ended.
    ///
    /// # Errors
    /// Returns an error if it does not end, or fails.
    pub fn wait_backend_ended(&mut self) -> Result<()> {
        let status = self.backend.wait()?;
        ensure!(status.success(), "the back-end ended with {status}:\n{}", self.backend.log());
        Ok(())
    }

    /// Checks that the back-end runs and has not panicked.
    ///
    /// # Errors
    /// Returns an error if it has ended or panicked.
    pub fn check_healthy(&mut self) -> Result<()> {
        let log = self.backend.log();
        ensure!(self.backend.is_running()?, "the back-end ended:\n{log}");
        ensure!(!log.contains("panicked"), "the back-end panicked:\n{log}");
        Ok(())
    }
}

/// Sets up the network and the `traffic` server of a guest that has just booted.
///
/// # Errors
/// Returns an error if a command in the guest fails.
pub fn bring_up(guest: &mut Guest, queue_pairs: u16) -> Result<()> {
    guest.check("ip link set lo up; ip link set eth0 up")?;
    guest.check(&format!("echo {FULL_SEGMENTS} > {SEGMENTS}"))?;
    guest.check(&format!("ip addr add {GUEST}/24 dev eth0"))?;
    if queue_pairs > 1 {
        // Linux begins with a queue pair for each processor, at most.
        let command = format!("ethtool -L eth0 combined {queue_pairs}");
        guest.check(&format!("{command} || ethtool -l eth0 | grep -q 'Combined:.*{queue_pairs}'"))?;
    }
    guest.check(&format!("traffic serve --listen={GUEST}:{PORT} --background"))?;
    Ok(())
}

/// Runs `ip`.
///
/// # Errors
/// Returns an error if it fails.
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
