//! Handing the device over to another back-end, and taking one (DESIGN: "Local VM migration"). What is said, and what
//! follows from it, is [`baton_protocol::handover`]'s; here it is carried out on the device.
//!
//! A process may be first the one, then the other: [`target`] waits on `--incoming-fds` and is over when it owns the
//! TAP; [`source`] lasts from a command, or from the front-end's wish, until the TAP is the target's or for good ours.
//! [`snapshot`] turns the device into what is said of it and back, [`frames`] moves frames in hand, [`transfer`] has
//! the threads for device state.
//!
//! Everything happens in the event loop, which waits for [`Handover`] as for any descriptor and calls
//! [`Handover::settle`] after everything else that may have started or stopped a ring.

pub mod frames;
pub mod snapshot;
pub mod source;
pub mod target;
pub mod transfer;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_channel::ownership::OwnershipError;
use baton_channel::packet::{ChannelError, PacketSocket};
use baton_channel::peer::{Peer, PeerError};
use baton_control::socket_path::{BindError, BoundSocket};
use baton_faults::Point;
use baton_protocol::control::{HandoverReply, HandoverStatus};
use baton_protocol::handover::message::{Message, StateOnly};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::handover::validate::check_without_tap;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::control::{self, Call};
use crate::device::{Device, DeviceError};
use crate::events::{Epoll, Events, Ready};
use crate::log_limit;
use crate::mailbox::{Mailbox, Mailer, mailbox};
use snapshot::Wishes;
use source::SourceEnd;
use target::TargetEnd;
use transfer::{Outcome, Route, TransferError};

const INCOMING: u64 = 0;
const TIMER: u64 = 1;
const SOURCE: u64 = 2;
const TARGET: u64 = 3;
const MAIL: u64 = 4;

/// How long to leave sources waiting that cannot be accepted, for want of descriptors, say.
const REST: Duration = Duration::from_millis(100);

/// What this program calls itself.
const PROGRAM: &str = concat!("baton-backend ", env!("CARGO_PKG_VERSION"));

/// Why a hand-over cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// One is under way.
    #[error("a hand-over to {0} is under way; end it with handover --cancel")]
    UnderWay(String),
    /// To this process itself.
    #[error("this is the same back-end: a device cannot be handed over to itself")]
    Oneself,
    /// There is nothing to hand over.
    #[error("this back-end has no TAP to hand over")]
    NoTap,
    /// Nothing to cancel.
    #[error("no hand-over is under way")]
    NotUnderWay,
    /// Not with this version.
    #[error("only a device can be handed over, when its front-end has stopped it: use --on-suspend")]
    LiveSession,
    /// It cannot be begun.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It cannot be begun.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// It cannot be begun.
    #[error("cannot begin a hand-over")]
    System(#[from] io::Error),
}

/// Why device state is not moved.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// Rings are set up or run.
    #[error("device state moves only while all rings are stopped")]
    NotSuspended,
    /// One is under way.
    #[error("another transfer of device state is under way")]
    UnderWay,
    /// None was begun.
    #[error("no device state has been moved")]
    None,
    /// A TAP would arrive where there is one.
    #[error("this back-end has a TAP already and cannot receive one; start it with --incoming-fds")]
    AlreadyInitialised,
    /// The device is being handed over in another way.
    #[error("the device is in another hand-over")]
    Busy,
    /// The target refuses what came, or the source could not send it.
    #[error("{0}")]
    Failed(String),
    /// It cannot be begun.
    #[error(transparent)]
    Begin(#[from] HandoverError),
    /// It failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// Why there is no place to receive a device.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// Its path cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system would not.
    #[error("cannot wait for a hand-over")]
    System(#[from] io::Error),
}

/// The transfer of device state that the front-end asked for last.
#[derive(Debug)]
enum Transfer {
    /// None was asked for.
    None,
    /// A thread is at it.
    Running,
    /// A thread is at it, for a session that is over.
    Abandoned,
    /// It is over.
    Over(Result<(), DeviceStateError>),
}

/// A program to run at the end, with the TAP's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastWork {
    /// The downscript.
    pub script: PathBuf,
    /// The TAP.
    pub tap: String,
}

/// What both ends need from around them.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    epoll: &'a Epoll,
    now: Duration,
}

/// The hand-overs of this process. Readable while there is something to do.
#[derive(Debug)]
pub struct Handover {
    epoll: Epoll,
    began: Instant,
    timer: TimerFd,
    wishes: Wishes,
    incoming: Option<BoundSocket>,
    /// Until when nobody is accepted.
    resting: Option<Duration>,
    source: Option<SourceEnd>,
    target: Option<TargetEnd>,
    transfer: Transfer,
    mailer: Mailer<Outcome>,
    mail: Mailbox<Outcome>,
}

