//! What Baton's programs say to each other: types and their encodings, with no I/O, no clock and no `unsafe`.
//!
//! [`control`] is the control socket's protocol (DESIGN: "Command lines"), spoken by `batonctl` and by scripts.
#![forbid(unsafe_code)]

pub mod control;
