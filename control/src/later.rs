//! An answer that takes its time: the server goes on with its other clients meanwhile.
//!
//! Whoever carries the request out has the [`Promise`], the server the [`Later`]. A promise that is dropped is answered
//! with a refusal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use baton_protocol::control::Refusal;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::Value;

/// What a request comes to.
pub type Outcome = Result<Value, Refusal>;

/// A handler's answer.
#[derive(Debug)]
pub enum Answer {
    /// This.
    Now(Outcome),
    /// Whatever will be promised.
    Later(Later),
}

impl From<Outcome> for Answer {
    fn from(outcome: Outcome) -> Self {
        Self::Now(outcome)
    }
}

/// The duty to answer.
#[derive(Debug)]
pub struct Promise {
    outcome: SyncSender<Outcome>,
    done: Arc<EventFd>,
}

/// An answer that has yet to come.
#[derive(Debug)]
pub struct Later {
    outcome: Receiver<Outcome>,
    done: Arc<EventFd>,
}

impl Promise {
    /// A promise and the answer that will come of it.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<(Self, Later)> {
        let done = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, outcome) = sync_channel(1);
        Ok((Self { outcome: sender, done: Arc::clone(&done) }, Later { outcome, done }))
    }

    /// Answers.
    pub fn keep(self, outcome: Outcome) {
        // There is room for the one answer; whoever asked may have gone.
        let _ = self.outcome.try_send(outcome);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Err(errno) = self.done.write(1) {
            tracing::error!(%errno, "cannot say that an answer is there");
        }
    }
}

impl Later {
    /// The answer, once it is there.
    pub(crate) fn take(&self) -> Option<Outcome> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(Refusal { error: "the request came to no end".to_owned() }))
            }
        }
    }
}

impl AsFd for Later {
    /// Readable once the answer is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}
