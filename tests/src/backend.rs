//! Runs `baton-backend` for a test, with its sockets in a temporary directory. [`Rig`] adds a TAP in a private network
//! namespace. [`handover`] starts hand-overs and waits for their states.

pub mod handover;
pub mod rig;

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{BackendStats, BackendStatus, Frontend, QueuePairStats, Request};
use nix::sys::signal::Signal;

pub use self::handover::in_time;
pub use self::rig::{Rig, TAP};
use crate::datapath::{self, Datapath};
use crate::fake_frontend::{Connection, Device, Options};
use crate::faults::Faults;
use crate::images;
use crate::process::{PATIENCE, Process};
use crate::programs;
use crate::users::{UNPRIVILEGED, as_user};

/// The name of the socket on which a back-end waits for a device or a session.
const INCOMING: &str = "incoming";

/// What a back-end logs when it is ready to take a session.
pub const WAITS: &str = "waiting for a device";

/// What a back-end waits for on the socket in its directory.
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
    /// The directory of the first source's vhost-user socket, kept across hand-overs.
    origin: Option<tempfile::TempDir>,
}

impl Backend {
    /// Starts a back-end that listens for front-ends, with these further arguments.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started.
    pub fn listening(datapath: Datapath, arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut socket = OsString::from("--socket-path=");
        socket.push(directory.path().join("vhost-user"));
        Self::start(directory, vec![socket], datapath, arguments, fds)
    }

    /// Starts a back-end with only a control socket and these arguments.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started.
    pub fn with_arguments(datapath: Datapath, arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start(tempfile::tempdir()?, Vec::new(), datapath, arguments, fds)
    }

    /// Starts a back-end that listens for front-ends and waits for a device, with these further arguments.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started or does not listen.
    pub fn waiting(datapath: Datapath, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let options = [("--socket-path=", "vhost-user"), ("--incoming-fds=", INCOMING)];
        let options = options.map(|(option, name)| {
            let mut option = OsString::from(option);
            option.push(directory.path().join(name));
            option
        });
        let mut backend = Self::start(directory, options.into(), datapath, arguments, &[])?;
        // The control socket answers once the back-end is set up.
        backend.status()?;
        Ok(backend)
    }

    /// Starts a back-end that waits for a session, with these further arguments.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started or does not listen.
    pub fn waiting_for_session(datapath: Datapath, arguments: &[&str]) -> Result<Self> {
        Self::waiting_with_faults(datapath, arguments, &Faults::default())
    }

    /// As [`Self::waiting_for_session`], with fault points.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started or does not listen.
    pub fn waiting_with_faults(datapath: Datapath, arguments: &[&str], faults: &Faults) -> Result<Self> {
        let mut backend =
            Self::start_faulty(tempfile::tempdir()?, Place::Session, datapath, arguments, faults)?;
        // The control socket answers once the back-end is set up.
        backend.status()?;
        Ok(backend)
    }

    /// Creates a directory that belongs to the user of [`Self::unprivileged`], inside one that only root may write to.
    /// Returns the outer directory and the path of the inner one.
    ///
    /// # Errors
    /// Returns an error if a directory cannot be created.
    pub fn unprivileged_directory() -> Result<(tempfile::TempDir, PathBuf)> {
        let outer = tempfile::tempdir()?;
        std::fs::set_permissions(outer.path(), Permissions::from_mode(0o755))?;
        let directory = outer.path().join("unprivileged");
        std::fs::create_dir(&directory)?;
        std::os::unix::fs::chown(&directory, Some(UNPRIVILEGED), None)?;
        Ok((outer, directory))
    }

