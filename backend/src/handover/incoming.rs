//! The socket on which a back-end listens for sources (`--incoming-fds`).

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

/// How long to wait after a source could not be accepted, for example for lack of descriptors.
const REST: Duration = Duration::from_millis(100);

/// The socket. It is watched except while it rests.
#[derive(Debug)]
pub struct Incoming {
    socket: BoundSocket,
    /// When the rest ends, during which no source is accepted.
    resting: Option<Duration>,
}

impl Incoming {
    /// Binds `path`, and watches it with `epoll`.
    ///
    /// # Errors
    /// Returns an error if `path` cannot be bound or watched.
    pub fn bind(path: &Path, epoll: &Epoll) -> Result<Self, IncomingError> {
        let socket = BoundSocket::bind_packets(path)?;
        socket.listener().set_nonblocking(true)?;
        epoll.add(socket.listener(), Events::EPOLLIN, INCOMING)?;
        Ok(Self { socket, resting: None })
    }

    /// Accepts the next source, if one waits.
    pub fn accept(&mut self, epoll: &Epoll, now: Duration) -> Option<MessageSocket> {
        let connection = match self.socket.listener().accept() {
            Ok((connection, _)) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => {
                // The source is still in the backlog; the cause, such as a lack of descriptors, may pass.
                limited!(warn, %error, "cannot accept a source now");
                let _ = epoll.remove(self.socket.listener());
                self.resting = Some(now + REST);
                return None;
            }
        };
        match MessageSocket::try_from(OwnedFd::from(connection)) {
            Ok(link) => Some(link),
            Err(error) => {
                limited!(warn, %error, "cannot use a connection for a hand-over");
                None
            }
        }
    }

    /// Returns when [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.resting
    }

    /// Ends the rest if it is over at time `now`.
    pub fn on_time(&mut self, epoll: &Epoll, now: Duration) {
        if self.resting.take_if(|until| *until <= now).is_some()
            && let Err(error) = epoll.add(self.socket.listener(), Events::EPOLLIN, INCOMING)
        {
            limited!(warn, %error, "cannot watch for sources any more");
        }
    }
}
