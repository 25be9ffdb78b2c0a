//! The VM's move to another VMM on this host: carries out what the state machines of
//! [`baton_protocol::migration`] decide.
//!
//! [`source`] gives the VM away, [`target`] takes it. Both work on a [`Machine`](crate::machine::Machine), which has
//! everything that is stopped, saved, restored and started. While the VM stands still, its devices are suspended: no
//! back-end touches its TAP, and whose rings start first owns the TAP.

pub mod source;
pub mod target;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use baton_channel::packet::PacketSocket;
use nix::sys::socket;

/// How long a peer may take to read what is sent to it.
const SENDING_PATIENCE: Duration = Duration::from_secs(10);
/// Longer than anybody waits.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Ends a migration's connection from another thread.
#[derive(Debug)]
pub struct Cutter(std::os::fd::OwnedFd);

impl Cutter {
    fn new(socket: &PacketSocket) -> io::Result<Self> {
        socket.as_fd().try_clone_to_owned().map(Self)
    }

    /// Ends it.
    pub fn cut(&self) {
        // A connection that is closed already needs no cut.
        let _ = socket::shutdown(self.0.as_raw_fd(), socket::Shutdown::Both);
    }
}