    /// Starts a back-end that listens for front-ends, as an unprivileged user.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started.
    pub fn unprivileged(arguments: &[&str], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = format!("--socket-path={}", directory.path().join("vhost-user").display());
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777))?;
        // The unprivileged user may have no access to the build directory.
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
        // Adds no datapath option: the caller's arguments choose the datapath.
        let setpriv = images::found("setpriv")?;
        Self::start_program(&setpriv, directory, prefix, Datapath::Userspace, arguments, fds)
    }

    /// As [`Self::listening`], with fault points.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started.
    pub fn with_faults(datapath: Datapath, arguments: &[&str], faults: &Faults) -> Result<Self> {
        Self::start_faulty(tempfile::tempdir()?, Place::FrontEnds, datapath, arguments, faults)
    }

    /// Kills the back-end and starts another one on the same socket paths.
    ///
    /// # Errors
    /// Returns an error if the new back-end cannot be started.
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
        // `env` executes the program in the same process.
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

    /// The directory that contains the sockets.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Connects as a front-end as soon as the back-end listens.
    ///
    /// # Errors
    /// Returns an error if the back-end does not listen.
    pub fn connect(&mut self) -> Result<Connection> {
        Connection::new(self.process.connect(&self.socket)?)
    }

    /// Connects as a front-end that runs as another user, after granting that user access to the socket.
    ///
    /// # Errors
    /// Returns an error if the back-end does not listen.
    pub fn connect_as(&mut self, user: u32) -> Result<Connection> {
        drop(self.connect()?);
        std::fs::set_permissions(self.directory(), Permissions::from_mode(0o711))?;
        std::fs::set_permissions(&self.socket, Permissions::from_mode(0o666))?;
        let socket = self.socket.clone();
        as_user(user, move || Connection::connect(&socket))
    }

    /// Connects as a front-end and brings a device up.
    ///
    /// # Errors
    /// Returns an error if the back-end does not listen or refuses a message.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        Device::on_stream(self.process.connect(&self.socket)?, options)
    }

    /// Sends a request over the control socket. Keeps the connection open, so that the number of the back-end's
    /// descriptors does not change between requests.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer or refuses.
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

    /// Drops the control connection; the next request opens a new one.
    pub fn forget_client(&mut self) {
        self.client = None;
    }

    /// Requests the back-end's status.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer.
    pub fn status(&mut self) -> Result<BackendStatus> {
        serde_json::from_value(self.ask(&Request::Status)?).context("a back-end's status")
    }

    /// Requests the back-end's counters.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer.
    pub fn stats(&mut self) -> Result<BackendStats> {
        serde_json::from_value(self.ask(&Request::Stats)?).context("a back-end's counters")
    }

    /// Requests the counters of one queue pair.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer or has no such queue pair.
    pub fn pair_stats(&mut self, pair: usize) -> Result<QueuePairStats> {
        self.stats()?.queue_pairs.get(pair).copied().with_context(|| format!("no queue pair {pair}"))
    }

    /// Waits until the counters of a queue pair satisfy a condition.
    ///
    /// # Errors
    /// Returns an error if the counters do not satisfy the condition in time.
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
            ensure!(Instant::now() < deadline, "the counters of pair {pair} remain {stats:?}");
        }
    }

    /// Waits until a vring is started.
    ///
    /// # Errors
    /// Returns an error if the vring is not started in time.
    pub fn wait_started(&mut self, index: u32) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let vrings = self.status()?.vrings;
            // The list may be empty while no front-end is connected.
            if vrings.get(usize::try_from(index)?).is_some_and(|vring| vring.started) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "vring {index} does not start: {vrings:?}");
        }
    }

    /// Waits until no front-end is connected and returns the number of open descriptors.
    ///
    /// # Errors
    /// Returns an error if the back-end does not answer or the front-end stays connected.
    pub fn fds_at_rest(&mut self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        // Once the back-end answers a new request, it has noticed earlier control clients that disconnected.
        self.status()?;
        while self.status()?.frontend != Frontend::Disconnected {
            ensure!(Instant::now() < deadline, "the front-end stays connected");
        }
        self.process.open_fds()
    }

    /// Checks that the back-end is running and has not panicked.
    ///
    /// # Errors
    /// Returns an error if the back-end has ended or panicked.
    pub fn check_healthy(&mut self) -> Result<()> {
        ensure!(self.process.is_running()?, "the back-end has ended; its log:\n{}", self.process.log());
        let log = self.process.log();
        ensure!(!log.contains("panicked"), "the back-end has panicked:\n{log}");
        Ok(())
    }
}
