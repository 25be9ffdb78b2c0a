//! A fake source of a migration, which can send a target anything, and the baton-vmm that waits for it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::ownership::SharedWord;
use baton_channel::sealed_memfd;
use baton_control::ControlClient;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{Request, VmmState, VmmStatus};
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::migration::facts::{MachineFacts, NetFacts};
use baton_protocol::migration::message::{
    Hello, Message, OWNERSHIP_FD, PROGRAM, Prepare, RamRegion, State, ram_fd,
};
use baton_protocol::migration::state::{PlatformState, SerialState, VmState};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::process::Process;
use crate::programs;

/// Limits the wait of a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The VM's memory.
pub const MEMORY: u64 = 64 << 20;

/// A baton-vmm that waits for a source.
#[derive(Debug)]
pub struct Waiting {
    /// Its process.
    pub process: Process,
    path: PathBuf,
    control: ControlClient,
    fds: usize,
}

impl Waiting {
    /// Starts it with its sockets in `directory`, [`MEMORY`] and these further arguments.
    ///
    /// # Errors
    /// Returns an error if it does not begin to wait.
    pub fn start(directory: &Path, arguments: &[&str]) -> Result<Self> {
        let (path, control) = (directory.join("incoming"), directory.join("control"));
        let own = [
            format!("--incoming={}", path.display()),
            format!("--control-socket={}", control.display()),
            "--memory=64M".to_owned(),
        ];
        let arguments: Vec<_> =
            own.iter().map(String::as_str).chain(arguments.iter().copied()).map(Into::into).collect();
        let mut process = Process::start(&programs::vmm()?, &arguments, &[])?;
        let connect = |_: &Process| Ok(ControlClient::connect(&control).ok());
        let control = process.wait_until("the VMM served its control socket", connect)?;
        let mut waiting = Self { process, path, control, fds: 0 };
        waiting.check()?;
        waiting.fds = waiting.process.open_fds()?;
        Ok(waiting)
    }

    /// Sends it a request.
    ///
    /// # Errors
    /// Returns an error if it refuses or does not answer.
    pub fn ask(&mut self, request: &Request) -> Result<serde_json::Value> {
        Ok(self.control.call(request)?)
    }

    /// Checks that it waits. Returns its status.
    ///
    /// # Errors
    /// Returns an error if it does not.
    pub fn check(&mut self) -> Result<VmmStatus> {
        let status: VmmStatus = serde_json::from_value(self.ask(&Request::Status)?)?;
        ensure!(status.state == VmmState::Incoming, "{status:?}");
        Ok(status)
    }

    /// Opens a connection over which a test can send anything.
    ///
    /// # Errors
    /// Returns an error if it does not listen.
    pub fn stranger(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Connects a source whose HELLO the VMM accepts.
    ///
    /// # Errors
    /// Returns an error if the VMM does not accept it.
    pub fn greeted(&self) -> Result<Source> {
        self.greeted_by(&hello())
    }

    /// Connects a source whose HELLO the VMM accepts.
    ///
    /// # Errors
    /// Returns an error if the VMM does not accept it.
    pub fn greeted_by(&self, hello: &Message) -> Result<Source> {
        let source = self.connected()?;
        source.say(hello)?;
        source.expect("HELLO")?;
        Ok(source)
    }

    /// Connects a source that has sent nothing.
    ///
    /// # Errors
    /// Returns an error if the VMM does not listen.
    pub fn connected(&self) -> Result<Source> {
        Ok(Source(MessageSocket::try_from(OwnedFd::from(self.stranger()?))?))
    }

    /// Checks that the VMM has dropped the last source and everything it got from it, and accepts another source.
    ///
    /// # Errors
    /// Returns an error if it does not.
    pub fn check_waits(&mut self) -> Result<()> {
        self.check_waits_for(&hello())
    }

    /// As [`Self::check_waits`], for a source with this HELLO.
    ///
    /// # Errors
    /// As [`Self::check_waits`].
    pub fn check_waits_for(&mut self, hello: &Message) -> Result<()> {
        let greeted = self.greeted_by(hello);
        drop(greeted.with_context(|| format!("the VMM's log:\n{}", self.process.log()))?);
        self.process.wait_open_fds(self.fds)?;
        self.check().map(drop)
    }
}

/// A source that can send any message.
#[derive(Debug)]
pub struct Source(MessageSocket);

impl Source {
    /// Sends a message without descriptors.
    ///
    /// # Errors
    /// Returns an error if the target does not take it.
    pub fn say(&self, message: &Message) -> Result<()> {
        Ok(self.0.send(message, &[], PATIENCE)?)
    }

