//! The settings that the target's command line decides, independently of the source.

use crate::args::DeviceState;
use crate::dataplane::polling::PollTime;

/// Options of a target.
#[derive(Clone, Debug, Default)]
pub struct TargetOptions {
    /// `--queue-pairs`.
    pub queue_pairs: Option<usize>,
    /// The number of descriptors in `--vhost-fds`.
    pub vhost_fds: Option<usize>,
    /// `--poll-us`.
    pub poll: Option<PollTime>,
    /// `--device-state`. If absent, the front-end's user decides.
    pub device_state: Option<DeviceState>,
    /// `--vhost` without permission to open `/dev/vhost-net`: only the source of a session can provide the instances.
    pub vhost_from_source: bool,
}
