//! The reply to a control request that another thread carries out.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use baton_protocol::control::Refusal;
use serde_json::Value;

/// The result of a request: the reply's JSON object, or a refusal.
pub type Outcome = Result<Value, Refusal>;

/// Sends the outcome of one request to the client's thread, which waits for it.
#[derive(Debug)]
pub struct Reply(SyncSender<Outcome>);

impl Reply {
    /// A reply, and the receiver that waits for it. Receiving fails if the reply is dropped unsent.
    pub fn channel() -> (Self, Receiver<Outcome>) {
        let (sender, receiver) = sync_channel(1);
        (Self(sender), receiver)
    }

    /// Sends the outcome, without waiting.
    pub fn send(self, outcome: Outcome) {
        // Fails only if the client's thread no longer waits.
        let _ = self.0.send(outcome);
    }
}
