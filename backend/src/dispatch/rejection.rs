//! Why a request of the front-end is rejected.

use crate::device::DeviceError;
use crate::dirty_log::LogError;
use crate::handover::error::DeviceStateError;
use crate::inflight::InflightError;
use crate::memory::MemoryError;
use crate::notify::NotifierError;
use crate::vring::LayoutError;

/// Why a request was rejected.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The device has no such vring.
    #[error("there is no vring {0}")]
    Index(u32),
    /// The vring must be stopped first.
    #[error("vring {0} runs; stop it with GET_VRING_BASE first")]
    Running(usize),
    /// A vring does not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Memory that cannot be shared.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More memory regions than the kernel takes.
    #[error("{regions} memory regions; the kernel's vhost takes {max} (max_mem_regions of the module vhost)")]
    Regions {
        /// How many there would be.
        regions: usize,
        /// How many there may be.
        max: usize,
    },
    /// Not an eventfd.
    #[error(transparent)]
    Notifier(#[from] NotifierError),
    /// A split vring's index has 16 bits.
    #[error("vring base {0:#x} has more than 16 bits")]
    Base(u32),
    /// Features that change the protocol or the rings and are not offered.
    #[error("features {0:#x} are not offered")]
    Features(u64),
    /// A message for a protocol feature that is not offered.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    /// A message for a protocol feature that the front-end did not acknowledge.
    #[error("{0} was not negotiated")]
    NotNegotiated(&'static str),
    /// No log that can be kept.
    #[error(transparent)]
    Log(#[from] LogError),
    /// No inflight region that can be kept.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// Device state that cannot be moved.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateError),
    /// The configuration space cannot be written, or ends before.
    #[error("no such part of the configuration space")]
    Config,
    /// The device could not follow.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
