//! A channel whose receiver can be waited for with epoll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The sending end.
#[derive(Debug)]
pub struct Mailer<T> {
    sender: Sender<T>,
    bell: Arc<EventFd>,
}

impl<T> Clone for Mailer<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), bell: Arc::clone(&self.bell) }
    }
}

/// The receiving end, readable while there may be mail.
#[derive(Debug)]
pub struct Mailbox<T> {
    receiver: Receiver<T>,
    bell: Arc<EventFd>,
}

/// A new channel.
///
/// # Errors
/// What `eventfd(2)` fails with.
pub fn mailbox<T>() -> io::Result<(Mailer<T>, Mailbox<T>)> {
    let bell = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((Mailer { sender, bell: Arc::clone(&bell) }, Mailbox { receiver, bell }))
}

impl<T> Mailer<T> {
    /// Sends `mail`. Gives false when nobody will ever read it.
    pub fn send(&self, mail: T) -> bool {
        let sent = self.sender.send(mail).is_ok();
        // Fails only when the counter is full, and then the receiver is awake.
        let _ = self.bell.write(1);
        sent
    }
}

impl<T> Mailbox<T> {
    /// Takes the next mail, if there is one.
    pub fn take(&self) -> Option<T> {
        let mail = self.receiver.try_recv().ok();
        if mail.is_none() {
            // Fails when the counter is empty already. Mail that came since the look rings again.
            let _ = self.bell.read();
            return self.receiver.try_recv().ok();
        }
        mail
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
