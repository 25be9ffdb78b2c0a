//! Hand-overs between two back-ends on one host: of a stopped *device*, or of a running *session*.
//!
//! [`wire`] has what they say to each other. [`prologue`] is how both begin; then [`device`] or [`session`] goes on.
//! Each has two state machines, the source's and the target's, and the checks of what the source says. The [ownership word](crate::ownership) decides who owns
//! what is handed over; no message does.

pub mod device;
pub mod prologue;
pub mod session;
pub mod wire;

/// How far the hand-over of a session was when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Until the target's HELLO.
    Greet,
    /// Until the target's READY.
    Check,
    /// Until the target has staged everything.
    Stage,
    /// Until all rings are stopped.
    Freeze,
    /// Until the target has taken the session.
    Commit,
}

impl Phase {
    /// Its name, which the operator's report has.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greet => "greet",
            Self::Check => "check",
            Self::Stage => "stage",
            Self::Freeze => "freeze",
            Self::Commit => "commit",
        }
    }
}
