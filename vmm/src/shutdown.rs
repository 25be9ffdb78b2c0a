//! Shuts down a connection from another thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{Shutdown, shutdown};

/// A second descriptor of a connection. Shutting it down ends every wait for the peer.
#[derive(Debug)]
pub struct ShutdownHandle(OwnedFd);

impl ShutdownHandle {
    /// Creates a handle to `socket`.
    pub fn new(socket: &impl AsFd) -> io::Result<Self> {
        socket.as_fd().try_clone_to_owned().map(Self)
    }

    /// Shuts down the connection.
    pub fn shut_down(&self) {
        // Fails if the peer has closed the connection; then there is nothing to do.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}
