//! Fault points: named places in the programs where tests have a process die, hang, fail or run out of descriptors.
//!
//! A program calls [`point`] or [`pass`] wherever a state of it begins that a peer, or whoever comes after it, must be
//! able to cope with. Without the feature `fault-points` these are empty, and what is shipped has no trace of them.
//! With it, a program that has called `arm` does what `BATON_FAULT` says:
//!
//! ```text
//! BATON_FAULT=target-vmm/restored:kill,target-vmm/greeted:fail
//! ```
//! Each of them happens once, at the first time that its place is reached; of several for one place the first one. A
//! line on standard error says so before. `BATON_HURRY=N` makes everybody's patience N times shorter. Where frames are
//! moved there is a [`batch`] of them as large as it gets: whoever is told to die `receiving` or `sending` at a place
//! goes no further there, and dies in the middle of the next batch.

#[cfg(feature = "fault-points")]
mod armed;
mod list;

pub use list::{Batch, Party, Point};

#[cfg(feature = "fault-points")]
pub use armed::{SpecError, arm, batch, pass, patience, point};

/// A place where an error can be returned.
///
/// # Errors
/// None: there are no fault points in this build.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(_: Point) -> std::io::Result<()> {
    Ok(())
}

/// A place where nothing can fail any more.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn pass(_: Point) {}

/// A worker is in the middle of this.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn batch(_: Batch) {}

/// How long to wait where `patience` is meant.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn patience(patience: std::time::Duration) -> std::time::Duration {
    patience
}
