//! The other end of a session's hand-over, played by the test: a [`FakeTarget`] that a live back-end would give its
//! session to, and a [`Relay`] between a real source and a real target, which has every packet and descriptor in its
//! hands before it passes it on, or something else.

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

/// What came in a packet.
pub type Said = (Message, Vec<OwnedFd>);

impl Link {
    /// Connects to a back-end that waits there.
    ///
    /// # Errors
    /// If nobody does.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self(MessageSocket::connect(path)?))
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// If the connection ends instead.
    pub fn hear(&self) -> Result<Said> {
        let Packet { message, fds } = self.0.receive::<Message>(PATIENCE)?;
        Ok((message, fds))
    }

    /// Waits until the other end has closed the connection; gives what it said last.
    ///
    /// # Errors
    /// If it does not.
    pub fn hear_end(&self) -> Result<Option<Message>> {
        let mut last = None;
        loop {
            match self.0.receive::<Message>(PATIENCE) {
                Ok(packet) => last = Some(packet.message),
                Err(ChannelError::Closed) => return Ok(last),
                Err(error) => bail!("{error} instead of the end"),
            }
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the other end does not take it.
    pub fn say(&self, message: &Message) -> Result<()> {
        self.say_with(message, &[])
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// If the other end does not take it.
    pub fn say_with(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(self.0.send(message, fds, PATIENCE)?)
    }

    /// Sends a packet of any bytes, with descriptors.
    ///
    /// # Errors
    /// If the other end does not take it.
    pub fn say_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [std::io::IoSlice::new(bytes)];
        sendmsg::<()>(self.0.as_fd().as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// A place where a source may come.
#[derive(Debug)]
pub struct FakeTarget(BoundSocket);

impl FakeTarget {
    /// Waits at `path`.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn bind(path: &Path) -> Result<Self> {
        Ok(Self(BoundSocket::bind_packets(path)?))
    }

    /// Waits at `path` as another user, which takes root.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn bind_as(path: &Path, user: u32) -> Result<Self> {
        let path = path.to_owned();
        as_user(user, move || Self::bind(&path))
    }

    /// Where it waits.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The next source.
    ///
    /// # Errors
    /// If none comes that could be one.
    pub fn accept(&self) -> Result<Link> {
        let (stream, _) = self.0.listener().accept()?;
        Ok(Link(MessageSocket::try_from(OwnedFd::from(stream))?))
    }
}

/// A session as its source has sent it, with its descriptors by name.
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
    /// If there is none.
    pub fn fd(&self, name: &str) -> Result<&OwnedFd> {
        let found = self.fds.iter().find(|(own, _)| own == name);
        found.map(|(_, fd)| fd).with_context(|| format!("no descriptor {name}"))
    }

    /// The ownership word.
    ///
    /// # Errors
    /// If it is none.
    pub fn word(&self) -> Result<SharedWord> {
        Ok(SharedWord::from_fd(self.fd(OWNERSHIP_FD)?.try_clone()?)?)
    }

    /// Puts something else in a descriptor's place.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn replace(&mut self, name: &str, fd: impl Into<OwnedFd>) -> Result<()> {
        let place = self.fds.iter_mut().find(|(own, _)| own == name).with_context(|| name.to_owned())?;
        place.1 = fd.into();
        Ok(())
    }
}

/// A target that has answered HELLO and PREPARE, as a good one does; gives what the source has sent then.
///
/// # Errors
/// If it says anything else.
pub fn take_stage(source: &Link) -> Result<Sent> {
    greet(source)?;
    prepare(source)?;
    hear_stage(source)
}

/// Answers HELLO.
///
/// # Errors
/// If something else comes.
pub fn greet(source: &Link) -> Result<()> {
    let (Message::Hello(hello), _) = source.hear()? else { bail!("no HELLO") };
    ensure!(hello.purpose == Purpose::Session.name(), "{hello:?}");
    source.say(&Message::Hello(hello_of("test")))
}

/// A session's HELLO.
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
/// If something else comes.
pub fn prepare(source: &Link) -> Result<()> {
    let (Message::Prepare(_), _) = source.hear()? else { bail!("no PREPARE") };
    source.say(&Message::Ready(ReadyToTake {}))
}

/// Waits for STAGE and what belongs to it.
///
/// # Errors
/// If something else comes.
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
/// If the target does not take it.
pub fn send_stage(target: &Link, sent: &Sent) -> Result<()> {
    let names = FdManifest::new(sent.fds.iter().map(|(name, _)| name.clone()));
    let fds: Vec<_> = sent.fds.iter().map(|(_, fd)| fd.as_fd()).collect();
    let stage = Stage { fds: names, ..(*sent.stage).clone() };
    target.say_with(&Message::Stage(Box::new(stage)), &fds)
}

/// STAGED.
pub const STAGED: Message = Message::Staged(StagedAll {});

/// A source and a target that speak through the test.
#[derive(Debug)]
pub struct Relay {
    /// To the source.
    pub source: Link,
    /// To the target.
    pub target: Link,
}

impl Relay {
    /// Joins a source that comes to `place` with a target that waits at `incoming`.
    ///
    /// # Errors
    /// If there is not either.
    pub fn join(place: &FakeTarget, incoming: &Path) -> Result<Self> {
        Ok(Self { source: place.accept()?, target: Link::connect(incoming)? })
    }