    /// Expects a message of this name.
    ///
    /// # Errors
    /// Returns an error if another one or none arrives.
    pub fn expect(&self, name: &str) -> Result<()> {
        let message = self.0.receive::<Message>(PATIENCE)?.message;
        ensure!(message.name() == name, "{message:?} instead of {name}");
        Ok(())
    }

    /// Expects a refusal for `reason` that mentions `text`, and then the end of the connection.
    ///
    /// # Errors
    /// Returns an error if anything else arrives.
    pub fn expect_refusal(&self, reason: &str, text: &str) -> Result<()> {
        match self.0.receive::<Message>(PATIENCE)?.message {
            Message::Refuse(refuse) => {
                let reasons = refuse.reasons.to_string();
                ensure!(reasons.starts_with(&format!("{reason}: ")) && reasons.contains(text), "{reasons}");
            }
            other => bail!("{other:?} instead of a refusal for {reason}"),
        }
        self.expect_end()
    }

    /// Expects the end of the connection.
    ///
    /// # Errors
    /// Returns an error if a message arrives.
    pub fn expect_end(&self) -> Result<()> {
        match self.0.receive::<Message>(PATIENCE) {
            Err(ChannelError::Closed) => Ok(()),
            other => bail!("{other:?} instead of the end of the connection"),
        }
    }

    /// Sends PREPARE, with these descriptors and their names.
    ///
    /// # Errors
    /// Returns an error if the target does not take it.
    pub fn prepare(&self, named: Vec<(String, OwnedFd)>) -> Result<()> {
        let (fds, descriptors) = named.into_iter().collect::<NamedFds<OwnedFd>>().unzip();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let ram = vec![RamRegion { start: 0, length: MEMORY }];
        Ok(self.0.send(&Message::Prepare(Prepare { ram, fds, net: Vec::new() }), &borrowed, PATIENCE)?)
    }
}

/// HELLO of a VM without network devices.
pub fn hello() -> Message {
    hello_of(false, Vec::new())
}

/// HELLO of a VM with these network devices. `local` says whether their TAPs are to move.
pub fn hello_of(local: bool, net: Vec<NetFacts>) -> Message {
    let machine = MachineFacts { cpus: 1, memory: MEMORY, moves_tsc: true, nested: false, net };
    Message::Hello(Hello { program: PROGRAM.to_owned(), dry_run: false, local, machine })
}

/// STATE of a VM that has nothing.
pub fn state() -> Message {
    let vm = VmState {
        vcpus: Vec::new(),
        platform: PlatformState::default(),
        serial: SerialState::default(),
        net: Vec::new(),
    };
    Message::State(State { running: true, vm })
}

/// Creates guest memory.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn memory(size: u64, sealed: bool) -> Result<OwnedFd> {
    if sealed {
        return Ok(sealed_memfd::create("memory", size)?.into());
    }
    let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(size)?;
    Ok(file.into())
}

/// Creates an ownership word.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn word() -> Result<OwnedFd> {
    Ok(SharedWord::create()?.as_fd().try_clone_to_owned()?)
}

/// Creates the descriptors that PREPARE must carry.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn valid_fds() -> Result<Vec<(String, OwnedFd)>> {
    Ok(vec![(ram_fd(0), memory(MEMORY, true)?), (OWNERSHIP_FD.to_owned(), word()?)])
}
