//! A transfer of device state over a descriptor that the front-end gave (`SET_DEVICE_STATE_FD`): read or written by a
//! thread of its own, for the other end may take its time, and the session must go on. The event loop looks at what came.
//!
//! The other end belongs to a stranger, so no call may hold the thread: it is interrupted where the descriptor blocks
//! although it was ready. A transfer that nobody waits for any more ends at once.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_channel::message_socket::{ChannelError, MessageSocket, Packet};
use baton_channel::peer::Peer;
use baton_protocol::codec::{CodecError, HEADER, Message as _};
use baton_protocol::handover::wire::message::{Message, PROTOCOL};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::DeviceStateError;
use crate::dataplane::interrupt::bounded;
use crate::event_channel::EventSender;

/// How long a transfer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a descriptor is left alone that was ready, and then was not.
const REST: Duration = Duration::from_millis(10);
/// What a pipe that is writable surely takes (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// The most threads at a time. One is at work; the others were given up, and the kernel holds them (a file of a FUSE
/// server that does not answer, say).
const MAX_THREADS: usize = 8;

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
    /// The session that asked for it is over.
    #[error("the transfer of device state was given up")]
    GivenUp,
    /// Too many that were given up have not ended.
    #[error("{MAX_THREADS} earlier transfers of device state hang")]
    Stuck,
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
    /// This was received from a socket, with its sender if that sent its credentials.
    Received(Result<(Packet<Message>, Option<Peer>), TransferError>),
}

/// What a transfer goes over.
#[derive(Debug)]
pub enum Route {
    /// A Unix socket for packets (`SOCK_SEQPACKET`): a hand-over of the TAP between two back-ends of this kind.
    Socket(MessageSocket),
    /// A pipe, a file or a stream socket: a front-end stores the bytes, so the state goes alone.
    Pipe(File),
}

impl From<File> for Route {
    fn from(file: File) -> Self {
        match file.try_clone().map(OwnedFd::from).map(MessageSocket::try_from) {
            Ok(Ok(socket)) if !socket.is_stream() => Self::Socket(socket),
            _ => Self::Pipe(file),
        }
    }
}

/// A transfer that runs. Dropped, it is given up: its outcome does not matter any more.
#[derive(Debug)]
pub struct Running {
    number: u64,
    /// Its thread sees the other end close.
    _stop: PipeWriter,
}

impl Running {
    /// Whether this is how it ended.
    pub fn sent(&self, finished: &Finished) -> bool {
        self.number == finished.number
    }
}

/// The transfer of device state that the front-end asked for last.
#[derive(Debug)]
pub enum Transfer {
    /// None was asked for.
    None,
    /// A thread is at it.
    Running(Running),
    /// It is over.
    Over(Result<(), DeviceStateError>),
}

impl Transfer {
    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }

    /// Whether it succeeded, if it is over and `CHECK_DEVICE_STATE` has not told.
    pub fn succeeded(&self) -> Option<bool> {
        match self {
            Self::Over(result) => Some(result.is_ok()),
            Self::None | Self::Running(_) => None,
        }
    }

    /// One that another process has made for the same front-end, and how it ended.
    pub fn inherited(succeeded: Option<bool>) -> Self {
        match succeeded {
            None => Self::None,
            Some(true) => Self::Over(Ok(())),
            Some(false) => Self::Over(Err(DeviceStateError::BeforeHandover)),
        }
    }
}

/// What the thread of a transfer sends at its end.
#[derive(Debug)]
pub struct Finished {
    number: u64,
    /// How it ended.
    pub outcome: Outcome,
}

/// The threads of a process' transfers.
#[derive(Debug)]
pub struct Threads {
    sender: EventSender<Finished>,
    /// How many transfers there were.
    count: u64,
    /// Each thread has one while it lives.
    lives: Arc<()>,
}

impl Threads {
    /// They say to `sender` how transfers ended.
    pub fn new(sender: EventSender<Finished>) -> Self {
        Self { sender, count: 0, lives: Arc::default() }
    }

    /// Writes a message to a pipe.
    ///
    /// # Errors
    /// [`TransferError::Stuck`], or what making a thread fails with; the pipe is closed.
    pub fn save(&mut self, pipe: File, message: &Message) -> Result<Running, TransferError> {
        let packet = message.encode()?;
        self.start(move |patience| {
            let written = write(&pipe, &packet, patience);
            // Closed before it is told: the reader has seen the end then.
            drop(pipe);
            Outcome::Saved(written)
        })
    }

    /// Reads a message from wherever it comes.
    ///
    /// # Errors
    /// [`TransferError::Stuck`], or what making a thread fails with; the descriptor is closed.
    pub fn load(&mut self, route: Route) -> Result<Running, TransferError> {
        self.start(move |patience| match route {
            Route::Socket(socket) => Outcome::Received(receive(&socket, patience)),
            Route::Pipe(pipe) => Outcome::Read(read(&pipe, patience)),
        })
    }

