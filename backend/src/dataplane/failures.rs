//! Failures of the workers, which the event loop receives.

use std::io;

use crate::event_channel::EventSender;

/// A worker cannot go on.
#[derive(Debug)]
pub struct WorkerFailure {
    /// Its queue pair.
    pub pair: u16,
    /// Why.
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
    /// For the worker of `pair`.
    pub fn new(sender: EventSender<WorkerFailure>, pair: u16) -> Self {
        Self { sender, pair }
    }

    /// Tells the event loop that the worker cannot go on.
    pub fn report(&self, error: &io::Error) {
        let error = io::Error::new(error.kind(), error.to_string());
        // Without a receiver the process is ending.
        let _ = self.sender.send(WorkerFailure { pair: self.pair, error });
    }
}
