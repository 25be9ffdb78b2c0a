//! The event loop: one thread that waits for front-ends, their messages, control requests and signals, and never
//! touches a frame.

pub mod live;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_channel::peer::Peer;
use baton_control::{error_chain, limited};
use baton_protocol::control::{Done, Request};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::control::{self, Call};
use crate::dataplane::worker::WorkerNews;
use crate::device::{Device, DeviceError};
use crate::dispatch::{Dispatch, Rejection};
use crate::endpoint::Endpoint;
use crate::events::{Epoll, Events, Ready};
use crate::handover::live::Live;
use crate::handover::{Departure, Handover, LastWork};
use crate::mailbox::Mailbox;
use crate::session::{Progress, Session, SessionEnd};
use crate::sigbus;
use live::ControlPlace;

const SIGNAL: u64 = 0;
const ENDPOINT: u64 = 1;
const SESSION: u64 = 2;
const CALL: u64 = 3;
const NEWS: u64 = 4;
const ALARM: u64 = 5;
const RESTED: u64 = 6;
const HANDOVER: u64 = 7;
const LIVE: u64 = 8;

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

/// Why the back-end ended when it should not.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The device is of no more use.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A worker thread ended.
    #[error("the worker of queue pair {pair} failed")]
    Worker {
        /// The queue pair.
        pair: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system would not.
    #[error("the event loop failed")]
    System(#[from] io::Error),
}

/// The back-end as a whole.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    // Declared before the control server: its clients' threads wait for answers until the mailbox is gone.
    calls: Mailbox<Call>,
    news: Mailbox<WorkerNews>,
    signals: SignalFd,
    /// Runs while no front-end is accepted.
    rested: TimerFd,
    resting: bool,
    session: Option<Session>,
    endpoint: Endpoint,
    /// Whether `epoll` has the endpoint.
    watched: bool,
    dispatch: Arc<Mutex<Dispatch>>,
    /// Memory of the session was truncated.
    struck: bool,
    /// The hand-over of the session, which is all of the above.
    live: Live,
    control: ControlPlace,
    /// Whether to end, with exit code 0.
    ending: bool,
}

/// Blocks the signals that end the process, in this thread and those it makes; they come through the event loop.
///
/// # Errors
/// What `pthread_sigmask(3)` or `signalfd(2)` fails with.
pub fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

impl Server {
    /// A server of `device` for the front-ends that come from `endpoint`.
    ///
    /// # Errors
    /// [`ServerError::System`].
    pub fn new(
        device: Device,
        handover: Handover,
        endpoint: Endpoint,
        control: ControlPlace,
        calls: Mailbox<Call>,
        news: Mailbox<WorkerNews>,
        signals: SignalFd,
    ) -> Result<Self, ServerError> {
        let epoll = Epoll::new()?;
        epoll.add(&signals, Events::EPOLLIN, SIGNAL)?;
        epoll.add(&calls, Events::EPOLLIN, CALL)?;
        epoll.add(&news, Events::EPOLLIN, NEWS)?;
        epoll.add(&handover, Events::EPOLLIN, HANDOVER)?;
        epoll.add(&sigbus::install()?, Events::EPOLLIN, ALARM)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let rested = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(io::Error::from)?;
        epoll.add(&rested, Events::EPOLLIN, RESTED)?;
        let live = Live::new()?;
        epoll.add(&live, Events::EPOLLIN, LIVE)?;
        let dispatch = Arc::new(Mutex::new(Dispatch::new(device, handover)));
        Ok(Self {
            epoll,
            calls,
            news,
            signals,
            rested,
            resting: false,
            session: None,
            endpoint,
            watched: false,
            dispatch,
            struck: false,
            live,
            control,
            ending: false,
        })
    }

