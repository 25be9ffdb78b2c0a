//! The peer of a session hand-over, played by the test: a [`FakeTarget`] to which a real back-end hands over its
//! session, and a [`Relay`] between a real source and a real target, which can inspect and change every packet and
//! descriptor before it forwards them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_channel::bound_socket::BoundSocket;
use baton_channel::message_socket::{ChannelError, MessageSocket, Packet};
use baton_channel::ownership::SharedWord;
use baton_control::ControlClient;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{Request, SessionReport};
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::prologue::Purpose;
use baton_protocol::handover::wire::message::{Hello, Message, OWNERSHIP_FD, ReadyToTake, Stage, StagedAll};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::backend::Backend;
use crate::process::{PATIENCE, until};
use crate::users::as_user;

/// One end of a hand-over's connection.
#[derive(Debug)]
pub struct Link(MessageSocket);

/// The contents of a packet: the message and its descriptors.
pub type Said = (Message, Vec<OwnedFd>);

impl Link {
    /// Connects to a back-end that waits at `path`.
    ///
    /// # Errors
    /// Returns an error if no back-end listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self(MessageSocket::connect(path)?))
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// Returns an error if the connection is closed, or the message is malformed or late.
    pub fn hear(&self) -> Result<Said> {
        let Packet { message, fds } = self.0.receive::<Message>(PATIENCE)?;
        Ok((message, fds))
    }

