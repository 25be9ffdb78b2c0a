//! The front-end's side of vhost-user: connections to back-ends, and their timeouts.

#[cfg(test)]
pub mod fake_backend;
pub mod frontend;
pub mod inflight;
pub mod pipeline;
pub mod watchdog;
