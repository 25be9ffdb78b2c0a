//! Hand-overs to and from another back-end: of the device while its rings are stopped ([`device`]), or of the running
//! session ([`session`]). Carries out what the state machines in [`baton_protocol::handover`] decide.
//!
//! [`Handovers`] has one role at a time (`role.rs`), with one connection, one timer and one clock:
//!
//! ```text
//!           begin                 both agree
//!   Idle ──────────▶ Asking ─────────────────▶ DeviceSource, SessionSource
//!     ▲ └──────────▶ Answering ──────────────▶ DeviceTarget, SessionTarget
//!     │  a source connects                         │
//!     └──────────── end, status in `last` ─────────┘
//! ```
//! A front-end that moves device state itself skips the prologue ([`device_state`]). A source that has handed over
//! keeps its role until the process ends.
//!
//! Everything runs in the event loop, which watches [`Handovers`] like any other descriptor and calls
//! [`Handovers::settle`] after every event that may have started or stopped a ring. The event loop owns the front-end's
//! connection; a hand-over accesses it through [`session::FrontEnd`].

pub mod agreed;
pub mod device;
pub mod device_state;
pub mod error;
pub mod incoming;
pub mod options;
pub mod prologue;
mod role;
pub mod session;
pub mod transfer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_channel::message_socket::MessageSocket;
use baton_channel::peer::{Peer, PeerProcess};
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus};
use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::prologue::Purpose;
use baton_protocol::handover::wire::refusal::Refusal;
use nix::sys::time::TimeSpec;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;

use crate::control::{self, Answer, Call};
use crate::device::{Device, DeviceError};
use crate::event_channel::{EventReceiver, event_channel};
use crate::events::{Epoll, Events, Ready, Watched};
use error::{HandoverError, IncomingError};
use incoming::Incoming;
use options::TargetOptions;
use prologue::{Answering, Asking};
use role::Role;
use session::FrontEnd;
use transfer::{Finished, Threads, Transfer};

// Epoll tokens, in the order of handling: the peer's messages, its death, a new source, a transfer, the timer.
const LINK: u64 = 0;
const PROCESS: u64 = 1;
const INCOMING: u64 = 2;
const TRANSFER: u64 = 3;
const TIMER: u64 = 4;

/// The program's name and version in HELLO.
const PROGRAM: &str = concat!("baton-backend ", env!("CARGO_PKG_VERSION"));

/// The target's name for its source, which has no path.
const SOURCE_NAME: &str = "the source";

/// The program that the last owner of the TAP runs at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinalScript {
    /// The downscript.
    pub script: PathBuf,
    /// The TAP's name, its argument.
    pub tap: String,
}

/// Why a front-end's session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The front-end closed the connection.
    Left,
    /// This process closed the connection, because of an invalid message or a lack of resources. The front-end may
    /// already have its VM, and connects again for the device.
    CutOff,
    /// This process ends.
    Ending,
}

/// Everything that a hand-over acts on.
#[derive(Debug)]
pub struct Context<'a> {
    /// The device.
    pub device: &'a mut Device,
    /// The front-end.
    pub front: &'a mut dyn FrontEnd,
    /// The target's options from the command line.
    pub options: &'a TargetOptions,
    /// The front-end's own transfer of device state.
    pub transfer: &'a mut Transfer,
    /// Watches the descriptors of a hand-over.
    pub epoll: &'a Arc<Epoll>,
}

/// The hand-overs of this process. The descriptor is readable while [`Handovers::progress`] has work.
#[derive(Debug)]
pub struct Handovers {
    epoll: Arc<Epoll>,
    timer: TimerFd,
    /// The time for which the timer is set.
    due: Option<Duration>,
    options: TargetOptions,
    incoming: Option<Incoming>,
    role: Role,
    /// The final status of the last hand-over that left the device or session here.
    last: Option<HandoverStatus>,
    transfer: Transfer,
    threads: Threads,
    finished: EventReceiver<Finished>,
}