    /// Serves until told to end. Gives, besides how it ended, what is to be run then by whoever owned the TAP last.
    pub fn run(mut self) -> (Result<(), ServerError>, Option<LastWork>) {
        let served = self.serve();
        // However that ended: whose the session is must be said before anything is cleaned up for its last owner.
        let result = served.and(self.end_live()).and_then(|()| self.end_session(Departure::Ending));
        let finished = {
            let dispatch = &mut *lock(&self.dispatch);
            dispatch.handover.finish(&mut dispatch.device)
        };
        drop(self.calls);
        self.control.stop();
        match finished {
            Ok(last_work) => (result, last_work),
            Err(error) => (result.and(Err(error.into())), None),
        }
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        self.meet()?;
        let mut ready = Ready::<8>::default();
        let mut progress = Progress::Waiting;
        while !self.ending {
            self.watch_endpoint()?;
            let timeout = if progress == Progress::More { 0 } else { self.timeout() };
            let mut look = progress == Progress::More;
            let mut contested = false;
            let held = self.live.holds_front();
            for (token, _) in self.epoll.wait(timeout, &mut ready)? {
                match token {
                    SIGNAL => self.on_signal()?,
                    ENDPOINT if self.session.is_some() => contested = true,
                    ENDPOINT => self.meet()?,
                    SESSION => look = true,
                    CALL => self.on_calls()?,
                    NEWS => self.on_news()?,
                    HANDOVER => {
                        let dispatch = &mut *lock(&self.dispatch);
                        dispatch.handover.progress(&mut dispatch.device)?;
                        // A message may have waited for a transfer's end.
                        look = true;
                    }
                    LIVE => self.on_live()?,
                    RESTED => self.on_rested()?,
                    _ => self.on_alarm()?,
                }
            }
            self.welcome()?;
            if held && !self.live.holds_front() {
                // What came meanwhile nobody tells of again.
                look = true;
                self.part_from_truncated()?;
            }
            // The connection may have spoken at the same time.
            progress = if look || contested { self.talk()? } else { Progress::Waiting };
            if contested {
                self.replace_silent()?;
            }
            let released = {
                let dispatch = &mut *lock(&self.dispatch);
                dispatch.settle()?;
                let device = &mut dispatch.device;
                let settled = if self.live.holds_front() { Ok(()) } else { device.settle_queues() };
                settled.and_then(|()| device.release())
            };
            if let Err(error) = released {
                self.part(SessionEnd::Device(error.into()))?;
            }
            let dispatch = lock(&self.dispatch);
            self.ending |= self.session.is_none() && dispatch.handover.is_done();
            self.ending |= self.live.is_done();
            let owner = dispatch.device.tap().is_some();
            drop(dispatch);
            if owner {
                self.control.take();
            }
        }
        Ok(())
    }

    /// For how many milliseconds to wait for an event.
    fn timeout(&self) -> i32 {
        let due = lock(&self.dispatch).device.queues_settle().filter(|_| !self.live.holds_front());
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        left.map_or(-1, |left| {
            i32::try_from(left.as_millis()).map_or(i32::MAX, |left| left.saturating_add(1))
        })
    }

