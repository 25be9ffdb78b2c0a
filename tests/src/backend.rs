//! `baton-backend` for a test: with its sockets in a directory of its own, and a TAP in a namespace of its own.

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{
    BackendStats, BackendStatus, Frontend, HandoverState, HandoverStatus, QueuePairStats, Request,
    SessionReport,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::datapath::{self, Datapath};
use crate::fake_frontend::{Connection, Device, NetHeader, Options};
use crate::faults::Faults;
use crate::frames;
use crate::images;
use crate::netns::Netns;
use crate::packet_socket::PacketSocket;
use crate::process::{PATIENCE, Process, until};
use crate::programs;
use crate::users::{UNPRIVILEGED, as_user};

/// The socket on which a back-end waits for a device.
const INCOMING: &str = "incoming";

/// What a back-end says when it can be given a session.
pub const WAITS: &str = "waiting for a device";

/// The TAP of a [`Rig`].
pub const TAP: &str = "tap0";

/// What a back-end waits for, on a socket in its directory.
#[derive(Clone, Copy, Debug)]
enum Place {
    FrontEnds,
    Session,
}

/// A running back-end, with a control socket.
#[derive(Debug)]
pub struct Backend {
    /// The process.
    pub process: Process,
    /// The vhost-user socket's path, if it was started on one.
    pub socket: PathBuf,
    /// The control socket's path.
    pub control: PathBuf,
    client: Option<ControlClient>,
    directory: tempfile::TempDir,
    /// Where the socket is that came with its session.
    origin: Option<tempfile::TempDir>,
}

impl Backend {
    /// Starts a back-end that listens, with these further arguments.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn listening(datapath: Datapath, arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut socket = OsString::from("--socket-path=");
        socket.push(directory.path().join("vhost-user"));
        Self::start(directory, vec![socket], datapath, arguments, fds)
    }

    /// Starts a back-end with nothing but a control socket and these arguments.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with_arguments(datapath: Datapath, arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start(tempfile::tempdir()?, Vec::new(), datapath, arguments, fds)
    }

    /// Starts a back-end that listens, and waits for a device, with these further arguments.
    ///
    /// # Errors
    /// If it cannot be started, or does not listen.
    pub fn waiting(datapath: Datapath, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let options = [("--socket-path=", "vhost-user"), ("--incoming-fds=", INCOMING)];
        let options = options.map(|(option, name)| {
            let mut option = OsString::from(option);
            option.push(directory.path().join(name));
            option
        });
        let mut backend = Self::start(directory, options.into(), datapath, arguments, &[])?;
        // It answers once it has everything that it was told to have.
        backend.status()?;
        Ok(backend)
    }

    /// Starts a back-end that waits for a session, with these further arguments.
    ///
    /// # Errors
    /// If it cannot be started, or does not listen.
    pub fn waiting_for_session(datapath: Datapath, arguments: &[&str]) -> Result<Self> {
        Self::waiting_with_faults(datapath, arguments, &Faults::default())
    }

    /// Likewise, with fault points if any are wanted.
    ///
    /// # Errors
    /// If it cannot be started, or does not listen.
    pub fn waiting_with_faults(datapath: Datapath, arguments: &[&str], faults: &Faults) -> Result<Self> {
        let mut backend =
            Self::start_faulty(tempfile::tempdir()?, Place::Session, datapath, arguments, faults)?;
        // It answers once it has everything that it was told to have.
        backend.status()?;
        Ok(backend)
    }

    /// Asks it to hand its session over to a back-end that waits there.
    ///
    /// # Errors
    /// If it refuses.
    pub fn hand_over_to(&mut self, path: &Path, dry_run: bool) -> Result<serde_json::Value> {
        let path = Some(path.display().to_string());
        self.ask(&Request::Handover { path, on_suspend: false, dry_run, cancel: false })
    }

    /// Hands its session over to one that waits, and is that one from then on. Gives the report.
    ///
    /// # Errors
    /// If that does not work, or the old one does not end by itself.
    pub fn become_target(&mut self, target: Self) -> Result<SessionReport> {
        let report = self.ask_hand_over_to(&target)?;
        self.succeed(target, report)
    }

    /// The same beside so much work that the target may be too slow, and is asked again.
    ///
    /// # Errors
    /// As [`Self::become_target`].
    pub fn become_busy_target(&mut self, target: Self) -> Result<SessionReport> {
        let report = in_time(|| self.ask_hand_over_to(&target))?;
        self.succeed(target, report)
    }

    fn ask_hand_over_to(&mut self, target: &Self) -> Result<SessionReport> {
        let answer = self.hand_over_to(&target.incoming(), false)?;
        serde_json::from_value(answer.clone()).with_context(|| format!("{answer}"))
    }

    fn succeed(&mut self, target: Self, report: SessionReport) -> Result<SessionReport> {
        ensure!(
            matches!(report, SessionReport::Completed { .. }),
            "{report:?}; log:\n{}",
            self.process.log()
        );
        self.is_succeeded_by(target)?;
        Ok(report)
    }

    /// Its session is the target's, which it is from then on.
    ///
    /// # Errors
    /// If it does not end by itself.
    pub fn is_succeeded_by(&mut self, target: Self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.code() == Some(0), "{status}; log:\n{}", self.process.log());
        ensure!(!self.control.exists() || self.control == target.control, "its control socket is left");
        drop(self.succeeded_by(target));
        Ok(())
    }

    /// Is that one from now on, which has its session. Gives the old one.
    pub fn succeeded_by(&mut self, mut target: Self) -> Process {
        target.socket.clone_from(&self.socket);
        let source = std::mem::replace(self, target);
        self.origin = source.origin.or(Some(source.directory));
        source.process
    }

    /// Where it waits for a device.
    pub fn incoming(&self) -> PathBuf {
        self.directory().join(INCOMING)
    }

    /// Asks it to hand its device over to a back-end that waits there, when its rings are stopped.
    ///
    /// # Errors
    /// If it refuses.
    pub fn arm(&mut self, path: &Path) -> Result<serde_json::Value> {
        self.ask(&Request::Handover {
            path: Some(path.display().to_string()),
            on_suspend: true,
            dry_run: false,
            cancel: false,
        })
    }

    /// Ends the hand-over.
    ///
    /// # Errors
    /// If it refuses.
    pub fn cancel(&mut self) -> Result<serde_json::Value> {
        self.ask(&Request::Handover { path: None, on_suspend: false, dry_run: false, cancel: true })
    }

    /// Waits until nothing is handed over.
    ///
    /// # Errors
    /// If something always is.
    pub fn wait_no_handover(&mut self) -> Result<()> {
        until("nothing was handed over", || Ok(self.status()?.handover.is_none()))
    }

    /// Waits until a hand-over stands like this; gives it.
    ///
    /// # Errors
    /// If it never does.
    pub fn wait_handover(&mut self, state: HandoverState) -> Result<HandoverStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let handover = self.status()?.handover;
            if let Some(handover) = handover.as_ref().filter(|handover| handover.state == state) {
                return Ok(handover.clone());
            }
            ensure!(
                Instant::now() < deadline,
                "the hand-over stays {handover:?}; log:\n{}",
                self.process.log()
            );
        }
    }

    /// A folder that root made for the user of [`Self::unprivileged`], in a folder that only root writes.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn unprivileged_directory() -> Result<(tempfile::TempDir, PathBuf)> {
        let outer = tempfile::tempdir()?;
        std::fs::set_permissions(outer.path(), Permissions::from_mode(0o755))?;
        let directory = outer.path().join("unprivileged");
        std::fs::create_dir(&directory)?;
        std::os::unix::fs::chown(&directory, Some(UNPRIVILEGED), None)?;
        Ok((outer, directory))
    }

    /// Starts a back-end that listens, as a user without any rights.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn unprivileged(arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = format!("--socket-path={}", directory.path().join("vhost-user").display());
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777))?;
        // Where programs are built not everyone may look.
        let program = directory.path().join("baton-backend");
        std::fs::copy(programs::backend()?, &program)?;
        let mut prefix: Vec<_> = [
            &*format!("--reuid={UNPRIVILEGED}"),
            "--regid=65534",
            "--clear-groups",
            "--no-new-privs",
            "--pdeathsig=KILL",
        ]
        .map(OsString::from)
        .into();
        prefix.extend([program.into(), socket.into()]);
        // With the options of no datapath: the arguments say it.
        let setpriv = images::found("setpriv")?;
        Self::start_program(&setpriv, directory, prefix, Datapath::Userspace, arguments, fds)
    }

    /// As [`Self::listening`], with fault points if any are wanted.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with_faults(datapath: Datapath, arguments: &[&str], faults: &Faults) -> Result<Self> {
        Self::start_faulty(tempfile::tempdir()?, Place::FrontEnds, datapath, arguments, faults)
    }

    /// Kills it, and starts another one at the same sockets at once.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn replace(&mut self, datapath: Datapath, arguments: &[&str], faults: &Faults) -> Result<()> {
        if self.process.is_running()? {
            self.process.signal(Signal::SIGKILL)?;
        }
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir()?);
        *self = Self::start_faulty(directory, Place::FrontEnds, datapath, arguments, faults)?;
        Ok(())
    }

    fn start_faulty(
        directory: tempfile::TempDir,
        place: Place,
        datapath: Datapath,
        arguments: &[&str],
        faults: &Faults,
    ) -> Result<Self> {
        let (option, name) = match place {
            Place::FrontEnds => ("--socket-path=", "vhost-user"),
            Place::Session => ("--incoming-fds=", INCOMING),
        };
        let mut socket = OsString::from(option);
        socket.push(directory.path().join(name));
        if !faults.any() {
            return Self::start(directory, vec![socket], datapath, arguments, &[]);
        }
        // It becomes the program: it is the same process.
        let environment = faults.environment().map(|(name, value)| format!("{name}={value}").into());
        let prefix = [environment.as_slice(), &[programs::faulty_backend()?.into(), socket]].concat();
        Self::start_program(&images::found("env")?, directory, prefix, datapath, arguments, &[])
    }

    fn start(
        directory: tempfile::TempDir,
        all: Vec<OsString>,
        datapath: Datapath,
        arguments: &[&str],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Self> {
        Self::start_program(&programs::backend()?, directory, all, datapath, arguments, fds)
    }

    fn start_program(
        program: &Path,
        directory: tempfile::TempDir,
        mut all: Vec<OsString>,
        datapath: Datapath,
        arguments: &[&str],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Self> {
        let control = directory.path().join("control");
        let mut option = OsString::from("--control-socket=");
        option.push(&control);
        all.push(option);
        all.extend(datapath::options(datapath).iter().chain(arguments).map(OsString::from));
        let process = Process::start(program, &all, fds)?;
        let socket = directory.path().join("vhost-user");
        Ok(Self { process, socket, control, client: None, directory, origin: None })
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

    /// Connects as a front-end of another user, for whom the way to the socket is opened.
    ///
    /// # Errors
    /// If it does not listen.
    pub fn connect_as(&mut self, user: u32) -> Result<Connection> {
        drop(self.connect()?);
        std::fs::set_permissions(self.directory(), Permissions::from_mode(0o711))?;
        std::fs::set_permissions(&self.socket, Permissions::from_mode(0o666))?;
        let socket = self.socket.clone();
        as_user(user, move || Connection::connect(&socket))
    }

    /// Connects and brings a device up.
    ///
    /// # Errors
    /// If it does not work.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        Device::on_stream(self.process.connect(&self.socket)?, options)
    }

    /// Asks something over the control socket. The connection is kept, so that it is among the open descriptors always.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn ask(&mut self, request: &Request) -> Result<serde_json::Value> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                let control = &self.control;
                let connect = |_: &Process| Ok(ControlClient::connect(control).ok());
                self.client.insert(self.process.wait_until("it served its control socket", connect)?)
            }
        };
        Ok(client.call(request)?)
    }

    /// Connects anew when it is asked next.
    pub fn forget_client(&mut self) {
        self.client = None;
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
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stats = self.pair_stats(pair)?;
            if condition(&stats) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the counters of pair {pair} stay {stats:?}");
        }
    }

    /// Waits until a ring runs.
    ///
    /// # Errors
    /// If it never does.
    pub fn wait_started(&mut self, index: u32) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let vrings = self.status()?.vrings;
            // Without a front-end there may be none yet.
            if vrings.get(usize::try_from(index)?).is_some_and(|vring| vring.started) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "vring {index} does not start: {vrings:?}");
        }
    }

    /// How many descriptors it has open while no front-end is connected.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn fds_at_rest(&mut self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        // Control clients that have gone have been noticed once a request made after that is answered.
        self.status()?;
        while self.status()?.frontend != Frontend::Disconnected {
            ensure!(Instant::now() < deadline, "the front-end stays connected");
        }
        self.process.open_fds()
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

