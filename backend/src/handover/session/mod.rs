//! Hands over a running session (see ARCHITECTURE.md): the device with its rings, the front-end's connection, and the
//! endpoint.
//!
//! A [`source`] exists from the target's READY until the session belongs to the target or to this process for good. A
//! [`target`] exists until it owns the session or drops it. [`snapshot`] describes a session, [`stage`] sets one up
//! from a description, and [`frames`] holds the frames in hand.

pub mod frames;
pub mod snapshot;
pub mod source;
pub mod stage;
pub mod target;

use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::endpoint::Endpoint;

/// How long the event loop blocks for a message that is due at once, while no frame moves.
const MOMENT: Duration = Duration::from_millis(2);

/// How long to wait while the socket to the peer is full.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a front-end negotiated with the process that served it before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Whether the front-end has sent any message.
    pub begun: bool,
    /// Virtio features (`SET_FEATURES`).
    pub features: u64,
    /// Protocol features (`SET_PROTOCOL_FEATURES`).
    pub protocol_features: u64,
}

/// A front-end's connection.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// The socket.
    pub socket: BorrowedFd<'a>,
    /// Whether the front-end has sent any message.
    pub begun: bool,
}

/// The event loop's side of a hand-over of the session: the front-end's connection and the endpoint.
pub trait FrontEnd: Debug {
    /// Returns the connection, if a front-end is connected.
    fn connection(&self) -> Option<Connection<'_>>;

    /// Returns the endpoint.
    fn endpoint(&self) -> &Endpoint;

    /// Stops reading messages and accepting front-ends. They stay in their sockets.
    fn hold(&mut self);

    /// Serves again after [`Self::hold`]: this process keeps the session.
    fn resume(&mut self);

    /// Closes the connection and leaves the endpoint to the target, which owns the session now.
    fn release(&mut self);

    /// Prepares to serve a connection and an endpoint that still belong to another process, and holds its own.
    ///
    /// # Errors
    /// Returns an error if the message handler cannot be created. Nothing is changed.
    fn stage(&mut self, connection: Option<(OwnedFd, Negotiated)>, endpoint: Endpoint) -> io::Result<()>;

    /// Drops the staged connection and endpoint, and serves its own again.
    fn unstage(&mut self);

    /// Serves the staged connection and endpoint instead of its own.
    fn take(&mut self);

    /// Ends the process because the source took the session back.
    fn abandon(&mut self);
}
