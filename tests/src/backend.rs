//! `baton-backend` for a test: with its sockets in a directory of its own, and a TAP in a namespace of its own.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{BackendStats, BackendStatus, QueuePairStats, Request};

use crate::fake_frontend::{Connection, Device, Options};
use crate::netns::Netns;
use crate::packet_socket::PacketSocket;
use crate::process::{Process, program};

/// The TAP of a [`Rig`].
pub const TAP: &str = "tap0";

/// A running back-end, with a control socket.
#[derive(Debug)]
pub struct Backend {
    /// The process.
    pub process: Process,
    /// The vhost-user socket's path, if it was started on one.
    pub socket: PathBuf,
    /// The control socket's path.
    pub control: PathBuf,
    directory: tempfile::TempDir,
}

impl Backend {
    /// Starts a back-end that listens, with these further arguments.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn listening(arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut socket = OsString::from("--socket-path=");
        socket.push(directory.path().join("vhost-user"));
        Self::start(directory, vec![socket], arguments, fds)
    }

    /// Starts a back-end with nothing but a control socket and these arguments.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with_arguments(arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start(tempfile::tempdir()?, Vec::new(), arguments, fds)
    }

    fn start(
        directory: tempfile::TempDir,
        mut all: Vec<OsString>,
        arguments: &[&str],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Self> {
        let control = directory.path().join("control");
        let mut option = OsString::from("--control-socket=");
        option.push(&control);
        all.push(option);
        all.extend(arguments.iter().map(OsString::from));
        let process = Process::start(&program("baton-backend")?, &all, fds)?;
        Ok(Self { process, socket: directory.path().join("vhost-user"), control, directory })
    }

    /// The directory of its sockets.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Connects as a front-end, once it listens.
    ///
    /// # Errors
    /// If it does not.
    pub fn connect(&mut self) -> Result<Connection> {
        Connection::new(self.process.connect(&self.socket)?)
    }

    /// Connects and brings a device up.
    ///
    /// # Errors
    /// If it does not work.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        Device::on_stream(self.process.connect(&self.socket)?, options)
    }

    /// Asks something over the control socket.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn ask(&mut self, request: &Request) -> Result<serde_json::Value> {
        self.process.connect(&self.control)?;
        Ok(ControlClient::connect(&self.control)?.call(request)?)
    }

    /// Its status.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn status(&mut self) -> Result<BackendStatus> {
        serde_json::from_value(self.ask(&Request::Status)?).context("a back-end's status")
    }

    /// Its counters.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn stats(&mut self) -> Result<BackendStats> {
        serde_json::from_value(self.ask(&Request::Stats)?).context("a back-end's counters")
    }

    /// The counters of one queue pair.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn pair_stats(&mut self, pair: usize) -> Result<QueuePairStats> {
        self.stats()?.queue_pairs.get(pair).copied().with_context(|| format!("pair {pair}"))
    }

    /// Waits until the counters of a queue pair satisfy a condition.
    ///
    /// # Errors
    /// If they never do.
    pub fn wait_pair_stats(
        &mut self,
        pair: usize,
        condition: impl Fn(&QueuePairStats) -> bool,
    ) -> Result<()> {
        let mut client = ControlClient::connect(&self.control)?;
        self.process.wait_until("its counters were as expected", |_| {
            let stats: BackendStats = serde_json::from_value(client.call(&Request::Stats)?)?;
            let stats = stats.queue_pairs.get(pair).context("no such pair")?;
            Ok(condition(stats).then_some(()))
        })
    }

    /// That it runs, and has neither panicked nor complained about itself.
    ///
    /// # Errors
    /// If not so.
    pub fn check_healthy(&mut self) -> Result<()> {
        ensure!(self.process.is_running()?, "the back-end has ended; its log:\n{}", self.process.log());
        let log = self.process.log();
        ensure!(!log.contains("panicked"), "the back-end has panicked:\n{log}");
        Ok(())
    }
}

/// A back-end that listens and has a TAP, with the network's side of it at hand: all in a namespace of its own.
#[derive(Debug)]
pub struct Rig {
    /// The network's side of the TAP.
    pub network: PacketSocket,
    /// The back-end.
    pub backend: Backend,
    /// The namespace. Left last.
    pub netns: Netns,
}

impl Rig {
    /// A back-end of this many queue pairs, with these further arguments.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(queue_pairs: u16, arguments: &[&str]) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, queue_pairs > 1)?;
        let network = PacketSocket::open(TAP)?;
        let tap = format!("--tap={TAP}");
        let queue_pairs = format!("--queue-pairs={queue_pairs}");
        let arguments: Vec<_> =
            [tap.as_str(), queue_pairs.as_str()].iter().chain(arguments).copied().collect();
        let mut backend = Backend::listening(&arguments, &[])?;
        // It answers once it has everything that it was told to have.
        backend.status()?;
        Ok(Self { network, backend, netns })
    }

    /// Connects and brings a device up.
    ///
    /// # Errors
    /// If it does not work.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        self.backend.device(options)
    }

    /// Sends a frame each way through a device, and checks that it arrives.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_traffic(&mut self, device: &mut Device) -> Result<()> {
        for pair in 0..device.pairs.len() {
            let frame = crate::frames::numbered(u32::try_from(pair)?, 100 + pair);
            device.send(pair, &crate::fake_frontend::NetHeader::default(), &frame)?;
            let (_, received) = self.network.receive()?;
            ensure!(received == frame, "the network received something else");
        }
        let frame = crate::frames::numbered(77, 177);
        self.network.send(&frame)?;
        // Which queue of several it is given to is the kernel's choice.
        let deadline = std::time::Instant::now() + crate::process::PATIENCE;
        let mut received = Vec::new();
        'found: loop {
            for pair in 0..device.pairs.len() {
                if device.try_receive(pair, &mut received)?.is_some() {
                    break 'found;
                }
            }
            if device.pairs.len() == 1 {
                device.receive_until(0, &mut received, deadline)?;
                break;
            }
            ensure!(std::time::Instant::now() < deadline, "no frame arrived in the guest");
            std::thread::yield_now();
        }
        ensure!(received == frame, "the guest received something else");
        Ok(())
    }
}
