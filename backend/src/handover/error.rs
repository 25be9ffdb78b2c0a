//! Why a hand-over does not begin, or device state does not move.

use std::io;

use baton_channel::bound_socket::BindError;
use baton_channel::message_socket::ChannelError;
use baton_channel::ownership::OwnershipError;
use baton_channel::peer::PeerError;

use super::transfer::TransferError;

/// Why a hand-over cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// One is under way.
    #[error("a hand-over to {0} is under way; end it with handover --cancel")]
    UnderWay(String),
    /// To this process itself.
    #[error("this is the same back-end: it cannot hand anything over to itself")]
    Oneself,
    /// There is nothing to hand over.
    #[error("this back-end has no TAP to hand over")]
    NoTap,
    /// Nothing to cancel.
    #[error("no hand-over is under way")]
    NotUnderWay,
    /// The front-end moves device state.
    #[error("the front-end is moving device state; try again when it has")]
    DeviceState,
    /// It cannot be begun.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// To somebody else's process.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// It cannot be begun.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// Who listened has gone, and is not known.
    #[error("the target closed the connection")]
    Gone,
    /// It cannot be begun.
    #[error("cannot begin a hand-over")]
    System(#[from] io::Error),
}

/// Why device state is not moved.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// Rings are set up or run.
    #[error("device state moves only while all rings are stopped")]
    NotSuspended,
    /// The operator permits none.
    #[error("device state is switched off (--device-state=off)")]
    Off,
    /// The front-end may not move the TAP.
    #[error("this front-end may move device state without the TAP only; see --device-state")]
    StateOnly,
    /// One is under way.
    #[error("another transfer of device state is under way")]
    UnderWay,
    /// None was begun.
    #[error("no device state has been moved")]
    None,
    /// A TAP would arrive where there is one.
    #[error("this back-end has a TAP already and cannot receive one; start it with --incoming-fds")]
    AlreadyInitialised,
    /// The device is being handed over in another way.
    #[error("the device is in another hand-over")]
    Busy,
    /// The target refuses what came, or the source could not send it.
    #[error("{0}")]
    Failed(String),
    /// The source of this session could not move it.
    #[error("the transfer failed before the session was handed over")]
    BeforeHandover,
    /// It cannot be begun.
    #[error(transparent)]
    Begin(#[from] HandoverError),
    /// It failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// Why there is no place to receive a device.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// Its path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system would not.
    #[error("cannot wait for a hand-over")]
    System(#[from] io::Error),
}