impl AsFd for Handover {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Handover {
    /// Waits for a device on `incoming`, if that is given.
    ///
    /// # Errors
    /// [`IncomingError`].
    pub fn new(incoming: Option<&Path>, wishes: Wishes) -> Result<Self, IncomingError> {
        let epoll = Epoll::new()?;
        let incoming = incoming.map(BoundSocket::bind_packets).transpose()?;
        if let Some(socket) = &incoming {
            socket.listener().set_nonblocking(true)?;
            epoll.add(socket.listener(), Events::EPOLLIN, INCOMING)?;
        }
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(io::Error::from)?;
        epoll.add(&timer, Events::EPOLLIN, TIMER)?;
        let (mailer, mail) = mailbox()?;
        epoll.add(&mail, Events::EPOLLIN, MAIL)?;
        Ok(Self {
            epoll,
            began: Instant::now(),
            timer,
            wishes,
            incoming,
            resting: None,
            source: None,
            target: None,
            transfer: Transfer::None,
            mailer,
            mail,
        })
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Does what there is to do.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn progress(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        let mut ready = Ready::<8>::default();
        let events: Vec<_> = match self.epoll.wait(0, &mut ready) {
            Ok(events) => events.collect(),
            Err(error) => {
                tracing::warn!(%error, "cannot wait for the hand-over");
                return Ok(());
            }
        };
        for (token, _) in events {
            let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
            match token {
                INCOMING => {
                    // Whether the last source has gone is to be known first.
                    if let Some(target) = &mut self.target {
                        target.hear_out(device, &self.wishes, around)?;
                    }
                    self.target.take_if(|target| target.is_over());
                    self.accept(device);
                }
                SOURCE => {
                    if let Some(source) = &mut self.source {
                        source.listen(device, around)?;
                    }
                }
                TARGET => {
                    if let Some(target) = &mut self.target {
                        target.listen(device, &self.wishes, around)?;
                    }
                }
                MAIL => self.on_mail(device)?,
                _ => {
                    // Fails only when nothing has expired.
                    let _ = self.timer.unset();
                    if let Some(socket) = &self.incoming
                        && self.resting.take_if(|until| *until <= around.now).is_some()
                        && let Err(error) = self.epoll.add(socket.listener(), Events::EPOLLIN, INCOMING)
                    {
                        tracing::warn!(%error, "cannot wait for sources any more");
                    }
                    if let Some(source) = &mut self.source {
                        source.on_time(device, around)?;
                    }
                    if let Some(target) = &mut self.target {
                        target.on_time(device, &self.wishes, around)?;
                    }
                }
            }
        }
        self.settle(device)
    }

    /// Has the hand-over follow the rings: all of them stopped, or one started that needs the TAP.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn settle(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        if let Some(source) = &mut self.source {
            source.settle(device, around)?;
        }
        if let Some(target) = &mut self.target {
            target.settle(device, &self.wishes, around)?;
        }
        self.target.take_if(|target| target.is_over());
        self.set_timer();
        Ok(())
    }