impl AsFd for Handovers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.epoll).as_fd()
    }
}

/// Returns the time of `CLOCK_MONOTONIC`, which all processes share.
fn now() -> Duration {
    clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

/// Returns the status of a source whose hand-over ended with the device or session still here.
fn source_status(peer: &str, reason: &EndReason) -> HandoverStatus {
    let (state, reason) = match reason {
        EndReason::Cancelled => (HandoverState::Cancelled, None),
        EndReason::Possible => (HandoverState::Possible, None),
        reason => (HandoverState::Failed, Some(reason.to_string())),
    };
    HandoverStatus { state, peer: peer.to_owned(), epoch: None, reason }
}

impl Handovers {
    /// Creates the hand-overs, and listens for sources on `incoming` if it is given.
    ///
    /// # Errors
    /// Returns an error if `incoming` cannot be bound, or if a descriptor cannot be created or watched.
    pub fn new(incoming: Option<&Path>, options: TargetOptions) -> Result<Self, IncomingError> {
        let epoll = Arc::new(Epoll::new()?);
        let incoming = incoming.map(|path| Incoming::bind(path, &epoll)).transpose()?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(io::Error::from)?;
        epoll.add(&timer, Events::EPOLLIN, TIMER)?;
        let (sender, finished) = event_channel()?;
        epoll.add(&finished, Events::EPOLLIN, TRANSFER)?;
        Ok(Self {
            epoll,
            timer,
            due: None,
            options,
            incoming,
            role: Role::Idle,
            last: None,
            transfer: Transfer::None,
            threads: Threads::new(sender),
            finished,
        })
    }

    /// Borrows the role and the context in which it acts.
    fn split<'a>(
        &'a mut self,
        device: &'a mut Device,
        front: &'a mut dyn FrontEnd,
    ) -> (&'a mut Role, Context<'a>) {
        let Self { role, options, transfer, epoll, .. } = self;
        (role, Context { device, front, options, transfer, epoll })
    }

    /// Handles all pending events.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn progress(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<(), DeviceError> {
        let mut ready = Ready::<8>::default();
        let mut tokens: Vec<u64> = match self.epoll.wait(0, &mut ready) {
            Ok(events) => events.map(|(token, _)| token).collect(),
            Err(error) => {
                limited!(warn, %error, "cannot wait for hand-over events");
                return Ok(());
            }
        };
        tokens.sort_unstable();
        for token in tokens {
            let (role, mut cx) = self.split(device, front);
            match token {
                LINK => role.listen(&mut cx)?,
                PROCESS => role.died(&mut cx)?,
                INCOMING => self.on_source(device, front)?,
                TRANSFER => self.on_transfer(device)?,
                _ => self.on_time(device, front)?,
            }
            self.advance(device, front)?;
        }
        let (role, mut cx) = self.split(device, front);
        role.hurry(&mut cx)?;
        self.settle(device)
    }

    fn on_time(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<(), DeviceError> {
        // Disarming clears the expiration, and does not fail on a valid timer.
        let _ = self.timer.unset();
        // Tests make the timer expire early: use the time for which it was meant.
        let time = now().max(self.due.take().unwrap_or_default());
        if let Some(incoming) = &mut self.incoming {
            incoming.on_time(&self.epoll, time);
        }
        let (role, mut cx) = self.split(device, front);
        role.on_time(&mut cx, time)
    }

    /// Switches to the next role if the current one has ended.
    fn advance(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<(), DeviceError> {
        let (role, mut cx) = self.split(device, front);
        let ended = role.advance(&mut cx)?;
        self.note(ended);
        Ok(())
    }

    fn note(&mut self, ended: Option<HandoverStatus>) {
        self.last = ended.or(self.last.take());
    }

    /// Accepts a source that has connected, or refuses it.
    fn on_source(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<(), DeviceError> {
        let (role, mut cx) = self.split(device, front);
        role.hear_out(&mut cx)?;
        self.advance(device, front)?;
        let Some(link) = self.incoming.as_mut().and_then(|incoming| incoming.accept(&self.epoll, now()))
        else {
            return Ok(());
        };
        let trusted = Peer::trusted(&link);
        let refusal = match &trusted {
            Err(error) => Some(Refusal::User(error.to_string())),
            Ok(_) if device.tap().is_some() => Some(Refusal::AlreadyInitialised),
            Ok(_) if !self.role.is_idle() || self.is_transferring() => Some(Refusal::Busy),
            Ok(_) => None,
        };
        if let Some(refusal) = refusal {
            limited!(warn, %refusal, "refused a hand-over");
            prologue::refuse(&link, refusal);
            return Ok(());
        }
        match Watched::new(link, &self.epoll, LINK) {
            Ok(link) => {
                let same_user = trusted.is_ok_and(Peer::same_user);
                let answering = Answering::begin(link, same_user, self.options.vhost_from_source);
                self.role = Role::Answering(Box::new(answering));
            }
            Err(error) => limited!(warn, %error, "cannot watch the connection to a source"),
        }
        Ok(())
    }

    /// Follows the rings: offers the device when all rings have stopped, and takes it when a ring needs the TAP.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn settle(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        match &mut self.role {
            Role::DeviceSource(source) => source.settle(device)?,
            Role::DeviceTarget(target) => target.settle(device, &self.options)?,
            _ => {}
        }
        let ended = self.role.end();
        self.note(ended);
        self.set_timer();
        Ok(())
    }

    fn set_timer(&mut self) {
        let deadlines = [self.role.deadline(), self.incoming.as_ref().and_then(Incoming::deadline)];
        let deadline = deadlines.into_iter().flatten().min();
        if deadline == self.due {
            return;
        }
        self.due = deadline;
        let result = match deadline {
            Some(deadline) => {
                let now = now();
                let at = now + baton_faults::patience(deadline.saturating_sub(now));
                // Zero would disarm the timer.
                let at = TimeSpec::from(at.max(Duration::from_nanos(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
            None => self.timer.unset(),
        };
        if let Err(error) = result {
            limited!(warn, %error, "cannot set the hand-over timer");
        }
    }

    /// Handles the end of a front-end's session. All rings must be stopped.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn frontend_left(&mut self, device: &mut Device, departure: Departure) -> Result<(), DeviceError> {
        self.transfer = Transfer::None;
        match &mut self.role {
            // A front-end that was cut off may return for the device. A process that ends settles it in `finish`.
            Role::DeviceTarget(target) if departure == Departure::Left => {
                target.frontend_left(device, &self.options)?;
            }
            _ => {}
        }
        self.settle(device)?;
        match &mut self.role {
            Role::DeviceSource(source) => source.frontend_left(device, departure == Departure::Ending)?,
            _ => return Ok(()),
        }
        self.settle(device)
    }

    /// Handles the start of a front-end's session.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn frontend_came(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        match &mut self.role {
            Role::DeviceSource(source) => source.frontend_came(device),
            _ => Ok(()),
        }
    }

    /// Returns whether the process may end once no front-end is connected.
    pub fn is_done(&self) -> bool {
        self.role.is_done()
    }

    /// Returns the status of the current hand-over, or the final status of the last one.
    pub fn status(&self) -> Option<HandoverStatus> {
        self.role.status().or_else(|| self.last.clone())
    }

    /// Settles who owns the session when the process ends. Must run before any cleanup.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn end_session(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<(), DeviceError> {
        let (role, mut cx) = self.split(device, front);
        match role {
            Role::Asking(asking) => asking.cancel(&cx),
            Role::SessionSource(source) => source.finish(&mut cx)?,
            Role::SessionTarget(_) => {
                cx.device.unstage()?;
                cx.front.unstage();
            }
            _ => {}
        }
        Ok(())
    }

    /// Settles who owns the device when the process ends. Returns the downscript to run if this process owns it.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn finish(&mut self, device: &mut Device) -> Result<Option<FinalScript>, DeviceError> {
        match &mut self.role {
            Role::DeviceSource(source) => source.finish(device)?,
            Role::DeviceTarget(target) => target.finish(device, &self.options)?,
            _ => {}
        }
        let Some(tap) = device.tap() else { return Ok(None) };
        let tap = tap.name();
        Ok(device.config().downscript.clone().map(|script| FinalScript { script, tap }))
    }

    /// Hands the device or the session over to the back-end that listens on `path`. Answers `call` once it is known
    /// whether the target will take the device, or how the hand-over of the session ended.
    pub fn begin(
        &mut self,
        device: &mut Device,
        front: &mut dyn FrontEnd,
        purpose: Purpose,
        path: &Path,
        call: Call,
    ) {
        match self.connect(device, purpose, path) {
            Ok((link, process)) => {
                let (role, cx) = self.split(device, front);
                let peer = path.display().to_string();
                *role = Role::Asking(Box::new(Asking::begin(&cx, purpose, link, process, peer, call)));
                self.set_timer();
            }
            Err(error) => call.answer(Err(control::refusal(error_chain(&error)))),
        }
    }

    fn connect(
        &self,
        device: &Device,
        purpose: Purpose,
        path: &Path,
    ) -> Result<(Watched<MessageSocket>, Option<Watched<PeerProcess>>), HandoverError> {
        self.check_free(device)?;
        if purpose == Purpose::Session && self.is_transferring() {
            return Err(HandoverError::DeviceState);
        }
        let link = MessageSocket::connect(path)?;
        if purpose == Purpose::Session {
            baton_faults::point(Point::SourceSessionConnected)?;
        }
        let process = Peer::trusted_at(&link, path)?.pid;
        if u32::try_from(process) == Ok(std::process::id()) {
            return Err(HandoverError::Oneself);
        }
        let process = match purpose {
            Purpose::Device => None,
            Purpose::Session => {
                let life = PeerProcess::of(&link).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => HandoverError::Gone,
                    _ => error.into(),
                })?;
                Some(Watched::new(life, &self.epoll, PROCESS)?)
            }
        };
        Ok((Watched::new(link, &self.epoll, LINK)?, process))
    }

    /// Checks that this process has a TAP and is not in a hand-over already.
    fn check_free(&self, device: &Device) -> Result<(), HandoverError> {
        if let Some(peer) = self.role.peer() {
            return Err(HandoverError::UnderWay(peer.to_owned()));
        }
        if device.tap().is_none() { Err(HandoverError::NoTap) } else { Ok(()) }
    }

    /// Cancels the hand-over that the operator began, unless the target already owns the device or session.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn cancel(&mut self, device: &mut Device, front: &mut dyn FrontEnd) -> Result<Answer, DeviceError> {
        let (role, mut cx) = self.split(device, front);
        let answer = match role {
            Role::Asking(asking) => {
                asking.cancel(&cx);
                control::answer(&HandoverReply::CANCELLED)
            }
            Role::DeviceSource(source) => source.cancel(cx.device)?,
            Role::SessionSource(source) => source.cancel(&mut cx)?,
            _ => Err(control::refusal(HandoverError::NotUnderWay.to_string())),
        };
        self.advance(device, front)?;
        self.set_timer();
        Ok(answer)
    }

    /// Cancels a hand-over of the session because the session's memory was truncated.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn cancel_session(
        &mut self,
        device: &mut Device,
        front: &mut dyn FrontEnd,
    ) -> Result<(), DeviceError> {
        match &self.role {
            Role::Asking(asking) if asking.purpose == Purpose::Session => {}
            Role::SessionSource(_) => {}
            _ => return Ok(()),
        }
        self.cancel(device, front).map(drop)
    }
}
