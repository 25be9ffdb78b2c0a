//! Why a hand-over or a migration is over, with the source as the owner.

use crate::reasons::Reasons;

/// The reason. Its text is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// The source only asked, and the target agreed.
    #[error("the target would take it")]
    Possible,
    /// The target refused.
    #[error("the target refuses: {0}")]
    Refused(Reasons),
    /// The connection to the target ended.
    #[error("the target closed the connection")]
    Closed,
    /// The target's process ended.
    #[error("the target died")]
    Dead,
    /// The target's process ended after it had taken the session, and the source has it again.
    #[error("the target died after it had taken the session; the source has taken it back")]
    Survived,
    /// No answer came in time.
    #[error("the target does not answer")]
    Silent,
    /// The target sent a message that the source did not wait for.
    #[error("the target sent {0} at the wrong time")]
    Wrong(&'static str),
    /// The target sent that it is the owner, and the ownership word says that it is not.
    #[error("the target said that it had taken over, but had not")]
    Untrue,
    /// The ownership word has a value that no word has, or that it cannot have now.
    #[error("unexpected ownership word")]
    Meaningless,
    /// The front-end left before it asked whether the device's state was saved.
    #[error("the front-end left before it asked whether the device's state was saved")]
    Unasked,
    /// The source failed.
    #[error("{0}")]
    Failed(String),
    /// The operator cancelled it.
    #[error("cancelled")]
    Cancelled,
}
