//! The wire format of hand-overs. All of it is untrusted until it has been checked.
//!
//! [`message`] defines the packets, [`device`] and [`session`] the state that they carry, and [`refusal`] the reasons
//! for a refusal.

pub mod device;
pub mod message;
pub mod refusal;
pub mod session;
