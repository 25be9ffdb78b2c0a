//! A transfer of device state over a descriptor from the front-end (`SET_DEVICE_STATE_FD`). A separate thread reads or
//! writes the descriptor, since the other end may be slow and the session must continue. The event loop handles the
//! result.
//!
//! The other end is not trusted, so no call may block the thread: it is interrupted if the descriptor blocks although
//! it was ready. A cancelled transfer ends at once.

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
/// How long to wait before retrying a descriptor that was reported ready, and was not.
const REST: Duration = Duration::from_millis(10);
/// How many bytes a writable pipe accepts without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// The most threads at a time. One is active. The others were cancelled but hang in the kernel, for example on a FUSE
/// server that does not answer.
const MAX_THREADS: usize = 8;

/// Why a transfer of device state failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Receiving from the socket failed.
    #[error("the transfer of device state failed")]
    Channel(#[from] ChannelError),
    /// The data cannot be decoded or encoded.
    #[error("received data is not valid device state")]
    Codec(#[from] CodecError),
    /// The transfer exceeded its time limit.
    #[error("the transfer of device state took too long")]
    Timeout,
    /// The session ended, or the front-end began another transfer.
    #[error("the transfer of device state was cancelled")]
    GivenUp,
    /// Too many cancelled transfers still hang.
    #[error("{MAX_THREADS} earlier transfers of device state hang")]
    Stuck,
    /// A system call failed.
    #[error("the transfer of device state failed")]
    Io(#[from] io::Error),
}

/// How a transfer ended.
#[derive(Debug)]
pub enum Outcome {
    /// The result of writing the state.
    Saved(Result<(), TransferError>),
    /// The message read from a pipe.
    Read(Result<Message, TransferError>),
    /// The packet received from a socket, with its sender if the packet had credentials.
    Received(Result<(Packet<Message>, Option<Peer>), TransferError>),
}

/// The kind of descriptor that carries a transfer.
#[derive(Debug)]
pub enum Route {
    /// A Unix socket of type `SOCK_SEQPACKET`: two Baton back-ends hand the device over with its TAP.
    Socket(MessageSocket),
    /// A pipe, a file or a stream socket: the front-end may store the bytes, so only the state is transferred.
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

/// A running transfer. Dropping it cancels the transfer and discards the outcome.
#[derive(Debug)]
pub struct Running {
    number: u64,
    /// Closing this end tells the thread to stop.
    _stop: PipeWriter,
}

impl Running {
    /// Returns whether `finished` is the outcome of this transfer.
    pub fn sent(&self, finished: &Finished) -> bool {
        self.number == finished.number
    }
}

/// The transfer of device state that the front-end asked for last.
#[derive(Debug)]
pub enum Transfer {
    /// The front-end asked for none.
    None,
    /// A thread is working on it.
    Running(Running),
    /// It has ended with this result.
    Over(Result<(), DeviceStateError>),
}

impl Transfer {
    /// Returns whether a thread is working on it.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }

    /// Returns whether it succeeded, if it has ended and `CHECK_DEVICE_STATE` has not reported that.
    pub fn succeeded(&self) -> Option<bool> {
        match self {
            Self::Over(result) => Some(result.is_ok()),
            Self::None | Self::Running(_) => None,
        }
    }

    /// Creates the transfer that another process made for the same front-end, from [`Self::succeeded`] there.
    pub fn inherited(succeeded: Option<bool>) -> Self {
        match succeeded {
            None => Self::None,
            Some(true) => Self::Over(Ok(())),
            Some(false) => Self::Over(Err(DeviceStateError::BeforeHandover)),
        }
    }
}

/// The message that the thread of a transfer sends when it ends.
#[derive(Debug)]
pub struct Finished {
    number: u64,
    /// How the transfer ended.
    pub outcome: Outcome,
}

/// The threads for transfers in this process.
#[derive(Debug)]
pub struct Threads {
    sender: EventSender<Finished>,
    /// How many transfers were started.
    count: u64,
    /// Each thread holds a reference while it runs.
    lives: Arc<()>,
}

impl Threads {
    /// Creates an empty set of threads, which report to `sender`.
    pub fn new(sender: EventSender<Finished>) -> Self {
        Self { sender, count: 0, lives: Arc::default() }
    }

    /// Starts a thread that writes a message to a pipe.
    ///
    /// # Errors
    /// Returns an error if too many threads hang or the thread cannot be created. The pipe is closed.
    pub fn save(&mut self, pipe: File, message: &Message) -> Result<Running, TransferError> {
        let packet = message.encode()?;
        self.start(move |patience| {
            let written = write(&pipe, &packet, patience);
            // Close before reporting, so that the reader has seen the end of file by then.
            drop(pipe);
            Outcome::Saved(written)
        })
    }

    /// Starts a thread that reads a message from a pipe or a socket.
    ///
    /// # Errors
    /// Returns an error if too many threads hang or the thread cannot be created. The descriptor is closed.
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

/// The limits of a thread: a deadline, and cancellation.
#[derive(Debug)]
struct Patience {
    until: Instant,
    /// Becomes readable, without data, when the transfer is cancelled.
    stopped: PipeReader,
}

impl Patience {
    /// Waits until `fd` is ready.
    fn ready(&self, fd: &impl AsFd, events: PollFlags) -> Result<(), TransferError> {
        let mut fds = [PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN), PollFd::new(fd.as_fd(), events)];
        while !self.wait(&mut fds, PATIENCE)? {}
        Ok(())
    }

    /// Waits briefly after a descriptor was reported ready and was not.
    fn rest(&self) -> Result<(), TransferError> {
        self.wait(&mut [PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)], REST).map(drop)
    }

    /// Waits for `fds`, the first of which is `stopped`. Returns whether one is ready.
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

    /// Repeats a call until it succeeds. The call may block although `fd` was ready: a process that shares `fd` may
    /// have been faster, and a nearly full terminal accepts less than is written.
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
            // Another process that shares the socket read the packet first.
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
    fn number_of_hanging_threads_is_limited() {
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
