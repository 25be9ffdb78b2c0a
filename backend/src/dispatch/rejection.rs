//! Reasons for rejecting a front-end's request.

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
    #[error("the device has no vring {0}")]
    Index(u32),
    /// The vring must be stopped first.
    #[error("vring {0} is started; stop it with GET_VRING_BASE first")]
    Running(usize),
    /// The layout of a vring is invalid.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory cannot be mapped or changed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel does not accept this many memory regions.
    #[error(
        "{regions} memory regions exceed the kernel's limit of {max}; raise max_mem_regions of the module vhost"
    )]
    Regions {
        /// The number of regions after the request.
        regions: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// The descriptor is not an eventfd.
    #[error(transparent)]
    Notifier(#[from] NotifierError),
    /// The index of a split vring has 16 bits.
    #[error("vring base {0:#x} has more than 16 bits")]
    Base(u32),
    /// Features were acknowledged that change the protocol or the rings and were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// The message needs a protocol feature that is not offered.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    /// The message needs a protocol feature that the front-end did not acknowledge.
    #[error("{0} was not negotiated")]
    NotNegotiated(&'static str),
    /// The dirty log is unusable.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The inflight region is unusable.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// Device state cannot be transferred.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateError),
    /// The configuration space is read-only.
    #[error("the configuration space is read-only")]
    Config,
    /// The device failed, or refused the change.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
