//! Failures that workers report to the event loop.

use std::io;

use crate::event_channel::EventSender;

/// A worker that cannot continue.
#[derive(Debug)]
pub struct WorkerFailure {
    /// The worker's queue pair.
    pub pair: u16,
    /// The reason.
    pub error: io::Error,
}

/// Reports the failures of one worker.
#[derive(Debug)]
pub struct Failures {
    sender: EventSender<WorkerFailure>,
    /// The worker's queue pair.
    pub pair: u16,
}

impl Failures {
    /// Creates the reporter for the worker of `pair`.
    pub fn new(sender: EventSender<WorkerFailure>, pair: u16) -> Self {
        Self { sender, pair }
    }

    /// Reports to the event loop that the worker cannot continue.
    pub fn report(&self, error: &io::Error) {
        let error = io::Error::new(error.kind(), error.to_string());
        // The receiver is gone only when the process is ending.
        let _ = self.sender.send(WorkerFailure { pair: self.pair, error });
    }
}
