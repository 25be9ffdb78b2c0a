//! Where front-ends come from: a listening socket, a front-end that listens, or an inherited socket. It may go on to
//! another process, with the session.
#![expect(unsafe_code, reason = "owns what accept4(2) gives")]

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
use crate::inherited;

/// How long after an attempt to connect the next one comes at the earliest.
const REDIAL: Duration = Duration::from_millis(100);

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket's path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Another process gives none that can be used.
    #[error("descriptor listener is no Unix stream socket that listens")]
    Listener,
    /// Not a socket that can be used.
    #[error("--fd={0} is no Unix stream socket that is connected or listens")]
    Inherited(RawFd),
    /// The system would not.
    #[error("cannot set up the front-end's socket")]
    System(#[from] io::Error),
}

/// Where front-ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// Nowhere: there will be what another process hands over.
    Nowhere,
    /// `--socket-path`.
    Listening(BoundSocket),
    /// `--fd`, listening.
    InheritedListener(UnixListener),
    /// `--fd`, connected; it is gone once used.
    InheritedConnection(Option<UnixStream>),
    /// `--socket-path` with `--client`.
    Client {
        /// Where the front-end listens.
        path: PathBuf,
        /// Runs while there is no connection.
        redial: TimerFd,
        /// When the last attempt was made. A front-end that ends each connection at once must not keep us busy.
        dialled: Option<Instant>,
        /// Whether the log says that nobody is there.
        told: bool,
    },
}

impl Endpoint {
    /// Listens on `path`.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn listen(path: &Path) -> Result<Self, EndpointError> {
        let socket = BoundSocket::bind(path)?;
        socket.listener().set_nonblocking(true)?;
        Ok(Self::Listening(socket))
    }

    /// Connects to `path`, again and again.
    ///
    /// # Errors
    /// [`EndpointError::System`].
    pub fn client(path: PathBuf) -> Result<Self, EndpointError> {
        // It may mean something else to another process.
        let path = std::path::absolute(path)?;
        let redial =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
                .map_err(io::Error::from)?;
        Ok(Self::Client { path, redial, dialled: None, told: false })
    }

    /// Uses an inherited socket.
    ///
    /// # Errors
    /// [`EndpointError::Inherited`].
    pub fn inherited(fd: RawFd) -> Result<Self, EndpointError> {
        let refused = || EndpointError::Inherited(fd);
        let socket: OwnedFd = inherited::claim(fd).ok_or_else(refused)?;
        if listens(&socket) {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            return Ok(Self::InheritedListener(listener));
        }
        if !is_connection(&socket) {
            return Err(refused());
        }
        Ok(Self::InheritedConnection(Some(UnixStream::from(socket))))
    }

    /// What another process says of its endpoint, with the listening socket if there is one. What it has in the file
    /// system stays its own until [`Self::own`].
    ///
    /// # Errors
    /// [`EndpointError`].
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

    /// What another process has to know of it.
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

    /// The listening socket, if there is one.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listening(socket) => Some(socket.listener().as_fd()),
            Self::InheritedListener(listener) => Some(listener.as_fd()),
            Self::Nowhere | Self::InheritedConnection(_) | Self::Client { .. } => None,
        }
    }

    /// From now on what it has in the file system goes with it.
    pub fn own(&mut self) {
        if let Self::Listening(socket) = self
            && let Err(error) = socket.own_file()
        {
            tracing::warn!(%error, "the front-end's socket will stay when this process ends");
        }
    }

    /// Leaves what it has in the file system to another process.
    pub fn leave(&mut self) {
        if let Self::Listening(socket) = self {
            socket.leave_file();
        }
    }

    /// What becomes readable when it is worth calling [`Self::next_frontend`] again; `None` when there will never be more.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listening(socket) => Some(socket.listener().as_fd()),
            Self::InheritedListener(listener) => Some(listener.as_fd()),
            Self::InheritedConnection(_) | Self::Nowhere => None,
            Self::Client { redial, .. } => Some(redial.as_fd()),
        }
    }

    /// The next front-end's connection, if there is one now.
    ///
    /// # Errors
    /// What the system says, if it is not just that nobody is there.
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
                            limited!(info, path = %path.display(), %error, "no front-end listens yet");
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

/// Whether this is a Unix stream socket that is connected, or was.
pub fn is_connection(socket: &OwnedFd) -> bool {
    is_unix_stream(socket) && getpeername::<UnixAddr>(socket.as_raw_fd()).is_ok()
}

/// Whether this is a Unix stream socket that listens.
fn listens(socket: &OwnedFd) -> bool {
    is_unix_stream(socket) && getsockopt(socket, sockopt::AcceptConn) == Ok(true)
}

fn is_unix_stream(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::SockType) == Ok(SockType::Stream)
        && getsockname::<UnixAddr>(socket.as_raw_fd()).is_ok()
}

/// `O_NONBLOCK` is shared with every process that the socket came from or went to, and one of those may take the
/// connection first: whatever they do, this does not wait.
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

/// As `UnixListener::accept`, which goes on after an interrupt.
fn accept_once(listener: &UnixListener) -> io::Result<UnixStream> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just given it, to nobody else.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn an_endpoint_goes_on_and_its_file_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut first = Endpoint::listen(&path).unwrap();
        let twin = |endpoint: &Endpoint| {
            let listener = endpoint.listener().map(|fd| fd.try_clone_to_owned().unwrap());
            Endpoint::adopt(&endpoint.state(), listener).unwrap()
        };
        // Not taken.
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
    fn nobody_there_is_not_waited_for_though_a_peer_clears_the_flag() {
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
    fn a_front_end_that_ends_each_connection_at_once_is_not_dialled_at_once() {
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
