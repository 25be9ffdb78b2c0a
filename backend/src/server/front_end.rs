//! The front-end's connection, the endpoint that front-ends come from and the control socket: accepted, watched, given to
//! another process and taken from one.

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

/// What a front-end's connection is watched for.
const SESSION_EVENTS: Events =
    Events::EPOLLIN.union(Events::EPOLLOUT).union(Events::EPOLLRDHUP).union(Events::EPOLLET);

/// How long to leave front-ends waiting that cannot be accepted, for want of descriptors, say.
const REST: Duration = Duration::from_millis(100);

/// How long a connection may stay silent while another front-end waits. One that has just come is no less welcome than
/// the next.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a front-end may take to negotiate while another one waits: it takes milliseconds.
const NEGOTIATION: Duration = Duration::from_secs(5);

/// The connection and the endpoint.
#[derive(Debug)]
pub(super) struct Front {
    epoll: Arc<Epoll>,
    backend: SharedBackend,
    /// The connection.
    pub session: Option<Session>,
    endpoint: Endpoint,
    /// Whether `epoll` has the endpoint.
    watched: bool,
    /// Runs while no front-end is accepted.
    rested: TimerFd,
    resting: bool,
    /// A hand-over of the session leaves the front-end's messages, and other front-ends, in their sockets.
    pub held: bool,
    /// What another process is about to hand over.
    staged: Option<(Option<Session>, Endpoint)>,
    /// The control socket.
    pub control: ControlSocket,
    /// Another process has taken the session back.
    pub abandoned: bool,
    /// A front-end that was taken cannot be watched.
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

    /// Whether no other front-end will come.
    pub(super) fn is_last(&self) -> bool {
        self.endpoint.source().is_none()
    }

    /// Accepts the next front-end, if there is one and none is connected.
    pub(super) fn accept(&mut self) -> io::Result<()> {
        if self.session.is_some() || self.held {
            return Ok(());
        }
        let session = loop {
            let connection = match self.endpoint.next_frontend() {
                Ok(Some(connection)) => connection,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // The connection is still there to be accepted; what is missing may come back.
                    limited!(warn, %error, "cannot accept a front-end now");
                    return self.rest(REST);
                }
            };
            match Session::new(&connection, &self.backend) {
                Ok(session) => break session,
                // There are others to come.
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

    /// Another front-end waits: what the connection has not done in its time, if it is to give way.
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
            true => (NEGOTIATION, "stopped before it had negotiated"),
        };
        let left = patience.saturating_sub(session.age());
        if !left.is_zero() {
            self.rest(left)?;
            return Ok(None);
        }
        Ok(Some(what))
    }

    /// Leaves the endpoint alone for a while.
    fn rest(&mut self, time: Duration) -> io::Result<()> {
        self.resting = true;
        Ok(self.rested.set(Expiration::OneShot(time.into()), TimerSetTimeFlags::empty())?)
    }

    /// The while is over.
    pub(super) fn on_rested(&mut self) -> io::Result<()> {
        self.rested.unset()?;
        self.resting = false;
        self.accept()
    }

    /// Watches the endpoint while a front-end that comes may be accepted. While a session runs, front-ends wait in the
    /// backlog; a connection that has not negotiated yet may have to give way.
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

    /// Closes the connection, whose rings have stopped.
    pub(super) fn disconnect(&mut self) -> io::Result<()> {
        if let Some(session) = self.session.take() {
            self.epoll.remove(&session)?;
            session.close();
        }
        // The next one need not wait until this one would have had to give way.
        if self.resting { self.rest(Duration::from_nanos(1)) } else { Ok(()) }
    }

    /// Closes the connection, which another process may hold, and looks for none.
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
        // Its file and its front-ends are the target's.
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
        // Before the source learns that it may end: its path is never without a socket.
        self.control.take();
        if let Some(session) = session {
            self.failure = self.epoll.add(&session, SESSION_EVENTS, SESSION).err();
            self.session = Some(session);
        }
    }

    fn abandon(&mut self) {
        limited!(warn, "the source has taken the session back: this process ends");
        self.abandoned = true;
    }
}
