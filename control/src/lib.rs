//! The control socket: its server, its client, and the command line and output format of `batonctl`. Also the rate limits for logs.

pub mod client;
pub mod command_line;
mod error_chain;
pub mod listing;
pub mod log_limit;
pub mod reply;
pub mod server;

pub use client::{ClientError, ControlClient};
pub use error_chain::error_chain;
pub use reply::{Outcome, Reply};
pub use server::ControlServer;
