//! Hand-overs between two back-ends on one host: of a *device* whose rings are stopped, or of a running *session*.
//!
//! [`wire`] defines the messages. Every hand-over begins with [`prologue`] and continues with [`device`] or
//! [`session`]. Each of these has two state machines, the source's and the target's, and the checks of the source's
//! messages. The [ownership word](crate::ownership) decides which process owns what is handed over; no message does.

pub mod device;
pub mod prologue;
pub mod session;
pub mod wire;

/// The phase in which the hand-over of a session ended.
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
    /// Returns the phase's name in the operator's report.
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
