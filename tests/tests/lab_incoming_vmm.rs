//! A baton-vmm that waits for a VM (`--incoming`) drops sources that are malformed, leave or hang. It leaks no
//! descriptor and waits for the next source, or ends with an error if it cannot.
//!
//! No guest runs here, so a machine whose KVM can create VMs needs no lab. Its kernel may be newer than the lab's: newer
//! kernels (Linux 6.18 is one) allow the eventfd of an interrupt in one VM only, and older ones do not notice a machine
//! that is replaced too early.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use baton_protocol::codec::Message as _;
use baton_protocol::control::{Frontend, Request};
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::migration::facts::NetFacts;
use baton_protocol::migration::message::{
    Commit, Message, OWNERSHIP_FD, PROTOCOL, Prepare, device_fd, ram_fd,
};
use baton_tests::backend::{Backend, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_source::{MEMORY, Source, Waiting, hello, hello_of, memory, state, valid_fds, word};
use baton_tests::lab;
use baton_tests::netns::Netns;
use baton_tests::process::{limit_descriptors, until};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// A back-end with a TAP of its own, and a VMM with one device on it.
struct Connected {
    backend: Backend,
    waiting: Waiting,
    _netns: Netns,
}

impl Connected {
    fn start(directory: &Path) -> Result<Self> {
        let netns = Netns::enter()?;
        let mut backend = Backend::listening(Datapath::Userspace, &[&format!("--tap={TAP}")], &[])?;
        // The back-end listens by the time that it answers.
        backend.status()?;
        let net = format!("socket={}", backend.socket.display());
        let waiting = Waiting::start(directory, &["--net", &net])?;
        Ok(Self { backend, waiting, _netns: netns })
    }

    /// A source whose device is to bring its TAP along, up to PREPARE.
    fn prepare_local(&self) -> Result<Source> {
        let source = self.waiting.greeted_by(&hello_of(true, device(true)))?;
        let (end, _other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut fds = valid_fds()?;
        fds.push((device_fd(0), end));
        source.prepare(fds)?;
        Ok(source)
    }
}

/// A source's device that the VMM's fits.
fn device(local: bool) -> Vec<NetFacts> {
    vec![NetFacts { queue_pairs: 1, local, device_state: true, connected: true, features: 0, mac: None }]
}

#[test]
fn malformed_first_message_is_dropped_without_an_answer() -> Result<()> {
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path(), &[])?;
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
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path(), &[])?;
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
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path(), &[])?;
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
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path(), &[])?;
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
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut waiting = Waiting::start(directory.path(), &[])?;
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

#[test]
fn target_whose_back_end_refuses_the_tap_waits_for_the_next_source() -> Result<()> {
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut connected = Connected::start(directory.path())?;
        for _ in 0..3 {
            connected.prepare_local()?.expect_refusal("tap", "start it with --incoming-fds")?;
            let waiting = &mut connected.waiting;
            waiting.check_waits_for(&hello_of(false, device(false)))?;
            let status = waiting.check()?;
            ensure!(status.net.len() == 1 && status.net[0].backend == Frontend::Connected, "{status:?}");
        }
        connected.waiting.ask(&Request::Quit)?;
        let status = connected.waiting.process.wait()?;
        ensure!(status.success(), "{status}: {}", connected.waiting.process.log());
        Ok(())
    })
}

#[test]
fn status_is_answered_while_the_next_machine_waits_for_its_back_end() -> Result<()> {
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut connected = Connected::start(directory.path())?;
        let before = connected.waiting.check()?;
        ensure!(before.net[0].backend == Frontend::Connected, "{before:?}");
        let source = connected.waiting.greeted_by(&hello_of(false, device(false)))?;
        source.prepare(valid_fds()?)?;
        source.expect("PREPARED")?;
        // The next machine connects to this back-end, which does not answer.
        connected.backend.process.signal(Signal::SIGSTOP)?;
        drop(source);
        until("the used machine was gone", || Ok(connected.waiting.check()? != before))?;
        let mut absent = before.clone();
        absent.net[0].backend = Frontend::Disconnected;
        let status = connected.waiting.check()?;
        ensure!(status == absent, "{status:?} instead of {absent:?}");
        connected.backend.process.signal(Signal::SIGCONT)?;
        connected.waiting.check_waits_for(&hello_of(false, device(false)))?;
        let status = connected.waiting.check()?;
        ensure!(status == before, "{status:?} instead of {before:?}");
        Ok(())
    })
}

#[test]
fn target_that_cannot_connect_to_its_back_end_again_ends_with_an_error() -> Result<()> {
    lab::run_without_guest(|| {
        let directory = tempfile::tempdir()?;
        let mut connected = Connected::start(directory.path())?;
        let source = connected.waiting.greeted_by(&hello_of(false, device(false)))?;
        source.prepare(valid_fds()?)?;
        source.expect("PREPARED")?;
        connected.backend.process.signal(Signal::SIGKILL)?;
        connected.backend.process.wait()?;
        let what = "it lost the back-end";
        connected
            .waiting
            .process
            .wait_until(what, |process| Ok(process.log().contains("lost the back-end").then_some(())))?;
        drop(source);
        let status = connected.waiting.process.wait()?;
        let log = connected.waiting.process.log();
        ensure!(status.code() == Some(1), "{status}: {log}");
        let error = format!("baton-vmm: back-end at {}: cannot connect", connected.backend.socket.display());
        let errors: Vec<_> = log.lines().filter(|line| line.contains("cannot connect")).collect();
        ensure!(errors.len() == 1 && errors[0].starts_with(&error), "{log}");
        ensure!(log.lines().last() == Some(errors[0]), "{log}");
        Ok(())
    })
}
