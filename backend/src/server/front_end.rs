//! The front-end's connection, the endpoint and the control socket: accepts and watches them, hands them over to
//! another process, and takes them over from one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use baton_control::limited;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::control_socket::ControlSocket;
use super::{ENDPOINT, RESTED, SESSION};
use crate::endpoint::Endpoint;
use crate::events::{Epoll, Events};
use crate::handover::session::{Connection, FrontEnd, Negotiated};
use crate::session::Session;
use crate::shared::SharedBackend;

/// The events for which a front-end's connection is watched.
const SESSION_EVENTS: Events =
    Events::EPOLLIN.union(Events::EPOLLOUT).union(Events::EPOLLRDHUP).union(Events::EPOLLET);

/// How long to wait after a front-end could not be accepted, for example for lack of descriptors.
const REST: Duration = Duration::from_millis(100);

/// How long a new connection may stay silent while another front-end waits.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a front-end may take to negotiate while another one waits. Negotiation normally takes milliseconds.
const NEGOTIATION: Duration = Duration::from_secs(5);

/// The connection and the endpoint.
#[derive(Debug)]
pub(super) struct Front {
    epoll: Arc<Epoll>,
    backend: SharedBackend,
    /// The connection.
    pub session: Option<Session>,
    endpoint: Endpoint,
    /// Whether `epoll` watches the endpoint.
    watched: bool,
    /// Expires at the end of a rest.
    rested: TimerFd,
    /// The endpoint is not watched for a while.
    resting: bool,
    /// A hand-over of the session leaves messages and new front-ends in their sockets.
    pub held: bool,
    /// The connection and the endpoint that another process is about to hand over.
    staged: Option<(Option<Session>, Endpoint)>,
    /// The control socket.
    pub control: ControlSocket,
    /// The source took the session back.
    pub abandoned: bool,
    /// Why the connection that this process took over cannot be watched.
    pub failure: Option<io::Error>,
}

