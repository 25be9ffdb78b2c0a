//! The protocols between Baton's programs: types, encodings and state machines, with no I/O, no clock and no `unsafe`.
//!
//! [`control`] is the control socket's protocol, used by `batonctl` and scripts. Processes hand over state in packets:
//! [`codec`] defines their layout, [`version`] negotiates the protocol version, [`fd_manifest`] names the descriptors,
//! and [`ownership`] defines the word that decides which process owns what is handed over. [`handover`] moves a device
//! or a session between two back-ends, [`migration`] moves a VM between two VMMs.
#![forbid(unsafe_code)]

mod bounded;
pub mod codec;
pub mod control;
pub mod end_reason;
pub mod fd_manifest;
pub mod handover;
pub mod migration;
pub mod ownership;
pub mod reasons;
pub mod version;
