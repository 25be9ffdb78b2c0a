//! A transfer of device state over a descriptor that the front-end gave (`SET_DEVICE_STATE_FD`): read or written by a
//! thread of its own, for whoever is at the other end may take its time, and the session must go on. What came is
//! looked at by the event loop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use baton_channel::packet::{ChannelError, Packet, PacketSocket};
use baton_channel::peer::Peer;
use baton_protocol::codec::{CodecError, HEADER, Message as _};
use baton_protocol::handover::message::{Message, PROTOCOL};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::mailbox::Mailer;

/// How long a transfer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a pipe that is writable surely takes (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// Why device state was not moved.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The other end closed it, or is slow.
    #[error("the transfer of device state failed")]
    Channel(#[from] ChannelError),
    /// No device state.
    #[error("what came is no device state")]
    Codec(#[from] CodecError),
    /// Nothing moves.
    #[error("the transfer of device state took too long")]
    Timeout,
    /// The system would not.
    #[error("the transfer of device state failed")]
    Io(#[from] io::Error),
}

/// How a transfer ended.
#[derive(Debug)]
pub enum Outcome {
    /// The state was written.
    Saved(Result<(), TransferError>),
    /// This was read from a pipe.
    Read(Result<Message, TransferError>),
    /// This came over a socket, from this process if it signed it.
    Received(Result<(Packet<Message>, Option<Peer>), TransferError>),
}

/// What a transfer goes over.
#[derive(Debug)]
pub enum Route {
    /// A Unix socket for packets (`SOCK_SEQPACKET`): a hand-over of the TAP between two back-ends of this kind.
    Socket(PacketSocket),
    /// A pipe, a file or a stream socket: a front-end stores the bytes, so the state goes alone.
    Pipe(File),
}

impl From<File> for Route {
    fn from(file: File) -> Self {
        match file.try_clone().map(OwnedFd::from).map(PacketSocket::try_from) {
            Ok(Ok(socket)) if !socket.is_stream() => Self::Socket(socket),
            _ => Self::Pipe(file),
        }
    }
}

/// Writes a message to a pipe, in a thread.
///
/// # Errors
/// What making a thread fails with; the pipe is closed.
pub fn save(pipe: File, message: &Message, done: Mailer<Outcome>) -> io::Result<()> {
    let packet = message.encode();
    start(move || {
        let written = packet.map_err(TransferError::from).and_then(|packet| write(&pipe, &packet));
        // Closed before it is told: whoever reads has seen the end then.
        drop(pipe);
        let _ = done.send(Outcome::Saved(written));
    })
}

/// Reads a message from wherever it comes, in a thread.
///
/// # Errors
/// What making a thread fails with; the descriptor is closed.
pub fn load(route: Route, done: Mailer<Outcome>) -> io::Result<()> {
    start(move || {
        let outcome = match route {
            Route::Socket(socket) => {
                Outcome::Received(socket.receive_signed(PATIENCE).map_err(TransferError::from))
            }
            Route::Pipe(pipe) => Outcome::Read(read(&pipe)),
        };
        let _ = done.send(outcome);
    })
}

fn start(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("device-state".to_owned()).spawn(work)?;
    Ok(())
}

fn write(mut pipe: &File, packet: &[u8]) -> Result<(), TransferError> {
    let deadline = Instant::now() + PATIENCE;
    for chunk in packet.chunks(CHUNK) {
        wait(pipe, PollFlags::POLLOUT, deadline)?;
        pipe.write_all(chunk)?;
    }
    Ok(())
}

fn read(mut pipe: &File) -> Result<Message, TransferError> {
    let deadline = Instant::now() + PATIENCE;
    let most = HEADER + PROTOCOL.max_body;
    let mut packet = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        wait(pipe, PollFlags::POLLIN, deadline)?;
        let length = match pipe.read(&mut chunk) {
            Ok(0) => return Ok(Message::decode(&packet)?),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        packet.extend_from_slice(&chunk[..length]);
        if packet.len() > most {
            return Err(CodecError::TooLong { length: packet.len(), max: most }.into());
        }
    }
}

fn wait(pipe: &File, events: PollFlags, deadline: Instant) -> Result<(), TransferError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TransferError::Timeout);
        }
        // Rounded up: a wait that ends early would spin.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), events)], timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(TransferError::Io(errno.into())),
        }
    }
}
