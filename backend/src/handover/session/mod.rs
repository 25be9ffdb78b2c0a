//! A running session changes its back-end (DESIGN: "The handover protocol"): the device with its rings, the front-end's
//! connection, and the endpoint that front-ends come from.
//!
//! [`source`] lasts from the target's READY until the session is the target's or ours for good, [`target`] until the
//! session is ours, or dropped. [`snapshot`] describes a session, [`stage`] makes one of a description, [`frames`] has the
//! frames in hand.

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

/// How long the event loop stands still for what is to come at once, while no frame moves.
const MOMENT: Duration = Duration::from_millis(2);

/// How long a full socket of the peer's is waited for.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a front-end has negotiated with another process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Whether it has sent any message.
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

/// The event loop's part in a hand-over of the session: the front-end's connection, and the endpoint that others come
/// from.
pub trait FrontEnd: Debug {
    /// The connection, if a front-end is connected.
    fn connection(&self) -> Option<Connection<'_>>;

    /// Where front-ends come from.
    fn endpoint(&self) -> &Endpoint;

    /// Leaves messages and new front-ends in their sockets from now on.
    fn hold(&mut self);

    /// The session is ours after all: serves again.
    fn resume(&mut self);

    /// The session is the target's: closes the connection and leaves the endpoint to the target.
    fn release(&mut self);

    /// Prepares to serve a connection and an endpoint that are another process' still, and holds its own.
    ///
    /// # Errors
    /// What making the message handler fails with; all is as before.
    fn stage(&mut self, connection: Option<(OwnedFd, Negotiated)>, endpoint: Endpoint) -> io::Result<()>;

    /// Drops what was staged, and serves its own again.
    fn unstage(&mut self);

    /// Serves what was staged in the place of its own.
    fn take(&mut self);

    /// Another process has taken the session back: this process ends.
    fn abandon(&mut self);
}
