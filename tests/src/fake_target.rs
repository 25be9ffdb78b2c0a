//! A fake target VMM of a migration. It follows the protocol up to a given [`Point`] and then misbehaves as [`Then`]
//! says.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use baton_channel::message_socket::{MessageSocket, Packet};
use baton_channel::ownership::SharedWord;
use baton_protocol::codec::Message as _;
use baton_protocol::migration::message::{Message, OWNERSHIP_FD, PROGRAM, Prepared, Ready, Refuse, Welcome};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::reasons::Reasons;

/// How long to wait for a message. Only catches a hang.
const PATIENCE: Duration = Duration::from_secs(120);

/// How far the fake target follows the protocol, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// It has read HELLO.
    Hello,
    /// It has read PREPARE.
    Prepare,
    /// It has read STATE: the guest is stopped.
    State,
    /// It has read COMMIT.
    Commit,
}

/// What the fake target does at its [`Point`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Closes the connection and all descriptors, as if it had been killed.
    Leave,
    /// Does nothing and keeps the connection open.
    Hang,
    /// Sends REFUSE.
    Refuse,
    /// Sends a message that does not belong there.
    Babble,
    /// Takes the guest and closes the connection.
    Take,
    /// Reports that it has taken the guest without taking it.
    Lie,
    /// Writes an invalid value to the ownership word, answers as a correct target does, and closes the connection.
    Scribble,
}

/// A running fake target.
#[derive(Debug)]
pub struct FakeTarget {
    thread: JoinHandle<Result<()>>,
    /// Dropped to end a hang.
    over: Sender<()>,
}

impl FakeTarget {
    /// Waits at `path` for a source.
    ///
    /// # Errors
    /// Returns an error if the fake target cannot listen at `path`.
    pub fn start(path: &Path, point: Point, then: Then) -> Result<Self> {
        let listener = UnixListener::bind(path)?;
        let path = path.to_owned();
        let (over, wait) = channel::<()>();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            std::fs::remove_file(path)?;
            let socket = MessageSocket::try_from(OwnedFd::from(stream))?;
            let held = play(&socket, point, then)?;
            if then == Then::Hang {
                // Returns when the other end, `over`, is dropped.
                let _ = wait.recv();
            }
            drop(held);
            Ok(())
        });
        Ok(Self { thread, over })
    }

    /// Ends the fake target.
    ///
    /// # Errors
    /// Returns an error if the source did not reach the point.
    pub fn end(self) -> Result<()> {
        drop(self.over);
        self.thread.join().map_err(|_| anyhow!("the fake target panicked"))?
    }
}

/// Follows the protocol up to the point. Returns the descriptors that it received.
fn play(socket: &MessageSocket, point: Point, then: Then) -> Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    let mut word = None;
    for next in [Point::Hello, Point::Prepare, Point::State, Point::Commit] {
        let Packet { message, fds } = socket.receive::<Message>(PATIENCE)?;
        let answer = match (next, &message) {
            (Point::Hello, Message::Hello(_)) => {
                Some(Message::Welcome(Welcome { program: PROGRAM.to_owned() }))
            }
            (Point::Prepare, Message::Prepare(prepare)) => {
                let mut named = prepare.fds.clone().pair(fds)?;
                word = Some(SharedWord::from_fd(named.claim(OWNERSHIP_FD)?)?);
                held.extend(named.unzip().1);
                Some(Message::Prepared(Prepared {}))
            }
            (Point::State, Message::State(_)) => Some(Message::Ready(Ready {})),
            (Point::Commit, Message::Commit(_)) => None,
            (_, other) => bail!("received {} instead of {next:?}", other.name()),
        };
        if next == point {
            fail(socket, then, word.as_ref())?;
            if let Some(answer) = answer.filter(|_| then == Then::Scribble) {
                socket.send(&answer, &[], PATIENCE)?;
            }
            return Ok(held);
        }
        if let Some(answer) = answer {
            socket.send(&answer, &[], PATIENCE)?;
        }
    }
    Ok(held)
}

fn fail(socket: &MessageSocket, then: Then, word: Option<&SharedWord>) -> Result<()> {
    let message = match then {
        Then::Leave | Then::Hang => return Ok(()),
        Then::Refuse => Message::Refuse(Refuse { reasons: Reasons::of([Refusal::Busy]) }),
        Then::Babble => Message::Ready(Ready {}),
        Then::Scribble => {
            let word = word.context("no ownership word was received")?;
            let file = File::from(word.as_fd().try_clone_to_owned()?);
            return Ok(file.write_all_at(&[0xff; 8], 0)?);
        }
        Then::Lie => baton_protocol::migration::target::active(true),
        Then::Take => {
            let word = word.context("no ownership word was received")?;
            let offered = word.load()?;
            let taken = offered.taken().context("the guest is not offered")?;
            return Ok(word.swap(offered, taken).must_win()?);
        }
    };
    Ok(socket.send(&message, &[], PATIENCE)?)
}
