//! The reply to a control request that another thread handles.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use baton_protocol::control::Refusal;
use serde_json::Value;

/// The outcome of a request: the JSON object of the reply, or a refusal.
pub type Outcome = Result<Value, Refusal>;

/// Sends the outcome of one request to the thread of the client, which waits for it.
#[derive(Debug)]
pub struct Reply(SyncSender<Outcome>);

impl Reply {
    /// Creates a reply and its receiver. Receiving fails if the reply is dropped unsent.
    pub fn channel() -> (Self, Receiver<Outcome>) {
        let (sender, receiver) = sync_channel(1);
        (Self(sender), receiver)
    }

    /// Sends the outcome without waiting.
    pub fn send(self, outcome: Outcome) {
        // Fails only if the client's thread has stopped waiting.
        let _ = self.0.send(outcome);
    }
}
