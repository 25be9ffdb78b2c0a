//! Runs the state machines of a source and a target over an in-memory link that loses, delays, repeats and truncates
//! messages. Either end may be killed at any time. Ownership is never duplicated and never lost.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod device;
mod migration;
mod prologue;
mod session;
