//! The source of front-end connections: a listening socket, a front-end that listens, or an inherited socket. A
//! hand-over of the session moves the endpoint to another process.
#![expect(unsafe_code, reason = "takes ownership of the descriptor that accept4(2) returns")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_channel::bound_socket::{BindError, BoundSocket};
use baton_channel::connect::connect;
use baton_control::limited;
use baton_protocol::handover::wire::session::{EndpointKind, EndpointState};
use nix::sys::socket::{
    SockFlag, SockType, UnixAddr, accept4, getpeername, getsockname, getsockopt, sockopt,
};
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::dataplane::interrupt;

/// The shortest time between two attempts to connect.
const REDIAL: Duration = Duration::from_millis(100);

/// Why an endpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket's path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Another process handed over an unusable listener.
    #[error("descriptor listener is not a listening Unix stream socket")]
    Listener,
    /// The inherited descriptor is not a usable socket.
    #[error("--fd={0} is not a connected or listening Unix stream socket")]
    Inherited(RawFd),
    /// A system call failed.
    #[error("cannot set up the front-end's socket")]
    System(#[from] io::Error),
}

/// The source of front-end connections.
#[derive(Debug)]
pub enum Endpoint {
    /// No endpoint: another process hands one over with its session, or has taken this one.
    Nowhere,
    /// `--socket-path`.
    Listening(BoundSocket),
    /// `--fd`, listening.
    InheritedListener(UnixListener),
    /// `--fd`, connected. `None` once it is used.
    InheritedConnection(Option<UnixStream>),
    /// `--socket-path` with `--client`.
    Client {
        /// Where the front-end listens.
        path: PathBuf,
        /// Expires when the next attempt to connect is due.
        redial: TimerFd,
        /// When the last attempt was made. Limits the rate with a front-end that closes each connection at once.
        dialled: Option<Instant>,
        /// Whether the current failure to connect is logged.
        told: bool,
    },
}

impl Endpoint {
    /// Listens on `path`.
    ///
    /// # Errors
    /// Returns an error if `path` cannot be bound.
    pub fn listen(path: &Path) -> Result<Self, EndpointError> {
        let socket = BoundSocket::bind(path)?;
        socket.listener().set_nonblocking(true)?;
        Ok(Self::Listening(socket))
    }

    /// Connects to `path`, and reconnects whenever the connection ends.
    ///
    /// # Errors
    /// Returns an error if the path cannot be made absolute or the timer cannot be created.
    pub fn client(path: PathBuf) -> Result<Self, EndpointError> {
        // A relative path could mean another file to the process that takes the endpoint over.
        let path = std::path::absolute(path)?;
        let redial =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
                .map_err(io::Error::from)?;
        Ok(Self::Client { path, redial, dialled: None, told: false })
    }

    /// Uses an inherited socket.
    ///
    /// # Errors
    /// Returns an error if `socket` is not a connected or listening Unix stream socket.
    pub fn inherited(socket: OwnedFd) -> Result<Self, EndpointError> {
        if listens(&socket) {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            return Ok(Self::InheritedListener(listener));
        }
        if !is_connection(&socket) {
            return Err(EndpointError::Inherited(socket.as_raw_fd()));
        }
        Ok(Self::InheritedConnection(Some(UnixStream::from(socket))))
    }

    /// Creates an endpoint from another process' description and its listening socket, if it has one. The other process
    /// owns the socket file until [`Self::own`].
    ///
    /// # Errors
    /// Returns an error if a listening endpoint comes without a listener, or with a socket that does not listen at its
    /// path.
    pub fn adopt(state: &EndpointState, fd: Option<OwnedFd>) -> Result<Self, EndpointError> {
        let listener = |fd: Option<OwnedFd>| fd.ok_or(EndpointError::Listener);
        let path = PathBuf::from(state.path.as_deref().unwrap_or_default());
        match (state.kind, fd) {
            (EndpointKind::Listening, fd) => Ok(Self::Listening(BoundSocket::adopt(listener(fd)?, &path)?)),
            (EndpointKind::Listener, fd) => {
                let socket = listener(fd)?;
                if !listens(&socket) {
                    return Err(EndpointError::Listener);
                }
                Ok(Self::InheritedListener(UnixListener::from(socket)))
            }
            (EndpointKind::Client, _) => Self::client(path),
            (EndpointKind::None | EndpointKind::Other, _) => Ok(Self::Nowhere),
        }
    }

    /// Returns a description for the process that takes the endpoint over.
    pub fn state(&self) -> EndpointState {
        let path = |path: &Path| Some(path.to_string_lossy().into_owned());
        match self {
            Self::Nowhere | Self::InheritedConnection(_) => EndpointState::default(),
            Self::Listening(socket) => {
                EndpointState { kind: EndpointKind::Listening, path: path(socket.path()) }
            }
            Self::InheritedListener(_) => EndpointState { kind: EndpointKind::Listener, path: None },
            Self::Client { path: dialled, .. } => {
                EndpointState { kind: EndpointKind::Client, path: path(dialled) }
            }
        }
    }

