//! The control socket: its file, its server, its client, and what `batonctl` prints.
//!
//! [`BoundSocket`] also holds the file of the back-end's vhost-user socket: the rules are the same.

pub mod client;
mod error_chain;
pub mod listing;
pub mod log_limit;
pub mod predecessor;
pub mod reply;
pub mod server;
pub mod socket_path;

pub use client::{ClientError, ControlClient};
pub use error_chain::error_chain;
pub use reply::{Outcome, Reply};
pub use server::ControlServer;
pub use socket_path::{BindError, BoundSocket};