    /// Takes the next front-end, if there is one and none is here.
    fn meet(&mut self) -> Result<(), ServerError> {
        if self.session.is_some() || self.live.holds_front() {
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
            match Session::new(&connection, Arc::clone(&self.dispatch)) {
                Ok(session) => break session,
                // There are others to come.
                Err(error) if self.endpoint.source().is_some() => {
                    limited!(warn, %error, "cannot serve a front-end");
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.epoll.add(&session, SESSION_EVENTS, SESSION)?;
        lock(&self.dispatch).handover.set_frontend_trusted(Peer::trusted(&session).is_ok());
        self.session = Some(session);
        Ok(())
    }

    /// Another front-end waits: drops the connection that has sent nothing, or not negotiated, in its time.
    fn replace_silent(&mut self) -> Result<(), ServerError> {
        if self.live.holds_front() {
            return Ok(());
        }
        let Some(session) = &self.session else { return Ok(()) };
        if session.is_negotiated() {
            return Ok(());
        }
        let (patience, what) = match session.begun() {
            false => (SILENCE, "sent no message"),
            true => (NEGOTIATION, "stopped before it had negotiated"),
        };
        let left = patience.saturating_sub(session.age());
        if !left.is_zero() {
            return self.rest(left);
        }
        limited!(info, "dropped a connection that {what}: another front-end waits");
        self.end_session(Departure::CutOff)?;
        self.meet()
    }

    /// Leaves the endpoint alone for a while.
    fn rest(&mut self, time: Duration) -> Result<(), ServerError> {
        self.resting = true;
        let rest = Expiration::OneShot(time.into());
        self.rested.set(rest, TimerSetTimeFlags::empty()).map_err(io::Error::from)?;
        Ok(())
    }

    fn on_rested(&mut self) -> Result<(), ServerError> {
        self.rested.unset().map_err(io::Error::from)?;
        self.resting = false;
        self.meet()
    }

    /// Watches the endpoint while a front-end that comes may be accepted. While a session runs, front-ends wait in the
    /// backlog; a connection that has not negotiated yet may have to give way.
    fn watch_endpoint(&mut self) -> Result<(), ServerError> {
        let free = match &self.session {
            Some(session) => !session.is_negotiated() && self.endpoint.listener().is_some(),
            None => true,
        };
        let wanted = free && !self.resting && !self.live.holds_front();
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

    /// Serves the front-end's messages.
    fn talk(&mut self) -> Result<Progress, ServerError> {
        if self.live.holds_front() {
            return Ok(Progress::Waiting);
        }
        let Some(session) = &mut self.session else { return Ok(Progress::Waiting) };
        let before = session.begun();
        let result = session.progress();
        if !before && session.begun() {
            limited!(info, "front-end connected");
            let dispatch = &mut *lock(&self.dispatch);
            dispatch.handover.frontend_came(&mut dispatch.device)?;
        }
        match result {
            Ok(progress) => Ok(progress),
            Err(end) => {
                self.part(end)?;
                Ok(Progress::Waiting)
            }
        }
    }

    /// The front-end has left, or has to.
    fn part(&mut self, end: SessionEnd) -> Result<(), ServerError> {
        let begun = self.session.as_ref().is_some_and(Session::begun);
        let departure = end.departure();
        match end {
            SessionEnd::Left if !begun => tracing::debug!("a connection was closed without a word"),
            SessionEnd::Left => limited!(info, "front-end disconnected"),
            SessionEnd::Device(Rejection::Device(error @ DeviceError::Dead(_))) => return Err(error.into()),
            end => {
                limited!(warn, error = error_chain(&end), "front-end's session ended");
            }
        }
        if self.endpoint.source().is_none() {
            self.ending = true;
            return self.end_session(Departure::Ending);
        }
        self.end_session(departure)?;
        self.meet()
    }

    fn end_session(&mut self, departure: Departure) -> Result<(), ServerError> {
        if let Some(session) = self.session.take() {
            // First the rings, then the connection: who sees it closed finds nothing running.
            let dispatch = &mut *lock(&self.dispatch);
            dispatch.device.end_session()?;
            if session.begun() {
                dispatch.handover.frontend_left(&mut dispatch.device, departure)?;
            }
            // With the workers parked and the memory gone: a fault of this session's must not end the next one.
            sigbus::take_struck();
            self.struck = false;
            self.epoll.remove(&session)?;
        }
        // The next one need not wait until this one would have had to give way.
        if self.resting { self.rest(Duration::from_nanos(1)) } else { Ok(()) }
    }

    fn on_signal(&mut self) -> Result<(), ServerError> {
        if let Some(signal) = self.signals.read_signal().map_err(io::Error::from)? {
            tracing::info!(signal = signal.ssi_signo, "ending on a signal");
            self.ending = true;
        }
        Ok(())
    }

    fn on_calls(&mut self) -> Result<(), ServerError> {
        while let Some(call) = self.calls.take() {
            let connected = self.session.as_ref().is_some_and(Session::begun);
            let mut dispatch = lock(&self.dispatch);
            let Dispatch { device, handover, .. } = &mut *dispatch;
            let answer = match &call.request {
                Request::Status => {
                    let live = self.live.status();
                    let handover = if self.live.peer().is_some() { live } else { handover.status().or(live) };
                    control::answer(&control::status(device, handover, connected))
                }
                Request::Handover { cancel: true, .. } if self.live.peer().is_some() => {
                    drop(dispatch);
                    let answer = self.cancel_live()?;
                    call.answer(answer);
                    continue;
                }
                Request::Handover { cancel: true, .. } => handover.cancel(device)?,
                Request::Handover { path: None, .. } => {
                    Err(control::refusal("say where the other back-end waits: its --incoming-fds"))
                }
                Request::Handover { path: Some(path), on_suspend: false, dry_run, .. } => {
                    let (path, dry_run) = (PathBuf::from(path), *dry_run);
                    match handover.check_live(device) {
                        Ok(()) => {
                            drop(dispatch);
                            self.begin_live(&path, dry_run, call)?;
                            continue;
                        }
                        Err(error) => Err(control::refusal(error.to_string())),
                    }
                }
                Request::Handover { path: Some(path), dry_run, .. } => {
                    let (path, dry_run) = (PathBuf::from(path), *dry_run);
                    handover.begin(device, &path, dry_run, call)?;
                    continue;
                }
                Request::Stats => control::answer(&control::stats(device)),
                Request::Quit => {
                    self.ending = true;
                    control::answer(&Done::DONE)
                }
                Request::Pause | Request::Resume | Request::Migrate { .. } => {
                    Err(control::refusal("this is a back-end: only a VMM is paused, resumed and migrated"))
                }
            };
            drop(dispatch);
            call.answer(answer);
        }
        Ok(())
    }

    fn on_news(&self) -> Result<(), ServerError> {
        match self.news.take() {
            Some(WorkerNews::Failed { pair, error }) => Err(ServerError::Worker { pair, source: error }),
            None => Ok(()),
        }
    }

    fn on_alarm(&mut self) -> Result<(), ServerError> {
        self.struck |= sigbus::take_struck();
        if self.struck && self.session.is_some() {
            // The target must not go on with it.
            self.cancel_live().map(drop)?;
        }
        self.part_from_truncated()
    }

    /// Ends the session whose memory was truncated, if there is one. One that is the target's now is left alone: there
    /// it will be found out, too.
    fn part_from_truncated(&mut self) -> Result<(), ServerError> {
        if self.live.holds_front() {
            return Ok(());
        }
        if std::mem::take(&mut self.struck) && self.session.is_some() {
            self.part(SessionEnd::MemoryTruncated)?;
        }
        Ok(())
    }
}

fn lock(dispatch: &Mutex<Dispatch>) -> MutexGuard<'_, Dispatch> {
    dispatch.lock().unwrap_or_else(PoisonError::into_inner)
}
