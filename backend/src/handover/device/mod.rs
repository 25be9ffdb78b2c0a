//! The device changes its back-end while its rings are stopped (DESIGN: "Local VM migration").
//!
//! [`source`] lasts from the operator's command, or from the front-end's request, until the TAP is the target's or ours
//! for good; [`target`] until the TAP is ours. [`snapshot`] turns the device into what is said of it and back, [`frames`]
//! moves the frames in hand.

pub mod frames;
pub mod snapshot;
pub mod source;
pub mod target;
