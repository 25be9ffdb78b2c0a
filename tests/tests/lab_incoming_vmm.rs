//! A baton-vmm that waits for a VM (`--incoming`) drops sources that are malformed, leave or hang. It leaks no
//! descriptor and waits for the next source.

use std::fs::File;
use std::io::{Read, Write};
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
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::migration::facts::MachineFacts;
use baton_protocol::migration::message::{
    Commit, Hello, Message, OWNERSHIP_FD, PROGRAM, PROTOCOL, Prepare, RamRegion, State, ram_fd,
};
use baton_protocol::migration::state::{PlatformState, SerialState, VmState};
use baton_tests::lab;
use baton_tests::process::{Process, limit_descriptors};
use baton_tests::programs;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Limits the wait of a test that hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// The VM's memory.
const MEMORY: u64 = 64 << 20;

/// A VMM that waits for a source.
struct Waiting {
    process: Process,
    path: PathBuf,
    control: ControlClient,
    fds: usize,
}

impl Waiting {
    fn start(directory: &Path) -> Result<Self> {
        let (path, control) = (directory.join("incoming"), directory.join("control"));
        let arguments = [
            format!("--incoming={}", path.display()),
            format!("--control-socket={}", control.display()),
            "--memory=64M".to_owned(),
        ];
        let mut process = Process::start(&programs::vmm()?, &arguments.map(Into::into), &[])?;
        let connect = |_: &Process| Ok(ControlClient::connect(&control).ok());
        let control = process.wait_until("the VMM served its control socket", connect)?;
        let mut waiting = Self { process, path, control, fds: 0 };
        waiting.check()?;
        waiting.fds = waiting.process.open_fds()?;
        Ok(waiting)
    }

    fn check(&mut self) -> Result<()> {
        let status: VmmStatus = serde_json::from_value(self.control.call(&Request::Status)?)?;
        ensure!(status.state == VmmState::Incoming, "{status:?}");
        Ok(())
    }

    /// A raw connection, over which a test can send anything.
    fn stranger(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A source whose HELLO the VMM has accepted.
    fn greeted(&self) -> Result<Source> {
        let source = self.connected()?;
        source.say(&hello())?;
        source.expect("HELLO")?;
        Ok(source)
    }

    fn connected(&self) -> Result<Source> {
        Ok(Source(MessageSocket::try_from(OwnedFd::from(self.stranger()?))?))
    }

    /// Checks that the VMM has dropped the last source and accepts another.
    fn check_waits(&mut self) -> Result<()> {
        drop(self.greeted()?);
        self.process.wait_open_fds(self.fds)?;
        self.check()
    }
}

/// A source that can send any message.
struct Source(MessageSocket);

impl Source {
    fn say(&self, message: &Message) -> Result<()> {
        Ok(self.0.send(message, &[], PATIENCE)?)
    }

    fn expect(&self, name: &str) -> Result<()> {
        let message = self.0.receive::<Message>(PATIENCE)?.message;
        ensure!(message.name() == name, "{message:?} instead of {name}");
        Ok(())
    }

    /// Expects a refusal for `reason` that mentions `text`, and then the end of the connection.
    fn expect_refusal(&self, reason: &str, text: &str) -> Result<()> {
        match self.0.receive::<Message>(PATIENCE)?.message {
            Message::Refuse(refuse) => {
                let reasons = refuse.reasons.to_string();
                ensure!(reasons.starts_with(&format!("{reason}: ")) && reasons.contains(text), "{reasons}");
            }
            other => bail!("{other:?} instead of a refusal for {reason}"),
        }
        self.expect_end()
    }

    fn expect_end(&self) -> Result<()> {
        match self.0.receive::<Message>(PATIENCE) {
            Err(ChannelError::Closed) => Ok(()),
            other => bail!("{other:?} instead of the end of the connection"),
        }
    }

    fn prepare(&self, named: Vec<(String, OwnedFd)>) -> Result<()> {
        let (fds, descriptors) = named.into_iter().collect::<NamedFds<OwnedFd>>().unzip();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let ram = vec![RamRegion { start: 0, length: MEMORY }];
        Ok(self.0.send(&Message::Prepare(Prepare { ram, fds, net: Vec::new() }), &borrowed, PATIENCE)?)
    }
}

fn hello() -> Message {
    let machine = MachineFacts { cpus: 1, memory: MEMORY, moves_tsc: true, nested: false, net: Vec::new() };
    Message::Hello(Hello { program: PROGRAM.to_owned(), dry_run: false, local: false, machine })
}

fn state() -> Message {
    let vm = VmState {
        vcpus: Vec::new(),
        platform: PlatformState::default(),
        serial: SerialState::default(),
        net: Vec::new(),
    };
    Message::State(State { running: true, vm })
}

fn memory(size: u64, sealed: bool) -> Result<OwnedFd> {
    if sealed {
        return Ok(sealed_memfd::create("memory", size)?.into());
    }
    let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(size)?;
    Ok(file.into())
}

fn word() -> Result<OwnedFd> {
    Ok(SharedWord::create()?.as_fd().try_clone_to_owned()?)
}

/// The descriptors that PREPARE must carry.
fn valid_fds() -> Result<Vec<(String, OwnedFd)>> {
    Ok(vec![(ram_fd(0), memory(MEMORY, true)?), (OWNERSHIP_FD.to_owned(), word()?)])
}

#[test]
fn malformed_first_message_is_dropped_without_an_answer() -> Result<()> {
    lab::run(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path())?;
        let whole = hello().encode()?;
        let mut too_long = whole.clone();
        too_long[12..16].copy_from_slice(&(u32::try_from(PROTOCOL.max_body)? + 1).to_le_bytes());
        let mut newer = whole.clone();
        newer[4..8].copy_from_slice(&[9, 0, 9, 0]);
        let mut unknown = whole.clone();
        unknown[8] = 0xee;
        let mut body = whole.clone();
        body[16..].fill(0xc1);
        for bytes in [
            &[][..],
            b"GET / HTTP/1.1\r\n\r\n",
            &[0; 4096],
            &whole[..7],
            &whole[..20],
            &too_long,
            &newer,
            &unknown,
            &body,
        ] {
            let mut stranger = waiting.stranger()?;
            // The VMM may drop the connection before everything is written.
            let _ = stranger.write_all(bytes);
            let _ = stranger.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            // Fails if the VMM closes the connection with data unread, which resets it.
            let _ = stranger.read_to_end(&mut answer);
            ensure!(answer.is_empty(), "{bytes:x?} was answered with {answer:x?}");
            waiting.check_waits().with_context(|| format!("{bytes:x?}"))?;
        }
        Ok(())
    })
}

