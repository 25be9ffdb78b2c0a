//! What source and target say to each other. All of it is untrusted until a check has accepted it.
//!
//! [`message`] has the packets, [`device`] and [`session`] the state that they carry, [`refusal`] the reasons against a
//! hand-over.

pub mod device;
pub mod message;
pub mod refusal;
pub mod session;