    /// Returns the listening socket, if there is one.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listening(socket) => Some(socket.listener().as_fd()),
            Self::InheritedListener(listener) => Some(listener.as_fd()),
            Self::Nowhere | Self::InheritedConnection(_) | Self::Client { .. } => None,
        }
    }

    /// Takes ownership of the socket file: it is removed when the endpoint is dropped.
    pub fn own(&mut self) {
        if let Self::Listening(socket) = self
            && let Err(error) = socket.own_file()
        {
            tracing::warn!(%error, "cannot take over the front-end's socket file; it remains when this process ends");
        }
    }

    /// Leaves the socket file to another process.
    pub fn leave(&mut self) {
        if let Self::Listening(socket) = self {
            socket.leave_file();
        }
    }

    /// Returns the descriptor that becomes readable when [`Self::next_frontend`] should be called again, or `None` if
    /// no further front-end can come.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listening(socket) => Some(socket.listener().as_fd()),
            Self::InheritedListener(listener) => Some(listener.as_fd()),
            Self::InheritedConnection(_) | Self::Nowhere => None,
            Self::Client { redial, .. } => Some(redial.as_fd()),
        }
    }

    /// Returns the next front-end's connection, if one is available now.
    ///
    /// # Errors
    /// Returns an error if accept4(2) fails for a reason other than that no front-end waits, or if the timer cannot be
    /// set.
    pub fn next_frontend(&mut self) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Listening(socket) => accept(socket.listener()),
            Self::InheritedListener(listener) => accept(listener),
            Self::InheritedConnection(connection) => Ok(connection.take()),
            Self::Nowhere => Ok(None),
            Self::Client { path, redial, dialled, told } => {
                let since = dialled.map(|dialled| dialled.elapsed());
                if let Some(wait) =
                    since.and_then(|since| REDIAL.checked_sub(since)).filter(|wait| !wait.is_zero())
                {
                    redial.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty())?;
                    return Ok(None);
                }
                *dialled = Some(Instant::now());
                match connect(path, SockType::Stream).map(UnixStream::from) {
                    Ok(connection) => {
                        redial.unset()?;
                        *told = false;
                        Ok(Some(connection))
                    }
                    Err(error) => {
                        if !*told {
                            limited!(info, path = %path.display(), %error, "cannot connect to the front-end, retrying");
                            *told = true;
                        }
                        redial.set(Expiration::OneShot(REDIAL.into()), TimerSetTimeFlags::empty())?;
                        Ok(None)
                    }
                }
            }
        }
    }
}

/// Returns whether this is a Unix stream socket with a peer address.
pub fn is_connection(socket: &OwnedFd) -> bool {
    is_unix_stream(socket) && getpeername::<UnixAddr>(socket.as_raw_fd()).is_ok()
}

/// Returns whether this is a listening Unix stream socket.
fn listens(socket: &OwnedFd) -> bool {
    is_unix_stream(socket) && getsockopt(socket, sockopt::AcceptConn) == Ok(true)
}

fn is_unix_stream(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::SockType) == Ok(SockType::Stream)
        && getsockname::<UnixAddr>(socket.as_raw_fd()).is_ok()
}

/// Accepts a connection without blocking. `O_NONBLOCK` alone does not ensure that: every process that holds the socket
/// can clear the flag, or accept the connection first.
fn accept(listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    listener.set_nonblocking(true)?;
    match interrupt::bounded(|| accept_once(listener)) {
        Ok(connection) => Ok(Some(connection)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {
                Ok(None)
            }
            _ => Err(error),
        },
    }
}

/// Like `UnixListener::accept`, but returns `EINTR` when a signal interrupts it.
fn accept_once(listener: &UnixListener) -> io::Result<UnixStream> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4(2) just created `fd`, and it has no other owner.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn adopted_endpoint_owns_the_socket_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut first = Endpoint::listen(&path).unwrap();
        let twin = |endpoint: &Endpoint| {
            let listener = endpoint.listener().map(|fd| fd.try_clone_to_owned().unwrap());
            Endpoint::adopt(&endpoint.state(), listener).unwrap()
        };
        // Dropped without `own`.
        drop(twin(&first));
        assert!(path.exists());
        let mut second = twin(&first);
        second.own();
        first.leave();
        drop(first);
        UnixStream::connect(&path).unwrap();
        assert!(second.next_frontend().unwrap().is_some());
        drop(second);
        assert!(!path.exists());
        let client = twin(&Endpoint::client(path.clone()).unwrap());
        assert!(matches!(&client, Endpoint::Client { path: dialled, .. } if *dialled == path));
        let error = Endpoint::adopt(&EndpointState { kind: EndpointKind::Listener, path: None }, None);
        assert!(matches!(error, Err(EndpointError::Listener)));
    }

    #[test]
    fn accept_does_not_block_although_peer_clears_o_nonblock() {
        let directory = tempfile::tempdir().unwrap();
        let mut endpoint = Endpoint::listen(&directory.path().join("socket")).unwrap();
        let peer = UnixListener::from(endpoint.listener().unwrap().try_clone_to_owned().unwrap());
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    peer.set_nonblocking(false).unwrap();
                }
            });
            for _ in 0..50 {
                assert!(endpoint.next_frontend().unwrap().is_none());
            }
            end.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn front_end_that_closes_each_connection_is_redialled_after_a_delay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut endpoint = Endpoint::client(path).unwrap();
        for _ in 0..3 {
            assert!(endpoint.next_frontend().unwrap().is_some());
            assert!(endpoint.next_frontend().unwrap().is_none());
            let mut fds = [PollFd::new(endpoint.source().unwrap(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::try_from(30_000).unwrap()).unwrap(), 1);
        }
    }
}
