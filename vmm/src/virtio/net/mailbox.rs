//! Sends tasks to a network device's worker, which runs them one after the other.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use vmm_sys_util::eventfd::EventFd;

use super::error::NetError;
use super::worker::Worker;
use crate::event;

/// A task for the worker.
pub type Task = Box<dyn FnOnce(&mut Worker) + Send>;

/// Sends tasks to the worker.
#[derive(Clone, Debug)]
pub struct Mailbox {
    tasks: Sender<Task>,
    wake: Arc<EventFd>,
}

/// The worker's end of a mailbox.
#[derive(Debug)]
pub struct Inbox {
    /// The tasks, in the order sent.
    pub tasks: Receiver<Task>,
    /// Signalled after each task.
    pub wake: Arc<EventFd>,
}

/// Creates a mailbox.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, tasks) = channel();
    let wake = Arc::new(event::new()?);
    Ok((Mailbox { tasks: sender, wake: Arc::clone(&wake) }, Inbox { tasks, wake }))
}

impl Mailbox {
    /// Sends a task without waiting for it. Returns false if the worker has ended.
    pub fn send(&self, task: impl FnOnce(&mut Worker) + Send + 'static) -> bool {
        let sent = self.tasks.send(Box::new(task)).is_ok();
        if sent {
            event::signal(&self.wake);
        }
        sent
    }

    /// Sends a task. The returned receiver gets its result, or an error if the worker ends first.
    pub fn submit<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (sender, result) = sync_channel(1);
        self.send(move |worker| {
            // Fails if the caller no longer waits for the result.
            let _ = sender.send(task(worker));
        });
        result
    }

    /// Runs a task on the worker, and waits for the result.
    pub fn call<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Worker) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        self.submit(task).recv().unwrap_or(Err(NetError::Ended))
    }
}
