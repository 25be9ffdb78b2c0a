//! What Baton's programs say to each other: types and their encodings, with no I/O, no clock and no `unsafe`.
//!
//! [`control`] is the control socket's protocol (DESIGN: "Command lines"), spoken by `batonctl` and by scripts.
//! What one process hands to another travels in packets: [`codec`] lays them out, [`version`] says who understands
//! whom, [`fd_manifest`] names their descriptors, and [`ownership`] has the word that says who owns what is handed over.
//! [`handover`] moves a device or a session from one back-end to another, [`migration`] a VM from one VMM to another.
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
