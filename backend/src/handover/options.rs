//! What the target's command line decides, whatever a source offers.

use std::time::Duration;

use crate::args::DeviceState;

/// The options.
#[derive(Clone, Debug, Default)]
pub struct TargetOptions {
    /// `--queue-pairs`.
    pub queue_pairs: Option<usize>,
    /// How many `--vhost-fds`.
    pub vhost_fds: Option<usize>,
    /// `--poll-us`.
    pub poll: Option<Duration>,
    /// `--device-state`; if absent, the front-end's user decides.
    pub device_state: Option<DeviceState>,
    /// `--vhost`, by a user that may not open it: only the source of a session can give it.
    pub vhost_from_source: bool,
}
