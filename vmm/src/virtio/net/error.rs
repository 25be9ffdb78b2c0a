//! Why a network device has no back-end, or cannot do what it is asked.

use thiserror::Error;

use super::identity::OfferError;
use crate::vhost_user::frontend::ConnectionError;
use crate::virtio::InvalidQueue;

/// Why a device has no back-end.
#[derive(Debug, Error)]
pub enum NetError {
    /// The connection.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The back-end is of the wrong kind.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// The driver's virtqueues.
    #[error(transparent)]
    Queue(#[from] InvalidQueue),
    /// A virtqueue's used index cannot be read.
    #[error("cannot read a virtqueue's used index")]
    UsedIndex(#[source] virtio_queue::Error),
    /// No thread or event.
    #[error("cannot start a network device's thread")]
    Thread(#[source] std::io::Error),
    /// The thread has ended.
    #[error("the network device's thread has ended")]
    Ended,
    /// No back-end is connected.
    #[error("the back-end is not connected")]
    NoBackend,
    /// A restored state whose parts contradict each other.
    #[error("the state's virtqueues do not fit the device")]
    State,
}
