//! A channel whose receiving end can be watched with epoll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The sending end.
#[derive(Debug)]
pub struct EventSender<T> {
    sender: Sender<T>,
    eventfd: Arc<EventFd>,
}

impl<T> Clone for EventSender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), eventfd: Arc::clone(&self.eventfd) }
    }
}

/// The receiving end, readable while there may be a message.
#[derive(Debug)]
pub struct EventReceiver<T> {
    receiver: Receiver<T>,
    eventfd: Arc<EventFd>,
}

/// Creates a channel.
///
/// # Errors
/// Returns an error if `eventfd(2)` fails.
pub fn event_channel<T>() -> io::Result<(EventSender<T>, EventReceiver<T>)> {
    let eventfd = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((EventSender { sender, eventfd: Arc::clone(&eventfd) }, EventReceiver { receiver, eventfd }))
}

impl<T> EventSender<T> {
    /// Sends a message. Returns `false` if the receiver is gone.
    pub fn send(&self, message: T) -> bool {
        let sent = self.sender.send(message).is_ok();
        // Fails only if the counter is full; the receiver is awake then.
        let _ = self.eventfd.write(1);
        sent
    }
}

impl<T> EventReceiver<T> {
    /// Takes the next message, if there is one.
    pub fn take(&self) -> Option<T> {
        let message = self.receiver.try_recv().ok();
        if message.is_none() {
            // Fails if the counter is zero already. A message sent before this read is received below; a later one
            // signals again.
            let _ = self.eventfd.read();
            return self.receiver.try_recv().ok();
        }
        message
    }
}

impl<T> AsFd for EventReceiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
