//! A network device: its transport's side, its worker, and the back-end behind it.
//!
//! [`Net`] stands behind the transport and is used by the vCPU threads. Everything that concerns the back-end is done by
//! the device's own thread ([`thread`]), whose [`Worker`] alone owns the connection; it runs the tasks in its [`mailbox`]. Transport, worker and control socket share [`NetShared`]. The vCPU that resets the device waits
//! for the worker, because a driver gives its memory another use after that; to start the device it does not wait, since
//! what the driver asks for meanwhile is kept for the back-end. The worker has another thread reconnect to a lost back-end
//! ([`reconnect`]).

mod device;
mod identity;
mod mailbox;
mod reconnect;
mod shared;
#[cfg(test)]
mod tests;
mod thread;
mod worker;

pub use self::device::Net;
pub use self::shared::NetShared;
pub use self::thread::{NetError, NetThread};
pub use self::worker::Worker;
