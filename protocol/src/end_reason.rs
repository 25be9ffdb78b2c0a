//! Why a hand-over or a migration ended with the source as the owner.

use crate::reasons::Reasons;

/// Why a hand-over or a migration ended. The text is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// A dry run: the target agreed.
    #[error("the target would accept the hand-over")]
    Possible,
    /// The target refused.
    #[error("the target refuses: {0}")]
    Refused(Reasons),
    /// The connection to the target ended.
    #[error("the target closed the connection")]
    Closed,
    /// The target process died.
    #[error("the target died")]
    Dead,
    /// The target process died after it took the session, and the source took the session back.
    #[error("the target died after taking the session; the source took it back")]
    Survived,
    /// The target did not answer in time.
    #[error("the target does not answer")]
    Silent,
    /// The target sent a message that the source did not expect in its state.
    #[error("the target sent {0} at the wrong time")]
    Wrong(&'static str),
    /// The target claimed to be the owner, but the ownership word contradicts it.
    #[error("the target claims to have taken over, but the ownership word says otherwise")]
    Untrue,
    /// The ownership word has an invalid value, or one that it cannot have in this state.
    #[error("unexpected ownership word")]
    Meaningless,
    /// The front-end disconnected before `CHECK_DEVICE_STATE`.
    #[error("the front-end disconnected without checking the saved device state (CHECK_DEVICE_STATE)")]
    Unasked,
    /// The source failed.
    #[error("{0}")]
    Failed(String),
    /// The operator cancelled the hand-over.
    #[error("cancelled")]
    Cancelled,
}