/// Has a session handed over by `attempt`. A source does not wait for long, the less while nobody serves: a target that is
/// too slow, as it may be on an emulated machine, is asked again, and the test says so. Nothing may be lost by that either.
///
/// # Errors
/// Those of `attempt`.
pub fn in_time(mut attempt: impl FnMut() -> Result<SessionReport>) -> Result<SessionReport> {
    const ATTEMPTS: usize = 3;
    for _ in 1..ATTEMPTS {
        let report = attempt()?;
        let is_slow = |reason: &str| reason == "the target does not answer";
        if !matches!(&report, SessionReport::RolledBack { reason, .. } if is_slow(reason)) {
            return Ok(report);
        }
        eprintln!("asked again: {report:?}");
    }
    attempt()
}

/// A back-end that listens and has a TAP, with the network's side of it at hand: all in a namespace of its own.
#[derive(Debug)]
pub struct Rig {
    /// The network's side of the TAP.
    pub network: PacketSocket,
    /// The back-end.
    pub backend: Backend,
    /// Who moves its frames.
    pub datapath: Datapath,
    arguments: Vec<String>,
    /// The namespace. Left last.
    pub netns: Netns,
}

impl Rig {
    /// A back-end of this many queue pairs, with these further arguments.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(datapath: Datapath, queue_pairs: u16, arguments: &[&str]) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, queue_pairs > 1)?;
        let network = PacketSocket::open(TAP)?;
        let mut all = vec![format!("--tap={TAP}"), format!("--queue-pairs={queue_pairs}")];
        all.extend(arguments.iter().map(|&argument| argument.into()));
        let backend = Self::start_backend(datapath, &all)?;
        Ok(Self { network, backend, datapath, arguments: all, netns })
    }

    fn start_backend(datapath: Datapath, arguments: &[String]) -> Result<Backend> {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut backend = Backend::listening(datapath, &arguments, &[])?;
        // It answers once it has everything that it was told to have.
        backend.status()?;
        Ok(backend)
    }

    /// Kills the back-end, wherever it is.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn kill_backend(&mut self) -> Result<()> {
        self.backend.process.signal(Signal::SIGKILL)?;
        self.backend.process.wait()?;
        Ok(())
    }

    /// Starts another back-end in the place of one that was killed.
    ///
    /// # Errors
    /// If that does not start.
    pub fn restart_backend(&mut self) -> Result<()> {
        self.backend = Self::start_backend(self.datapath, &self.arguments)?;
        Ok(())
    }

    /// Connects and brings a device up.
    ///
    /// # Errors
    /// If it does not work.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        self.backend.device(options)
    }

    /// Sends frames through a device's transmit ring and sees them arrive: after that, the pair's worker has looked at
    /// everything that was there before.
    ///
    /// # Errors
    /// If they do not arrive.
    pub fn worker_rounds(&mut self, device: &mut Device, pair: usize) -> Result<()> {
        for round in 0..10 {
            let frame = frames::numbered(round, 60);
            device.send(pair, &NetHeader::default(), &frame)?;
            let (_, received) = self.network.receive()?;
            ensure!(received == frame, "the network received something else");
        }
        Ok(())
    }

    /// Sends numbered frames from the network.
    ///
    /// # Errors
    /// If the TAP takes no more.
    pub fn inject(&self, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            self.network.send(&frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Sends numbered frames from the guest, without waiting for the device to take them.
    ///
    /// # Errors
    /// If it does not take as many as the ring has no room for.
    pub fn transmit(&self, device: &mut Device, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            device.send(0, &NetHeader::default(), &frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames are the next ones to arrive in the guest.
    ///
    /// # Errors
    /// If others arrive, or none.
    pub fn expect_in_guest(&self, device: &mut Device, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = device.receive(0).with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "frame {number} is {:?}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames are the next ones to arrive on the network.
    ///
    /// # Errors
    /// If others arrive, or none.
    pub fn expect_on_network(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = self.network.receive().with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "frame {number} is {:?}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Waits for a frame on whichever queue pair the kernel has put it: gives that pair, and the frame.
    ///
    /// # Errors
    /// If none arrives.
    pub fn receive_on_any(&self, device: &mut Device) -> Result<(usize, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        let mut frame = Vec::new();
        loop {
            for pair in 0..device.pairs.len() {
                if device.try_receive(pair, &mut frame)?.is_some() {
                    return Ok((pair, frame));
                }
            }
            let calls = device.pairs.iter_mut().map(|pair| pair.receive.queue.enable_calls());
            if calls.fold(true, |idle, none| idle & none) {
                let left = deadline.saturating_duration_since(Instant::now());
                let fds = device.pairs.iter().map(|pair| pair.receive.call.as_fd());
                let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
                poll(&mut fds, PollTimeout::try_from(left)?)?;
                for pair in &device.pairs {
                    pair.receive.take_calls()?;
                }
                ensure!(Instant::now() < deadline, "no frame arrived in the guest");
            }
        }
    }

    /// Sends a frame each way through a device, and checks that it arrives.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_traffic(&mut self, device: &mut Device) -> Result<()> {
        for pair in 0..device.pairs.len() {
            let frame = frames::numbered(u32::try_from(pair)?, 100 + pair);
            device.send(pair, &NetHeader::default(), &frame)?;
            let (_, received) = self.network.receive()?;
            ensure!(received == frame, "the network received something else");
        }
        let frame = frames::numbered(77, 177);
        self.network.send(&frame)?;
        let (_, received) = self.receive_on_any(device)?;
        ensure!(received == frame, "the guest received something else");
        Ok(())
    }
}
