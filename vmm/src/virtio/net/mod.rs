//! A network device: its transport's side, its worker, and the back-end behind it.
//!
//! The vCPU threads use [`Net`], behind the transport. The device's own thread ([`thread`]) does everything that
//! concerns the back-end: its [`Worker`] alone owns the connection, and runs the tasks in its [`mailbox`]. Transport,
//! worker and control socket share [`NetShared`]. A vCPU that resets the device waits for the worker, because the
//! driver reuses its memory afterwards. A vCPU that starts the device does not wait. The worker starts another thread
//! to reconnect to a lost back-end ([`reconnect`]).

mod device;
mod error;
mod identity;
mod mailbox;
mod reconnect;
mod shared;
#[cfg(test)]
mod tests;
mod thread;
mod worker;

pub use self::device::Net;
pub use self::error::NetError;
pub use self::shared::NetShared;
pub use self::thread::NetThread;
pub use self::worker::Worker;