    /// Waits until the peer closes the connection. Returns its last message.
    ///
    /// # Errors
    /// Returns an error if the peer does not close the connection in time.
    pub fn hear_end(&self) -> Result<Option<Message>> {
        let mut last = None;
        loop {
            match self.0.receive::<Message>(PATIENCE) {
                Ok(packet) => last = Some(packet.message),
                Err(ChannelError::Closed) => return Ok(last),
                Err(error) => bail!("{error} instead of a closed connection"),
            }
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Returns an error if the peer does not accept the packet.
    pub fn say(&self, message: &Message) -> Result<()> {
        self.say_with(message, &[])
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// Returns an error if the peer does not accept the packet.
    pub fn say_with(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(self.0.send(message, fds, PATIENCE)?)
    }

    /// Sends a packet of arbitrary bytes, with descriptors.
    ///
    /// # Errors
    /// Returns an error if the peer does not accept the packet.
    pub fn say_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [std::io::IoSlice::new(bytes)];
        sendmsg::<()>(self.0.as_fd().as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// A socket on which the test waits for a source.
#[derive(Debug)]
pub struct FakeTarget(BoundSocket);

impl FakeTarget {
    /// Listens at `path`.
    ///
    /// # Errors
    /// Returns an error if the socket cannot be created.
    pub fn bind(path: &Path) -> Result<Self> {
        Ok(Self(BoundSocket::bind_packets(path)?))
    }

    /// Listens at `path` as another user, which requires root.
    ///
    /// # Errors
    /// Returns an error if the user cannot be changed or the socket cannot be created.
    pub fn bind_as(path: &Path, user: u32) -> Result<Self> {
        let path = path.to_owned();
        as_user(user, move || Self::bind(&path))
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Accepts the next source.
    ///
    /// # Errors
    /// Returns an error if the connection cannot be accepted.
    pub fn accept(&self) -> Result<Link> {
        let (stream, _) = self.0.listener().accept()?;
        Ok(Link(MessageSocket::try_from(OwnedFd::from(stream))?))
    }
}

/// A session as its source sends it, with its descriptors by name.
#[derive(Debug)]
pub struct Sent {
    /// STAGE, without its manifest.
    pub stage: Box<Stage>,
    /// All descriptors.
    pub fds: Vec<(String, OwnedFd)>,
}

impl Sent {
    /// The descriptor of this name.
    ///
    /// # Errors
    /// Returns an error if there is no such descriptor.
    pub fn fd(&self, name: &str) -> Result<&OwnedFd> {
        let found = self.fds.iter().find(|(own, _)| own == name);
        found.map(|(_, fd)| fd).with_context(|| format!("no descriptor {name}"))
    }

    /// Maps the ownership word.
    ///
    /// # Errors
    /// Returns an error if the descriptor is missing or not an ownership word.
    pub fn word(&self) -> Result<SharedWord> {
        Ok(SharedWord::from_fd(self.fd(OWNERSHIP_FD)?.try_clone()?)?)
    }

    /// Replaces the descriptor of this name.
    ///
    /// # Errors
    /// Returns an error if there is no such descriptor.
    pub fn replace(&mut self, name: &str, fd: impl Into<OwnedFd>) -> Result<()> {
        let place = self
            .fds
            .iter_mut()
            .find(|(own, _)| own == name)
            .with_context(|| format!("no descriptor {name}"))?;
        place.1 = fd.into();
        Ok(())
    }
}

/// Answers HELLO and PREPARE as a correct target does. Returns the session that the source sends then.
///
/// # Errors
/// Returns an error if the source sends another message.
pub fn take_stage(source: &Link) -> Result<Sent> {
    greet(source)?;
    prepare(source)?;
    hear_stage(source)
}

/// Answers HELLO.
///
/// # Errors
/// Returns an error if the source sends another message.
pub fn greet(source: &Link) -> Result<()> {
    let (Message::Hello(hello), _) = source.hear()? else { bail!("no HELLO") };
    ensure!(hello.purpose == Purpose::Session.name(), "{hello:?}");
    source.say(&Message::Hello(hello_of("test")))
}

/// The HELLO of a session hand-over.
pub fn hello_of(program: &str) -> Hello {
    Hello {
        purpose: Purpose::Session.name().to_owned(),
        program: program.to_owned(),
        dry_run: false,
        wants_vhost: false,
    }
}

/// Answers PREPARE with READY.
///
/// # Errors
/// Returns an error if the source sends another message.
pub fn prepare(source: &Link) -> Result<()> {
    let (Message::Prepare(_), _) = source.hear()? else { bail!("no PREPARE") };
    source.say(&Message::Ready(ReadyToTake {}))
}

/// Waits for STAGE and the DESCRIPTORS that follow it.
///
/// # Errors
/// Returns an error if the source sends another message.
pub fn hear_stage(source: &Link) -> Result<Sent> {
    let (message, fds) = source.hear()?;
    let Message::Stage(mut stage) = message else { bail!("{} instead of STAGE", message.name()) };
    let mut named = name(std::mem::take(&mut stage.fds), fds)?;
    for _ in 0..std::mem::take(&mut stage.more) {
        let (Message::Descriptors(more), fds) = source.hear()? else { bail!("no DESCRIPTORS") };
        named.extend(name(more.fds, fds)?);
    }
    Ok(Sent { stage, fds: named })
}

fn name(names: FdManifest, fds: Vec<OwnedFd>) -> Result<Vec<(String, OwnedFd)>> {
    let fds = names.pair(fds)?;
    let (names, fds) = fds.unzip();
    let names: Vec<String> = serde_json::from_value(serde_json::to_value(names)?)?;
    Ok(names.into_iter().zip(fds).collect())
}

/// Sends a session in one packet.
///
/// # Errors
/// Returns an error if the target does not accept the packet.
pub fn send_stage(target: &Link, sent: &Sent) -> Result<()> {
    let names = FdManifest::new(sent.fds.iter().map(|(name, _)| name.clone()));
    let fds: Vec<_> = sent.fds.iter().map(|(_, fd)| fd.as_fd()).collect();
    let stage = Stage { fds: names, ..(*sent.stage).clone() };
    target.say_with(&Message::Stage(Box::new(stage)), &fds)
}

/// STAGED.
pub const STAGED: Message = Message::Staged(StagedAll {});

/// Relays the messages between a source and a target.
#[derive(Debug)]
pub struct Relay {
    /// The connection to the source.
    pub source: Link,
    /// The connection to the target.
    pub target: Link,
}

impl Relay {
    /// Joins a source that connects to `place` with a target that waits at `incoming`.
    ///
    /// # Errors
    /// Returns an error if the source or the target cannot be connected.
    pub fn join(place: &FakeTarget, incoming: &Path) -> Result<Self> {
        Ok(Self { source: place.accept()?, target: Link::connect(incoming)? })
    }

    /// Forwards the source's next message. Returns its name.
    ///
    /// # Errors
    /// Returns an error if the source sends no message, or the target does not accept it.
    pub fn down(&self) -> Result<&'static str> {
        pass(&self.source, &self.target)
    }

    /// Forwards the target's next message. Returns its name.
    ///
    /// # Errors
    /// Returns an error if the target sends no message, or the source does not accept it.
    pub fn up(&self) -> Result<&'static str> {
        pass(&self.target, &self.source)
    }

    /// Forwards everything up to READY.
    ///
    /// # Errors
    /// Returns an error if source or target send another message.
    pub fn until_ready(&self) -> Result<()> {
        let said = [self.down()?, self.up()?, self.down()?, self.up()?];
        ensure!(said == ["HELLO", "HELLO", "PREPARE", "READY"], "{said:?}");
        Ok(())
    }

    /// Forwards everything until the target has staged the session. Does not forward STAGED to the source.
    ///
    /// # Errors
    /// Returns an error if source or target send another message.
    pub fn until_staged(&self) -> Result<Sent> {
        self.until_ready()?;
        let sent = hear_stage(&self.source)?;
        send_stage(&self.target, &sent)?;
        let (message, _) = self.target.hear()?;
        match message {
            Message::Staged(_) => Ok(sent),
            Message::Refuse(refuse) => bail!("the target refuses: {}", refuse.reasons),
            other => bail!("{} instead of STAGED", other.name()),
        }
    }

    /// Forwards the rest of the hand-over, from STAGED on.
    ///
    /// # Errors
    /// Returns an error if source or target send another message.
    pub fn finish(&self) -> Result<()> {
        self.source.say(&STAGED)?;
        let said = [self.down()?, self.up()?];
        ensure!(said == ["COMMIT", "ACTIVE"], "{said:?}");
        Ok(())
    }
}

fn pass(from: &Link, to: &Link) -> Result<&'static str> {
    let (message, fds) = from.hear()?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    to.say_with(&message, &fds)?;
    Ok(message.name())
}

/// Makes every `MSG_PEEK` on `socket`, by any process, start at this offset (`SO_PEEK_OFF`).
///
/// # Errors
/// Returns an error if the socket option cannot be set.
#[expect(unsafe_code, reason = "sets a socket option that nix does not know")]
pub fn set_peek_offset(socket: &OwnedFd, offset: libc::c_int) -> Result<()> {
    let size = libc::socklen_t::try_from(size_of_val(&offset))?;
    let (fd, place) = (socket.as_raw_fd(), (&raw const offset).cast());
    // SAFETY: SO_PEEK_OFF reads an int.
    let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, place, size) };
    Errno::result(result).context("cannot set SO_PEEK_OFF")?;
    Ok(())
}

/// A requested hand-over, with its own control connection and thread.
#[derive(Debug)]
pub struct Asked(JoinHandle<Result<serde_json::Value>>);

impl Asked {
    /// Asks `backend` to hand its session over to the target at `path`.
    ///
    /// # Errors
    /// Returns an error if the control socket cannot be connected to.
    pub fn of(backend: &Backend, path: &Path) -> Result<Self> {
        let mut client = ControlClient::connect(&backend.control)?;
        let path = Some(path.display().to_string());
        let request = Request::Handover { path, on_suspend: false, dry_run: false, cancel: false };
        Ok(Self(thread::spawn(move || Ok(client.call(&request)?))))
    }

    /// Waits for the report of the hand-over.
    ///
    /// # Errors
    /// Returns an error if the hand-over does not end in time, or the answer is not a report.
    pub fn report(self) -> Result<SessionReport> {
        until("the hand-over ended", || Ok(self.0.is_finished()))?;
        let answer = self.0.join().map_err(|_| anyhow!("the client panicked"))??;
        serde_json::from_value(answer.clone()).with_context(|| format!("{answer}"))
    }

    /// Waits for a rollback. Returns its phase and its reason.
    ///
    /// # Errors
    /// Returns an error if the hand-over completes.
    pub fn failure(self) -> Result<(String, String)> {
        match self.report()? {
            SessionReport::RolledBack { phase, reason } => Ok((phase, reason)),
            done @ SessionReport::Completed { .. } => bail!("not rolled back: {done:?}"),
        }
    }
}
