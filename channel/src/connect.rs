//! Connects to a Unix socket without waiting for its listener.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, socket};

/// Connects to the socket of type `kind` at `path`. The returned socket is in blocking mode.
///
/// # Errors
/// Returns the error of `connect(2)`: [`io::ErrorKind::WouldBlock`] if the listener's backlog is full.
pub fn connect(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, kind, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let connection = UnixStream::from(socket);
    connection.set_nonblocking(false)?;
    Ok(connection.into())
}
