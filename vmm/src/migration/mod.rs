//! The VM's move to another VMM on this host: carries out what the state machines of
//! [`baton_protocol::migration`] decide.
//!
//! [`source`] gives the VM away, [`target`] takes it. Both work on a [`Machine`](crate::machine::Machine), which has
//! everything that is stopped, saved, restored and started. While the VM stands still, its devices are suspended: no
//! back-end touches its TAP, and whose rings start first owns the TAP.

pub mod source;
pub mod target;

use std::time::Duration;

/// How long a peer may take to read a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// For states without a timeout.
const NO_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
