//! How a back-end gives a running session to another one: the front-end's connection, its memory and rings, and the
//! device, with the front-end none the wiser (DESIGN: "The handover protocol"). The packets are
//! [`handover::message`](crate::handover::message)'s.

pub mod report;
pub mod state;
pub mod validate;
