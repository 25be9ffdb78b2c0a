//! The socket on which a back-end waits for sources (`--incoming-fds`).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use baton_channel::bound_socket::BoundSocket;
use baton_channel::message_socket::MessageSocket;
use baton_control::limited;

use super::INCOMING;
use super::error::IncomingError;
use crate::events::{Epoll, Events};

/// How long to leave sources waiting that cannot be accepted, for want of descriptors, say.
const REST: Duration = Duration::from_millis(100);

/// The socket, watched unless it rests.
#[derive(Debug)]
pub struct Incoming {
    socket: BoundSocket,
    /// Until when nobody is accepted.
    resting: Option<Duration>,
}

impl Incoming {
    /// Binds `path`, and has `epoll` tell of sources.
    ///
    /// # Errors
    /// [`IncomingError`].
    pub fn bind(path: &Path, epoll: &Epoll) -> Result<Self, IncomingError> {
        let socket = BoundSocket::bind_packets(path)?;
        socket.listener().set_nonblocking(true)?;
        epoll.add(socket.listener(), Events::EPOLLIN, INCOMING)?;
        Ok(Self { socket, resting: None })
    }

    /// The next source, if there is one.
    pub fn accept(&mut self, epoll: &Epoll, now: Duration) -> Option<MessageSocket> {
        let connection = match self.socket.listener().accept() {
            Ok((connection, _)) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => {
                // The connection is still there to be accepted; what is missing may come back.
                limited!(warn, %error, "cannot accept a source now");
                let _ = epoll.remove(self.socket.listener());
                self.resting = Some(now + REST);
                return None;
            }
        };
        match MessageSocket::try_from(OwnedFd::from(connection)) {
            Ok(link) => Some(link),
            Err(error) => {
                limited!(warn, %error, "a connection for a hand-over is of no use");
                None
            }
        }
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.resting
    }

    /// Time has passed.
    pub fn on_time(&mut self, epoll: &Epoll, now: Duration) {
        if self.resting.take_if(|until| *until <= now).is_some()
            && let Err(error) = epoll.add(self.socket.listener(), Events::EPOLLIN, INCOMING)
        {
            limited!(warn, %error, "cannot wait for sources any more");
        }
    }
}
