//! Hands the device over while its rings are stopped (see ARCHITECTURE.md).
//!
//! A [`source`] exists from the operator's command, or the front-end's request, until the TAP belongs to the target or
//! to this process for good. A [`target`] exists until it owns the TAP or gives it up. [`snapshot`] describes the
//! device and adopts it from a description. [`frames`] transfers the frames in hand.

pub mod frames;
pub mod snapshot;
pub mod source;
pub mod target;
