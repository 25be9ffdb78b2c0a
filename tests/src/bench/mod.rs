//! Measures how long the network stops while a session is handed over, and whether any frame is lost.
//!
//! A separate process, the [`driver`], acts as front-end, guest and network. It sends numbered, time-stamped frames
//! both ways ([`crate::numbered_frames`]) and records the longest gap and delay ([`timing`]) of each interval that the
//! benchmark marks ([`message`]). Half of the intervals contain a hand-over; the others are the control ([`cell`]).
//! [`row`] finds the highest rate without drops and runs many consecutive hand-overs near it. [`numbers`] computes
//! quantiles; [`page`] and [`plot`] write the results.

pub mod cell;
pub mod dataplane;
pub mod driver;
pub mod message;
pub mod numbers;
pub mod page;
pub mod plot;
pub mod row;
pub mod timing;