#[test]
fn message_at_the_wrong_time_ends_the_connection() -> Result<()> {
    lab::run(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path())?;
        let nothing = Prepare { ram: Vec::new(), fds: FdManifest::default(), net: Vec::new() };
        let others = [Message::Prepare(nothing), state(), Message::Commit(Commit { epoch: 1 })];
        for message in &others {
            let source = waiting.connected()?;
            source.say(message)?;
            source.expect_end().with_context(|| format!("{} first", message.name()))?;
        }
        for message in [&hello(), &others[1], &others[2]] {
            let source = waiting.greeted()?;
            source.say(message)?;
            source.expect_end().with_context(|| format!("{} after HELLO", message.name()))?;
            waiting.check_waits()?;
        }
        for message in [&hello(), &others[0], &others[2]] {
            let source = waiting.greeted()?;
            source.prepare(valid_fds()?)?;
            source.expect("PREPARED")?;
            source.say(message)?;
            source.expect_end().with_context(|| format!("{} after PREPARE", message.name()))?;
            waiting.check_waits()?;
        }
        Ok(())
    })
}

#[test]
fn invalid_descriptors_and_state_are_refused_by_name() -> Result<()> {
    lab::run(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path())?;
        let ram = |size, sealed| Ok::<_, anyhow::Error>((ram_fd(0), memory(size, sealed)?));
        let owned = || Ok::<_, anyhow::Error>((OWNERSHIP_FD.to_owned(), word()?));
        let surplus = [valid_fds()?, vec![("other".to_owned(), word()?)]].into_iter().flatten().collect();
        let cells = [
            (vec![owned()?], "descriptors", "ram/0"),
            (vec![ram(MEMORY, true)?], "descriptors", "ownership"),
            (surplus, "descriptors", "other"),
            (vec![ram(MEMORY, false)?, owned()?], "ram", "not sealed"),
            (vec![ram(MEMORY / 2, true)?, owned()?], "ram", "guest memory"),
            (
                vec![ram(MEMORY, true)?, (OWNERSHIP_FD.to_owned(), memory(4096, false)?)],
                "ownership",
                "not sealed",
            ),
            (
                vec![ram(MEMORY, true)?, (OWNERSHIP_FD.to_owned(), memory(8192, true)?)],
                "ownership",
                "8192 bytes",
            ),
        ];
        for (named, reason, text) in cells {
            let source = waiting.greeted()?;
            source.prepare(named)?;
            source.expect_refusal(reason, text)?;
            waiting.check_waits()?;
        }
        let source = waiting.greeted()?;
        source.prepare(valid_fds()?)?;
        source.expect("PREPARED")?;
        source.say(&state())?;
        source.expect_refusal("state", "vCPUs")?;
        waiting.check_waits()
    })
}

#[test]
fn sources_that_leave_or_hang_are_given_up() -> Result<()> {
    lab::run(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path())?;
        drop(waiting.connected()?);
        waiting.check_waits()?;
        drop(waiting.greeted()?);
        waiting.check_waits()?;
        let source = waiting.greeted()?;
        source.prepare(valid_fds()?)?;
        // Leaves before it reads the answer.
        drop(source);
        waiting.check_waits()?;
        let source = waiting.greeted()?;
        source.prepare(valid_fds()?)?;
        source.expect("PREPARED")?;
        drop(source);
        waiting.check_waits()?;
        // A source that sends no complete message blocks others only until the target's timeout.
        for bytes in [&[][..], &hello().encode()?[..10]] {
            let mut silent = waiting.stranger()?;
            silent.write_all(bytes)?;
            waiting.check_waits()?;
            ensure!(silent.read(&mut [0])? == 0);
        }
        Ok(())
    })
}

#[test]
fn source_waits_while_target_has_no_spare_descriptors() -> Result<()> {
    lab::run(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path())?;
        limit_descriptors(waiting.process.pid(), Some(3))?;
        let source = waiting.connected()?;
        source.say(&hello())?;
        waiting.process.wait_until("it failed to accept", |process| {
            Ok(process.log().contains("cannot accept a source now").then_some(()))
        })?;
        limit_descriptors(waiting.process.pid(), None)?;
        source.expect("HELLO")?;
        drop(source);
        waiting.check_waits()
    })
}
