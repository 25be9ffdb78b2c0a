//! Measures how many frames a back-end moves, how much processor time they cost, and how long they take.
//!
//! [`run`] measures each back-end ([`peer`]) under each [`scenario`], in rounds whose order rotates. For each cell it
//! starts the back-end and a process with the load ([`load`]), in a network namespace of their own. The load is a guest
//! ([`guest`]) and a network ([`source`]) in one thread, which has the last processor to itself. The load also reads
//! what the back-end's process uses ([`usage`]). [`bare`] is a TAP without virtio: the limit. [`report`] writes the
//! results, [`plot`] draws them.

pub mod bare;
pub mod guest;
pub mod load;
pub mod peer;
pub mod plot;
pub mod report;
pub mod run;
pub mod scenario;
pub mod source;
pub mod usage;
