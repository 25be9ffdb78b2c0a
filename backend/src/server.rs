//! The event loop: one thread that handles front-ends, their messages, hand-overs, control requests and signals. It
//! never moves a frame.

pub mod control_socket;
mod front_end;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use baton_control::{error_chain, limited};
use baton_protocol::control::{Done, Request};
use baton_protocol::handover::prologue::Purpose;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::control::{self, Call};
use crate::dataplane::failures::WorkerFailure;
use crate::device::{Device, DeviceError};
use crate::dispatch::Rejection;
use crate::endpoint::Endpoint;
use crate::event_channel::EventReceiver;
use crate::events::{Epoll, Events, Ready};
use crate::handover::{Departure, FinalScript, Handovers};
use crate::session::{Progress, Session, SessionEnd};
use crate::shared::{Backend, SharedBackend};
use crate::sigbus;
use control_socket::ControlSocket;
use front_end::Front;

const SIGNAL: u64 = 0;
const ENDPOINT: u64 = 1;
const SESSION: u64 = 2;
const CALL: u64 = 3;
const FAILURE: u64 = 4;
const ALARM: u64 = 5;
const RESTED: u64 = 6;
const HANDOVER: u64 = 7;

/// Why the back-end failed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A worker thread failed.
    #[error("the worker of queue pair {pair} failed")]
    Worker {
        /// The queue pair.
        pair: u16,
        /// The worker's error.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("the event loop failed")]
    System(#[from] io::Error),
}

/// The whole back-end.
#[derive(Debug)]
pub struct Server {
    epoll: Arc<Epoll>,
    // Dropped before the control server, whose client threads wait for answers until the receiver is gone.
    calls: EventReceiver<Call>,
    failures: EventReceiver<WorkerFailure>,
    signals: SignalFd,
    front: Front,
    backend: SharedBackend,
    /// The front-end truncated the session's memory.
    memory_truncated: bool,
    /// Whether to end, with exit code 0.
    ending: bool,
}

/// Blocks SIGTERM and SIGINT in this thread and the threads that it creates. Returns the descriptor on which the event
/// loop receives them.
///
/// # Errors
/// Returns an error if `pthread_sigmask(3)` or `signalfd(2)` fails.
pub fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

impl Server {
    /// Creates a server of `device` for the front-ends of `endpoint`.
    ///
    /// # Errors
    /// Returns an error if a descriptor cannot be created or watched.
    pub fn new(
        device: Device,
        handovers: Handovers,
        endpoint: Endpoint,
        control: ControlSocket,
        calls: EventReceiver<Call>,
        failures: EventReceiver<WorkerFailure>,
        signals: SignalFd,
    ) -> Result<Self, ServerError> {
        let epoll = Arc::new(Epoll::new()?);
        epoll.add(&signals, Events::EPOLLIN, SIGNAL)?;
        epoll.add(&calls, Events::EPOLLIN, CALL)?;
        epoll.add(&failures, Events::EPOLLIN, FAILURE)?;
        epoll.add(&handovers, Events::EPOLLIN, HANDOVER)?;
        epoll.add(&sigbus::install()?, Events::EPOLLIN, ALARM)?;
        let backend = SharedBackend::new(device, handovers);
        let front = Front::new(Arc::clone(&epoll), backend.clone(), endpoint, control)?;
        Ok(Self { epoll, calls, failures, signals, front, backend, memory_truncated: false, ending: false })
    }

    /// Serves until told to end. Returns the result, and the downscript to run if this process owned the TAP last.
    pub fn run(mut self) -> (Result<(), ServerError>, Option<FinalScript>) {
        let served = self.serve();
        // Even after an error, settle who owns the session before the cleanup, which only the last owner may do.
        let handed_over = {
            let Backend { device, handovers } = &mut *self.backend.lock();
            handovers.end_session(device, &mut self.front)
        };
        let result =
            served.and(handed_over.map_err(Into::into)).and_then(|()| self.end_session(Departure::Ending));
        let finished = {
            let Backend { device, handovers } = &mut *self.backend.lock();
            handovers.finish(device)
        };
        drop(self.calls);
        self.front.control.stop();
        match finished {
            Ok(final_script) => (result, final_script),
            Err(error) => (result.and(Err(error.into())), None),
        }
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        self.front.accept()?;
        let mut ready = Ready::<8>::default();
        let mut progress = Progress::Waiting;
        while !self.ending {
            self.front.watch_endpoint()?;
            let timeout = if progress == Progress::More { 0 } else { self.timeout() };
            let mut look = progress == Progress::More;
            let mut contested = false;
            let held = self.front.held;
            for (token, _) in self.epoll.wait(timeout, &mut ready)? {
                match token {
                    SIGNAL => self.on_signal()?,
                    ENDPOINT if self.front.session.is_some() => contested = true,
                    ENDPOINT => self.front.accept()?,
                    SESSION => look = true,
                    CALL => self.on_calls()?,
                    FAILURE => self.on_failure()?,
                    HANDOVER => {
                        let Backend { device, handovers } = &mut *self.backend.lock();
                        handovers.progress(device, &mut self.front)?;
                        // A CHECK_DEVICE_STATE may have waited for the end of a transfer.
                        look = true;
                    }
                    RESTED => self.front.on_rested()?,
                    _ => self.on_alarm()?,
                }
            }
            if let Some(error) = self.front.failure.take() {
                return Err(error.into());
            }
            if held && !self.front.held {
                // Events that arrived while the session was held are not reported again.
                look = true;
                self.front.accept()?;
                self.end_truncated_session()?;
            }
            // If the connection is contested, read it first: a message may have arrived at the same time.
            progress = if look || contested { self.hear()? } else { Progress::Waiting };
            if contested && let Some(what) = self.front.gives_way()? {
                limited!(info, "dropped a connection that {what}: another front-end is waiting");
                self.end_session(Departure::CutOff)?;
                self.front.accept()?;
            }
            let released = {
                let Backend { device, handovers } = &mut *self.backend.lock();
                handovers.settle(device)?;
                let settled = if self.front.held { Ok(()) } else { device.settle_queues() };
                settled.and_then(|()| device.release())
            };
            if let Err(error) = released {
                self.disconnect(SessionEnd::Device(error.into()))?;
            }
            let Backend { device, handovers } = &*self.backend.lock();
            self.ending |= self.front.session.is_none() && handovers.is_done() || self.front.abandoned;
            if device.tap().is_some() {
                self.front.control.take();
            }
        }
        Ok(())
    }

    /// Returns how long to wait for an event, in milliseconds; −1 means no limit.
    fn timeout(&self) -> i32 {
        let due = self.backend.lock().device.queues_settle().filter(|_| !self.front.held);
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        left.map_or(-1, |left| {
            i32::try_from(left.as_millis()).map_or(i32::MAX, |left| left.saturating_add(1))
        })
    }

    /// Handles the front-end's messages, unless a hand-over holds the session.
    fn hear(&mut self) -> Result<Progress, ServerError> {
        if self.front.held {
            return Ok(Progress::Waiting);
        }
        let Some(session) = &mut self.front.session else { return Ok(Progress::Waiting) };
        let before = session.begun();
        let result = session.progress();
        if !before && session.begun() {
            limited!(info, "front-end connected");
            let Backend { device, handovers } = &mut *self.backend.lock();
            handovers.frontend_came(device)?;
        }
        match result {
            Ok(progress) => Ok(progress),
            Err(end) => {
                self.disconnect(end)?;
                Ok(Progress::Waiting)
            }
        }
    }

    /// Ends the session for the reason `end`. Then accepts the next front-end, or ends the process if none can come.
    fn disconnect(&mut self, end: SessionEnd) -> Result<(), ServerError> {
        let begun = self.front.session.as_ref().is_some_and(Session::begun);
        let departure = end.departure();
        match end {
            SessionEnd::Left if !begun => tracing::debug!("connection closed before its first message"),
            SessionEnd::Left => limited!(info, "front-end disconnected"),
            SessionEnd::Device(Rejection::Device(error @ DeviceError::Dead(_))) => return Err(error.into()),
            end => {
                limited!(warn, error = error_chain(&end), "front-end's session ended");
            }
        }
        if self.front.is_last() {
            self.ending = true;
            return self.end_session(Departure::Ending);
        }
        self.end_session(departure)?;
        Ok(self.front.accept()?)
    }

    fn end_session(&mut self, departure: Departure) -> Result<(), ServerError> {
        if let Some(session) = &self.front.session {
            // Stop the rings before closing the connection: once the front-end sees it closed, no ring runs.
            let Backend { device, handovers } = &mut *self.backend.lock();
            device.end_session()?;
            if session.begun() {
                handovers.frontend_left(device, departure)?;
            }
            // The workers are parked and the memory is unmapped. A truncation in this session must not end the next.
            sigbus::take_truncation();
            self.memory_truncated = false;
        }
        Ok(self.front.disconnect()?)
    }

    fn on_signal(&mut self) -> Result<(), ServerError> {
        if let Some(signal) = self.signals.read_signal().map_err(io::Error::from)? {
            tracing::info!(signal = signal.ssi_signo, "received a signal, ending");
            self.ending = true;
        }
        Ok(())
    }

    fn on_calls(&mut self) -> Result<(), ServerError> {
        while let Some(call) = self.calls.take() {
            let connected = self.front.session.as_ref().is_some_and(Session::begun);
            let Backend { device, handovers } = &mut *self.backend.lock();
            let answer = match &call.request {
                Request::Status => control::answer(&control::status(device, handovers.status(), connected)),
                Request::Handover { cancel: true, .. } => handovers.cancel(device, &mut self.front)?,
                Request::Handover { path: None, .. } => {
                    Err(control::refusal("no path given: use the --incoming-fds path of the other back-end"))
                }
                Request::Handover { path: Some(path), on_suspend, .. } => {
                    let purpose = if *on_suspend { Purpose::Device } else { Purpose::Session };
                    let path = Path::new(path).to_owned();
                    handovers.begin(device, &mut self.front, purpose, &path, call);
                    continue;
                }
                Request::Stats => control::answer(&control::stats(device)),
                Request::Quit => {
                    self.ending = true;
                    control::answer(&Done::DONE)
                }
                Request::Pause | Request::Resume | Request::Migrate { .. } => {
                    Err(control::refusal("this is a back-end: only a VMM can pause, resume and migrate"))
                }
            };
            call.answer(answer);
        }
        Ok(())
    }

    fn on_failure(&self) -> Result<(), ServerError> {
        match self.failures.take() {
            Some(WorkerFailure { pair, error }) => Err(ServerError::Worker { pair, source: error }),
            None => Ok(()),
        }
    }

    fn on_alarm(&mut self) -> Result<(), ServerError> {
        self.memory_truncated |= sigbus::take_truncation();
        if self.memory_truncated && self.front.session.is_some() {
            // The target must not take a session with truncated memory.
            let Backend { device, handovers } = &mut *self.backend.lock();
            handovers.cancel_session(device, &mut self.front)?;
        }
        self.end_truncated_session()
    }

    /// Ends the session if its memory was truncated. Leaves a session alone that a hand-over holds: it may be the
    /// target's, which notices the truncation, too.
    fn end_truncated_session(&mut self) -> Result<(), ServerError> {
        if self.front.held {
            return Ok(());
        }
        if std::mem::take(&mut self.memory_truncated) && self.front.session.is_some() {
            self.disconnect(SessionEnd::MemoryTruncated)?;
        }
        Ok(())
    }
}
