//! How long the network stands still while a session is handed over, and whether a frame is lost by it.
//!
//! The load comes from a process of its own ([`driver`]), which is front-end, guest and network in one: numbered and
//! stamped frames both ways ([`crate::numbered_frames`], [`timing`]). It notes the worst of each interval that it is told of ([`message`]); half of
//! these hold a hand-over, the others nothing ([`cell`]). [`row`] looks for the rate that the machine bears, and hands a
//! session on many times in a row near that. [`numbers`] sums up, [`page`] writes it all down, with a [`plot`].

pub mod cell;
pub mod dataplane;
pub mod driver;
pub mod message;
pub mod numbers;
pub mod page;
pub mod plot;
pub mod row;
pub mod timing;