    /// Passes the source's next message on; gives its name.
    ///
    /// # Errors
    /// If there is none, or nobody to take it.
    pub fn down(&self) -> Result<&'static str> {
        pass(&self.source, &self.target)
    }

    /// Passes the target's next message on; gives its name.
    ///
    /// # Errors
    /// If there is none, or nobody to take it.
    pub fn up(&self) -> Result<&'static str> {
        pass(&self.target, &self.source)
    }

    /// Passes HELLO, PREPARE and READY on.
    ///
    /// # Errors
    /// If something else is said.
    pub fn until_ready(&self) -> Result<()> {
        let said = [self.down()?, self.up()?, self.down()?, self.up()?];
        ensure!(said == ["HELLO", "HELLO", "PREPARE", "READY"], "{said:?}");
        Ok(())
    }

    /// Passes everything on until the target has staged the session, which the source does not hear yet.
    ///
    /// # Errors
    /// If something else is said.
    pub fn until_staged(&self) -> Result<Sent> {
        self.until_ready()?;
        let sent = hear_stage(&self.source)?;
        send_stage(&self.target, &sent)?;
        let (message, _) = self.target.hear()?;
        match message {
            Message::Staged(_) => Ok(sent),
            Message::Refuse(refuse) => bail!("refused: {}", refuse.reasons),
            other => bail!("{} instead of STAGED", other.name()),
        }
    }

    /// Passes on what is left once the session is staged.
    ///
    /// # Errors
    /// If something else is said.
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

/// Has each look at what waits in `socket` (`MSG_PEEK`) begin so many bytes on, whoever looks.
///
/// # Errors
/// The system's.
#[expect(unsafe_code, reason = "sets a socket option that nix does not know")]
pub fn set_peek_offset(socket: &OwnedFd, offset: libc::c_int) -> Result<()> {
    let size = libc::socklen_t::try_from(size_of_val(&offset))?;
    let (fd, place) = (socket.as_raw_fd(), (&raw const offset).cast());
    // SAFETY: SO_PEEK_OFF reads an int.
    let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, place, size) };
    Errno::result(result).context("SO_PEEK_OFF")?;
    Ok(())
}

/// A hand-over that was asked for, by a client of its own.
#[derive(Debug)]
pub struct Asked(JoinHandle<Result<serde_json::Value>>);

impl Asked {
    /// Asks `backend` to hand its session to who waits at `path`.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn of(backend: &Backend, path: &Path) -> Result<Self> {
        let mut client = ControlClient::connect(&backend.control)?;
        let path = Some(path.display().to_string());
        let request = Request::Handover { path, on_suspend: false, dry_run: false, cancel: false };
        Ok(Self(thread::spawn(move || Ok(client.call(&request)?))))
    }

    /// How it ended.
    ///
    /// # Errors
    /// If it never did, or the answer is no report.
    pub fn report(self) -> Result<SessionReport> {
        until("the hand-over ended", || Ok(self.0.is_finished()))?;
        let answer = self.0.join().map_err(|_| anyhow!("the client panicked"))??;
        serde_json::from_value(answer.clone()).with_context(|| format!("{answer}"))
    }

    /// In which phase it failed, and why.
    ///
    /// # Errors
    /// If it did not.
    pub fn failure(self) -> Result<(String, String)> {
        match self.report()? {
            SessionReport::RolledBack { phase, reason } => Ok((phase, reason)),
            done @ SessionReport::Completed { .. } => bail!("{done:?}"),
        }
    }
}
