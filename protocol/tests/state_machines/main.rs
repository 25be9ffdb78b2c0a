//! The state machines of a source and a target, both run over an in-memory link that loses, delays, repeats and cuts
//! messages, with either end killed at any time: there are never two owners, and never none.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod device;
mod migration;
mod prologue;
mod session;