    fn start(
        &mut self,
        work: impl FnOnce(&Patience) -> Outcome + Send + 'static,
    ) -> Result<Running, TransferError> {
        if Arc::strong_count(&self.lives) > MAX_THREADS {
            return Err(TransferError::Stuck);
        }
        let (stopped, stop) = io::pipe()?;
        self.count += 1;
        let (number, sender, life) = (self.count, self.sender.clone(), Arc::clone(&self.lives));
        std::thread::Builder::new().name("device-state".to_owned()).spawn(move || {
            let outcome = work(&Patience { until: Instant::now() + PATIENCE, stopped });
            drop(life);
            let _ = sender.send(Finished { number, outcome });
        })?;
        Ok(Running { number, _stop: stop })
    }
}

/// How long a thread goes on: until a time, or until it is given up.
#[derive(Debug)]
struct Patience {
    until: Instant,
    /// Nothing is ever written to it.
    stopped: PipeReader,
}

impl Patience {
    /// Waits until `fd` is ready.
    fn ready(&self, fd: &impl AsFd, events: PollFlags) -> Result<(), TransferError> {
        let mut fds = [PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN), PollFd::new(fd.as_fd(), events)];
        while !self.wait(&mut fds, PATIENCE)? {}
        Ok(())
    }

    /// Waits a little: `fd` was said to be ready, and is not.
    fn rest(&self) -> Result<(), TransferError> {
        self.wait(&mut [PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)], REST).map(drop)
    }

    /// Whether one of `fds` is ready, of which the first is `stopped`.
    fn wait(&self, fds: &mut [PollFd<'_>], longest: Duration) -> Result<bool, TransferError> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TransferError::Timeout);
        }
        // Rounded up: a wait that ends early would spin.
        let timeout = left.min(longest) + Duration::from_millis(1);
        match poll(fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
            Ok(_) if fds.first().is_some_and(|stopped| stopped.any().unwrap_or(true)) => {
                Err(TransferError::GivenUp)
            }
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(TransferError::Io(errno.into())),
        }
    }

    /// Makes a call until it gives something. It may block although `fd` was ready: what was ready is anybody's who
    /// shares it, and a terminal that is nearly full is ready for less than is written.
    fn until_done<T>(
        &self,
        fd: &impl AsFd,
        events: PollFlags,
        mut call: impl FnMut() -> io::Result<T>,
    ) -> Result<T, TransferError> {
        loop {
            self.ready(fd, events)?;
            match bounded(&mut call) {
                Ok(result) => return Ok(result),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.rest()?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn write(pipe: &File, packet: &[u8], patience: &Patience) -> Result<(), TransferError> {
    let mut left = packet;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(CHUNK)];
        match patience.until_done(pipe, PollFlags::POLLOUT, || (&*pipe).write(chunk))? {
            0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            length => left = left.get(length..).unwrap_or_default(),
        }
    }
    Ok(())
}

fn read(pipe: &File, patience: &Patience) -> Result<Message, TransferError> {
    let most = HEADER + PROTOCOL.max_body;
    let mut packet = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        let length = patience.until_done(pipe, PollFlags::POLLIN, || (&*pipe).read(&mut chunk))?;
        if length == 0 {
            return Ok(Message::decode(&packet)?);
        }
        packet.extend_from_slice(chunk.get(..length).unwrap_or_default());
        if packet.len() > most {
            return Err(CodecError::TooLong { length: packet.len(), max: most }.into());
        }
    }
}

fn receive(
    socket: &MessageSocket,
    patience: &Patience,
) -> Result<(Packet<Message>, Option<Peer>), TransferError> {
    loop {
        patience.ready(socket, PollFlags::POLLIN)?;
        match socket.receive_with_credentials(Duration::ZERO) {
            // Another process that shares the socket was faster.
            Err(ChannelError::Timeout) => {}
            received => return Ok(received?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_channel::event_channel;

    #[test]
    fn no_more_threads_hang_than_are_allowed() {
        let (sender, mail) = event_channel().unwrap();
        let mut threads = Threads::new(sender);
        let held: Vec<_> = (0..MAX_THREADS).map(|_| Arc::clone(&threads.lives)).collect();
        let ends = || io::pipe().map(|(read, write)| (File::from(OwnedFd::from(read)), write)).unwrap();
        let (read, _write) = ends();
        assert!(matches!(threads.load(Route::Pipe(read)), Err(TransferError::Stuck)));
        assert!(mail.take().is_none());
        drop(held);
        let (read, _write) = ends();
        threads.load(Route::Pipe(read)).unwrap();
    }
}