impl Front {
    pub(super) fn new(
        epoll: Arc<Epoll>,
        backend: SharedBackend,
        endpoint: Endpoint,
        control: ControlSocket,
    ) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let rested = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        epoll.add(&rested, Events::EPOLLIN, RESTED)?;
        Ok(Self {
            epoll,
            backend,
            session: None,
            endpoint,
            watched: false,
            rested,
            resting: false,
            held: false,
            staged: None,
            control,
            abandoned: false,
            failure: None,
        })
    }

    /// Returns whether no other front-end can come.
    pub(super) fn is_last(&self) -> bool {
        self.endpoint.source().is_none()
    }

    /// Accepts the next front-end, if one waits and none is connected.
    pub(super) fn accept(&mut self) -> io::Result<()> {
        if self.session.is_some() || self.held {
            return Ok(());
        }
        let session = loop {
            let connection = match self.endpoint.next_frontend() {
                Ok(Some(connection)) => connection,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // The front-end is still in the backlog; the cause, such as a lack of descriptors, may pass.
                    limited!(warn, %error, "cannot accept a front-end now");
                    return self.rest(REST);
                }
            };
            match Session::new(&connection, &self.backend) {
                Ok(session) => break session,
                // Other front-ends can follow.
                Err(error) if self.endpoint.source().is_some() => {
                    limited!(warn, %error, "cannot serve a front-end");
                }
                Err(error) => return Err(error),
            }
        };
        self.epoll.add(&session, SESSION_EVENTS, SESSION)?;
        self.session = Some(session);
        Ok(())
    }

    /// Returns what the connection failed to do in time, if it must give way to another front-end that waits.
    pub(super) fn gives_way(&mut self) -> io::Result<Option<&'static str>> {
        if self.held {
            return Ok(None);
        }
        let Some(session) = &self.session else { return Ok(None) };
        if session.is_negotiated() {
            return Ok(None);
        }
        let (patience, what) = match session.begun() {
            false => (SILENCE, "sent no message"),
            true => (NEGOTIATION, "did not complete its negotiation"),
        };
        let left = patience.saturating_sub(session.age());
        if !left.is_zero() {
            self.rest(left)?;
            return Ok(None);
        }
        Ok(Some(what))
    }

    /// Stops watching the endpoint for `time`.
    fn rest(&mut self, time: Duration) -> io::Result<()> {
        self.resting = true;
        Ok(self.rested.set(Expiration::OneShot(time.into()), TimerSetTimeFlags::empty())?)
    }

    /// Accepts front-ends again after a rest.
    pub(super) fn on_rested(&mut self) -> io::Result<()> {
        self.rested.unset()?;
        self.resting = false;
        self.accept()
    }

    /// Watches the endpoint while a new front-end is of interest: without a session, or while the connection has not
    /// negotiated and may have to give way. Otherwise front-ends wait in the backlog.
    pub(super) fn watch_endpoint(&mut self) -> io::Result<()> {
        let free = match &self.session {
            Some(session) => !session.is_negotiated() && self.endpoint.listener().is_some(),
            None => true,
        };
        let wanted = free && !self.resting && !self.held;
        if let Some(source) = self.endpoint.source().filter(|_| wanted != self.watched) {
            if wanted {
                self.epoll.add(&source, Events::EPOLLIN, ENDPOINT)?;
            } else {
                self.epoll.remove(&source)?;
            }
            self.watched = wanted;
        }
        Ok(())
    }

    /// Closes the connection. Its rings must be stopped.
    pub(super) fn disconnect(&mut self) -> io::Result<()> {
        if let Some(session) = self.session.take() {
            self.epoll.remove(&session)?;
            session.close();
        }
        // The next front-end need not wait for this connection's time to give way.
        if self.resting { self.rest(Duration::from_nanos(1)) } else { Ok(()) }
    }

    /// Closes the connection, which another process may also hold, and stops watching the endpoint.
    fn forget(&mut self) {
        let session = self.session.take().map_or(Ok(()), |session| self.epoll.remove(&session));
        let endpoint = match self.endpoint.source() {
            Some(source) if std::mem::take(&mut self.watched) => self.epoll.remove(&source),
            _ => Ok(()),
        };
        if let Err(error) = session.and(endpoint) {
            limited!(warn, %error, "cannot stop watching the front-end");
        }
    }
}

impl FrontEnd for Front {
    fn connection(&self) -> Option<Connection<'_>> {
        let session = self.session.as_ref()?;
        Some(Connection { socket: session.as_fd(), begun: session.begun() })
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn hold(&mut self) {
        self.held = true;
    }

    fn resume(&mut self) {
        self.held = false;
    }

    fn release(&mut self) {
        self.forget();
        // The target owns the socket file and serves the next front-ends.
        self.endpoint.leave();
        self.endpoint = Endpoint::Nowhere;
    }

    fn stage(&mut self, connection: Option<(OwnedFd, Negotiated)>, endpoint: Endpoint) -> io::Result<()> {
        let session = connection
            .map(|(socket, negotiated)| Session::negotiated(&socket, &self.backend, negotiated))
            .transpose()?;
        self.staged = Some((session, endpoint));
        self.held = true;
        Ok(())
    }

    fn unstage(&mut self) {
        self.staged = None;
        self.held = false;
    }

    fn take(&mut self) {
        let Some((session, mut endpoint)) = self.staged.take() else { return };
        self.forget();
        endpoint.own();
        self.endpoint = endpoint;
        self.held = false;
        // Before the source learns that it may end, so that a process always listens at the path.
        self.control.take();
        if let Some(session) = session {
            self.failure = self.epoll.add(&session, SESSION_EVENTS, SESSION).err();
            self.session = Some(session);
        }
    }

    fn abandon(&mut self) {
        limited!(warn, "the source took the session back, ending");
        self.abandoned = true;
    }
}
