//! Migrates the VM to another VMM on this host: carries out what the state machines of [`baton_protocol::migration`]
//! decide.
//!
//! Both [`source`] and [`target`] work on a [`Machine`](crate::machine::Machine). While the VM is paused, its
//! devices are suspended: no back-end touches the TAP, and the back-end whose rings start first owns it.

pub mod source;
pub mod target;

use std::time::Duration;

/// How long a peer may take to read a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// For states without a timeout.
const NO_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
