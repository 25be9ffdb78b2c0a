//! The event loop's part in a hand-over of the session: it has the front-end, which is let go of or taken, and the
//! control socket, which may be taken over.

use std::path::{Path, PathBuf};

use baton_channel::peer::Peer;
use baton_control::server::ControlServer;
use baton_control::{error_chain, limited};

use super::{SESSION, SESSION_EVENTS, Server, ServerError, lock};
use crate::control::{self, Answer, Call};
use crate::endpoint::Endpoint;
use crate::handover::error::HandoverError;
use crate::handover::live::{Around, Front, Outcome};
use crate::mailbox::Mailer;

/// The control socket, or what becomes of it.
#[derive(Debug)]
pub enum ControlPlace {
    /// There is none.
    None,
    /// It is served.
    Served(ControlServer),
    /// Another process has it, and this one takes it over together with the device.
    Anothers {
        /// Its path.
        path: PathBuf,
        /// Where requests go.
        calls: Mailer<Call>,
    },
}

impl ControlPlace {
    /// Takes the socket over, if it is another process' still.
    pub(super) fn take(&mut self) {
        let Self::Anothers { path, calls } = self else { return };
        *self = match control::take_place(path, calls.clone()) {
            Ok(server) => Self::Served(server),
            Err(error) => {
                tracing::error!(error = error_chain(&error), "there is no control socket");
                Self::None
            }
        };
    }

    /// Stops serving it, once the replies already made have gone out.
    pub(super) fn stop(self) {
        if let Self::Served(server) = self {
            server.stop();
        }
    }
}

/// What a hand-over sees of a server. Not a method: the hand-over itself is the server's, too.
macro_rules! around {
    ($server:expr) => {
        Around {
            front: Front { session: $server.session.as_ref(), endpoint: &$server.endpoint },
            dispatch: &$server.dispatch,
        }
    };
}

impl Server {
    /// Does what there is to do for the hand-over.
    pub(super) fn on_live(&mut self) -> Result<(), ServerError> {
        let outcomes = self.live.progress(around!(self))?;
        self.follow(outcomes)
    }

    /// Hears a source that has just come.
    pub(super) fn welcome(&mut self) -> Result<(), ServerError> {
        let (arrived, wishes) = {
            let handover = &mut lock(&self.dispatch).handover;
            match handover.take_arrived() {
                Some(arrived) => (arrived, handover.wishes().clone()),
                None => return Ok(()),
            }
        };
        let outcomes = self.live.arrived(around!(self), wishes, arrived)?;
        self.follow(outcomes)
    }

    /// Hands the session over to who waits at `path`.
    pub(super) fn begin_live(&mut self, path: &Path, dry_run: bool, call: Call) -> Result<(), ServerError> {
        let outcomes = self.live.begin(around!(self), path, dry_run, call)?;
        self.follow(outcomes)
    }

    /// Ends the hand-over that this process began, if it can.
    pub(super) fn cancel_live(&mut self) -> Result<Answer, ServerError> {
        match self.live.cancel(around!(self))? {
            Some((answer, outcomes)) => {
                self.follow(outcomes)?;
                Ok(answer)
            }
            None => Ok(Err(control::refusal(HandoverError::NotUnderWay.to_string()))),
        }
    }

    /// The process ends.
    pub(super) fn end_live(&mut self) -> Result<(), ServerError> {
        let outcomes = self.live.finish(around!(self))?;
        self.follow(outcomes)
    }

    fn follow(&mut self, outcomes: Vec<Outcome>) -> Result<(), ServerError> {
        for outcome in outcomes {
            match outcome {
                Outcome::Resumed => self.meet()?,
                Outcome::Released => {
                    self.forget_front();
                    // Its file and its front-ends are the target's.
                    self.endpoint.leave();
                    self.endpoint = Endpoint::Nowhere;
                }
                Outcome::Taken { session, endpoint } => {
                    self.forget_front();
                    self.endpoint = endpoint;
                    self.control.take();
                    match session {
                        Some(session) => {
                            self.epoll.add(&*session, SESSION_EVENTS, SESSION)?;
                            lock(&self.dispatch)
                                .handover
                                .set_frontend_trusted(Peer::trusted(&*session).is_ok());
                            self.session = Some(*session);
                        }
                        None => self.meet()?,
                    }
                }
                Outcome::Abandoned => {
                    limited!(warn, "the source has taken the session back: this process ends");
                    self.ending = true;
                }
            }
        }
        self.live.settle();
        lock(&self.dispatch).handover.set_live(self.live.peer());
        Ok(())
    }

    /// Closes the front-end's connection, which another process may hold, and looks for none.
    fn forget_front(&mut self) {
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
