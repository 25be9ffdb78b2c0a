//! The errors of a network device.

use thiserror::Error;

use super::identity::OfferError;
use crate::vhost_user::frontend::ConnectionError;
use crate::virtio::InvalidQueue;

/// Why a network device cannot use its back-end or carry out a task.
#[derive(Debug, Error)]
pub enum NetError {
    /// The connection failed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The back-end does not fit the device.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// A virtqueue of the driver is invalid.
    #[error(transparent)]
    Queue(#[from] InvalidQueue),
    /// A virtqueue's used index cannot be read.
    #[error("cannot read a virtqueue's used index")]
    UsedIndex(#[source] virtio_queue::Error),
    /// A thread or an eventfd cannot be created.
    #[error("cannot start a network device's thread")]
    Thread(#[source] std::io::Error),
    /// The thread has ended.
    #[error("the network device's thread has ended")]
    Ended,
    /// No back-end is connected.
    #[error("the back-end is not connected")]
    NoBackend,
    /// A received state whose parts contradict each other.
    #[error("the received virtqueue state does not fit the device")]
    State,
}