    fn set_timer(&self) {
        let deadlines = [
            self.source.as_ref().and_then(SourceEnd::deadline),
            self.target.as_ref().and_then(TargetEnd::deadline),
            self.resting,
        ];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return };
        let left = deadline.saturating_sub(self.now()).max(Duration::from_millis(1));
        if let Err(error) = self.timer.set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty()) {
            tracing::warn!(%error, "cannot set the hand-over's timer");
        }
    }

    /// The front-end has gone, with all rings stopped.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_left(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        self.transfer = match self.transfer {
            Transfer::Running | Transfer::Abandoned => Transfer::Abandoned,
            Transfer::None | Transfer::Over(_) => Transfer::None,
        };
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        if let Some(target) = &mut self.target {
            target.frontend_left(device, &self.wishes, around)?;
        }
        self.settle(device)?;
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        match &mut self.source {
            Some(source) => source.frontend_left(device, around),
            None => Ok(()),
        }
    }

    /// A front-end is there.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_came(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        match &mut self.source {
            Some(source) => source.frontend_came(device, around),
            None => Ok(()),
        }
    }

    /// Whether this process has nothing more to do once no front-end is connected.
    pub fn is_done(&self) -> bool {
        self.source.as_ref().is_some_and(SourceEnd::is_done)
    }

    /// How it stands.
    pub fn status(&self) -> Option<HandoverStatus> {
        let target = self.target.as_ref().map(TargetEnd::status);
        target.or_else(|| self.source.as_ref().map(SourceEnd::status))
    }

    /// Ends: what is still ours is ours for good, what another process holds is its. Gives what the last owner is to
    /// run.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, device: &mut Device) -> Result<Option<LastWork>, DeviceError> {
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        if let Some(source) = &mut self.source {
            source.finish(device, around)?;
        }
        if let Some(target) = &mut self.target {
            target.finish(device, &self.wishes, around)?;
        }
        let Some(tap) = device.tap() else { return Ok(None) };
        let tap = tap.name().to_owned();
        Ok(device.config().downscript.clone().map(|script| LastWork { script, tap }))
    }

    /// Hands the device over to the back-end that waits at `path`, when all rings are stopped. `call` is answered when
    /// it is known whether the target would take it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn begin(
        &mut self,
        device: &mut Device,
        path: &Path,
        dry_run: bool,
        call: Call,
    ) -> Result<(), DeviceError> {
        let end = match self.try_begin(device, path) {
            Ok(end) => end,
            Err(error) => {
                call.answer(Err(control::refusal(format!("{:#}", anyhow::Error::new(error)))));
                return Ok(());
            }
        };
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        self.source.insert(end).begin(device, around, PROGRAM, dry_run, call)?;
        self.settle(device)
    }

    fn try_begin(&self, device: &Device, path: &Path) -> Result<SourceEnd, HandoverError> {
        self.check_free(device)?;
        let link = PacketSocket::connect(path)?;
        let process = Peer::of(&link)?.process;
        if u32::try_from(process) == Ok(std::process::id()) {
            return Err(HandoverError::Oneself);
        }
        self.epoll.add(&link, Events::EPOLLIN, SOURCE)?;
        SourceEnd::new(link, path.display().to_string())
    }

    /// That this process has a device, and does not hand it over yet.
    fn check_free(&self, device: &Device) -> Result<(), HandoverError> {
        if let Some(source) = self.source.as_ref().filter(|source| !source.is_over()) {
            return Err(HandoverError::UnderWay(source.peer().to_owned()));
        }
        if device.tap().is_none() { Err(HandoverError::NoTap) } else { Ok(()) }
    }

    /// Ends the hand-over that was begun, if the device is not the target's yet.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(&mut self, device: &mut Device) -> Result<control::Answer, DeviceError> {
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        let Some(source) = self.source.as_mut().filter(|source| !source.is_over()) else {
            return Ok(Err(control::refusal(HandoverError::NotUnderWay.to_string())));
        };
        source.cancel(device, around)?;
        Ok(if device.tap().is_some() {
            control::answer(&HandoverReply::CANCELLED)
        } else {
            Err(control::refusal("too late: the device is the target's"))
        })
    }

    /// Somebody wants to hand a device over.
    fn accept(&mut self, device: &Device) {
        let Some(socket) = &self.incoming else { return };
        let connection = match socket.listener().accept() {
            Ok((connection, _)) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                // The connection is still there to be accepted; what is missing may come back.
                if let Some(left_out) = log_limit::allow() {
                    tracing::warn!(%error, left_out, "cannot accept a source now");
                }
                let _ = self.epoll.remove(socket.listener());
                self.resting = Some(self.now() + REST);
                return;
            }
        };
        let link = match PacketSocket::try_from(std::os::fd::OwnedFd::from(connection)) {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(%error, "a connection for a hand-over is of no use");
                return;
            }
        };
        let trusted = Peer::trusted(&link);
        let refusal = match &trusted {
            Err(error @ (PeerError::User { .. } | PeerError::System(_))) => {
                Some(Refusal::User(error.to_string()))
            }
            Ok(_) if device.tap().is_some() => Some(Refusal::AlreadyInitialised),
            Ok(_) if self.target.is_some() || matches!(self.transfer, Transfer::Running) => {
                Some(Refusal::Busy)
            }
            Ok(_) => None,
        };
        if let Some(refusal) = refusal {
            if let Some(left_out) = log_limit::allow() {
                tracing::warn!(%refusal, left_out, "a hand-over was refused");
            }
            target::refuse(&link, refusal);
            return;
        }
        if let Err(error) = self.epoll.add(&link, Events::EPOLLIN, TARGET) {
            tracing::warn!(%error, "cannot wait for a source");
            return;
        }
        let same_user = trusted.is_ok_and(Peer::same_user);
        self.target = Some(TargetEnd::greeted(link, same_user, device, self.now()));
    }

    /// Whether a transfer of device state runs: [`Self::check_device_state`] must wait.
    pub fn is_transferring(&self) -> bool {
        matches!(self.transfer, Transfer::Running)
    }

    fn check_transfer(&self, device: &Device) -> Result<(), DeviceStateError> {
        if !device.suspended() {
            return Err(DeviceStateError::NotSuspended);
        }
        if matches!(self.transfer, Transfer::Running | Transfer::Abandoned) {
            return Err(DeviceStateError::UnderWay);
        }
        Ok(())
    }

    /// `SET_DEVICE_STATE_FD`, save.
    ///
    /// # Errors
    /// [`DeviceStateError`]; the device is as before.
    pub fn save_device_state(&mut self, device: &mut Device, fd: File) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::SourceBackendSaving).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        match Route::from(fd) {
            Route::Pipe(pipe) => {
                let aside = self.source.as_ref().and_then(SourceEnd::tap);
                let state = snapshot::describe(device, device.tap().or(aside), &[]);
                let message = Message::Device(StateOnly { device: state });
                transfer::save(pipe, &message, self.mailer.clone()).map_err(HandoverError::from)?;
                self.transfer = Transfer::Running;
            }
            Route::Socket(socket) => {
                self.check_free(device).map_err(|error| match error {
                    HandoverError::UnderWay(_) => DeviceStateError::Busy,
                    other => other.into(),
                })?;
                let (link, theirs) = PacketSocket::pair().map_err(HandoverError::from)?;
                self.epoll.add(&link, Events::EPOLLIN, SOURCE).map_err(HandoverError::from)?;
                let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
                let end = SourceEnd::new(link, "the front-end's device state".to_owned())?;
                let sent = self.source.insert(end).offer_over(device, around, socket, theirs);
                let sent = sent.map_err(|error| DeviceStateError::Failed(error.to_string()))?;
                let result = if sent {
                    Ok(())
                } else {
                    Err(DeviceStateError::Failed("the device state could not be sent".to_owned()))
                };
                self.transfer = Transfer::Over(result);
            }
        }
        Ok(())
    }

    /// `SET_DEVICE_STATE_FD`, load.
    ///
    /// # Errors
    /// [`DeviceStateError`]; the device is as before.
    pub fn load_device_state(&mut self, device: &Device, fd: File) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::TargetBackendLoading).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        let route = Route::from(fd);
        if matches!(route, Route::Socket(_)) {
            if device.tap().is_some() || self.incoming.is_none() {
                return Err(DeviceStateError::AlreadyInitialised);
            }
            if self.target.is_some() {
                return Err(DeviceStateError::Busy);
            }
        }
        transfer::load(route, self.mailer.clone()).map_err(HandoverError::from)?;
        self.transfer = Transfer::Running;
        Ok(())
    }

    /// `CHECK_DEVICE_STATE`, once no transfer runs.
    ///
    /// # Errors
    /// How the last transfer failed.
    pub fn check_device_state(&mut self) -> Result<(), DeviceStateError> {
        match std::mem::replace(&mut self.transfer, Transfer::None) {
            Transfer::Over(result) => result,
            other => {
                self.transfer = other;
                Err(DeviceStateError::None)
            }
        }
    }

    fn on_mail(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        while let Some(outcome) = self.mail.take() {
            if matches!(self.transfer, Transfer::Abandoned) {
                self.transfer = Transfer::None;
                continue;
            }
            let result = match outcome {
                Outcome::Saved(result) => result.map_err(DeviceStateError::from),
                Outcome::Read(Ok(Message::Device(StateOnly { device: state }))) => {
                    let capabilities = snapshot::capabilities(device, &self.wishes, &state, true);
                    check_without_tap(&state, &capabilities)
                        .map_err(|reasons| DeviceStateError::Failed(reasons.to_string()))
                }
                Outcome::Read(Ok(other)) => Err(DeviceStateError::Failed(format!(
                    "the device state begins with {}, which needs a socket",
                    other.name()
                ))),
                Outcome::Received(Ok(packet)) => {
                    let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
                    match TargetEnd::offered(packet, device, &self.wishes, around)? {
                        Ok(target) => {
                            self.target = Some(target);
                            Ok(())
                        }
                        Err(why) => Err(DeviceStateError::Failed(why)),
                    }
                }
                Outcome::Read(Err(error)) | Outcome::Received(Err(error)) => Err(error.into()),
            };
            if let Err(error) = &result {
                tracing::warn!(error = %error, "device state was not moved");
            }
            self.transfer = Transfer::Over(result);
        }
        Ok(())
    }
}
