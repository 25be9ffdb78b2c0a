//! Reasons why a hand-over cannot begin, or device state cannot be transferred.

use std::io;

use baton_channel::bound_socket::BindError;
use baton_channel::message_socket::ChannelError;
use baton_channel::ownership::OwnershipError;
use baton_channel::peer::PeerError;

use super::transfer::TransferError;

/// Why a hand-over cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Another hand-over is under way.
    #[error("a hand-over to {0} is under way; end it with handover --cancel")]
    UnderWay(String),
    /// The target is this process.
    #[error("the target is this back-end itself; use the path of another one")]
    Oneself,
    /// This process has no TAP.
    #[error("this back-end has no TAP to hand over")]
    NoTap,
    /// There is no hand-over to cancel.
    #[error("no hand-over is under way")]
    NotUnderWay,
    /// The front-end is moving device state.
    #[error("the front-end is moving device state; try again later")]
    DeviceState,
    /// The connection to the target failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The target's process is not trusted.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The ownership word cannot be created.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The target's process ended before it could be watched.
    #[error("the target closed the connection")]
    Gone,
    /// A system call failed.
    #[error("cannot begin a hand-over")]
    System(#[from] io::Error),
}

/// Why device state cannot be transferred.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// Not all rings are stopped.
    #[error("device state can be moved only while all rings are stopped")]
    NotSuspended,
    /// The operator disabled device state.
    #[error("device state is disabled (--device-state=off)")]
    Off,
    /// The front-end may not move the TAP.
    #[error("this front-end may move device state only without the TAP; see --device-state")]
    StateOnly,
    /// Another transfer is under way.
    #[error("another transfer of device state is under way")]
    UnderWay,
    /// No transfer was begun.
    #[error("no device state was transferred")]
    None,
    /// This process has a TAP, or cannot receive one.
    #[error("this back-end has a TAP already and cannot receive one; start it with --incoming-fds")]
    AlreadyInitialised,
    /// The device is in another hand-over.
    #[error("the device is in another hand-over")]
    Busy,
    /// The target refused the state, or the source could not send it.
    #[error("{0}")]
    Failed(String),
    /// The transfer failed in the process that served this session before.
    #[error("the transfer failed before the session was handed over")]
    BeforeHandover,
    /// The transfer cannot begin.
    #[error(transparent)]
    Begin(#[from] HandoverError),
    /// The transfer failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// Why the socket for sources cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A system call failed.
    #[error("cannot listen for hand-overs")]
    System(#[from] io::Error),
}
