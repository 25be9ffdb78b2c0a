//! Fault points: named places in the programs where tests make a process die, hang, fail or run out of descriptors.
//!
//! A program calls [`point`] or [`pass`] wherever it enters a state that a peer or a successor must be able to recover
//! from. Without the feature `fault-points` these functions are empty, and the programs contain no trace of them. With
//! it, a program that has called `arm` injects the faults that `BATON_FAULT` lists:
//!
//! ```text
//! BATON_FAULT=target-vmm/restored:kill,target-vmm/greeted:fail
//! ```
//! Each fault happens once, when the program first reaches its point. If a point is listed several times, each visit
//! takes the next fault. A line on standard error announces each fault. `BATON_HURRY=N` divides by N the timers of
//! hand-overs, the waits of a migration for a message, and the VMM's limit for a back-end's reply.
//!
//! The workers call [`batch`] when the frames of a batch have moved but their chains are not yet published as used.
//! With the action `receiving` or `sending`, the thread that reaches the point waits there, and the process dies in the
//! next such batch.

#[cfg(feature = "fault-points")]
mod armed;
mod list;

pub use list::{Batch, Party, Point};

#[cfg(feature = "fault-points")]
pub use armed::{SpecError, arm, batch, pass, patience, point};

/// Marks a fault point where an error can be returned.
///
/// # Errors
/// Never returns an error: this build has no fault points.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(_: Point) -> std::io::Result<()> {
    Ok(())
}

/// Marks a fault point where no error can be returned.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn pass(_: Point) {}

/// Marks that a worker is in the middle of a batch.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn batch(_: Batch) {}

/// Returns the timeout to use instead of `patience`: in this build, `patience` itself.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn patience(patience: std::time::Duration) -> std::time::Duration {
    patience
}
