//! Handing the device over to another back-end, and taking one (DESIGN: "Local VM migration"). What is said, and what
//! follows from it, is [`baton_protocol::handover`]'s; here it is carried out on the device. [`live`] does the same for a
//! running session.
//!
//! A process may be first the one, then the other: [`target`] waits on `--incoming-fds` and is over when it owns the
//! TAP; [`source`] lasts from a command, or from the front-end's wish, until the TAP is the target's or for good ours.
//! [`snapshot`] turns the device into what is said of it and back, [`frames`] moves frames in hand; [`device_state`] is
//! what the front-end asks for, [`transfer`] has its threads.
//!
//! Everything happens in the event loop, which waits for [`Handover`] as for any descriptor and calls
//! [`Handover::settle`] after everything else that may have started or stopped a ring.

pub mod device_state;
pub mod error;
pub mod frames;
pub mod incoming;
pub mod live;
pub mod snapshot;
pub mod source;
pub mod target;
pub mod transfer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_channel::packet::PacketSocket;
use baton_channel::peer::Peer;
use baton_control::{error_chain, limited};
use baton_protocol::control::{HandoverReply, HandoverStatus};
use baton_protocol::handover::refusal::Refusal;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::control::{self, Call};
use crate::device::{Device, DeviceError};
use crate::events::{Epoll, Events, Ready};
use crate::mailbox::{Mailbox, mailbox};
use device_state::Transfer;
use error::{HandoverError, IncomingError};
use incoming::Incoming;
use live::Arrived;
use snapshot::Wishes;
use source::SourceEnd;
use target::TargetEnd;
use transfer::{Letter, Threads};

const INCOMING: u64 = 0;
const TIMER: u64 = 1;
const SOURCE: u64 = 2;
const TARGET: u64 = 3;
const MAIL: u64 = 4;

/// What this program calls itself.
const PROGRAM: &str = concat!("baton-backend ", env!("CARGO_PKG_VERSION"));

/// A program to run at the end, with the TAP's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastWork {
    /// The downscript.
    pub script: PathBuf,
    /// The TAP.
    pub tap: String,
}

/// How a front-end goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// By itself.
    Left,
    /// Cut off, for what it said or could not be given: it may have its VM already, and comes again for its device.
    CutOff,
    /// This process ends.
    Ending,
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
    incoming: Option<Incoming>,
    source: Option<SourceEnd>,
    target: Option<TargetEnd>,
    /// A source of a session that has just come.
    arrived: Option<Arrived>,
    /// The peer of a session's hand-over that is under way.
    live: Option<String>,
    transfer: Transfer,
    /// The front-end runs as this process' user or root.
    frontend_trusted: bool,
    threads: Threads,
    mail: Mailbox<Letter>,
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
        let incoming = incoming.map(|path| Incoming::bind(path, &epoll)).transpose()?;
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
            source: None,
            target: None,
            arrived: None,
            live: None,
            transfer: Transfer::None,
            frontend_trusted: false,
            threads: Threads::new(mailer),
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
                limited!(warn, %error, "cannot wait for the hand-over");
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
                    if let Some(target) = self.target.take_if(|target| target.is_for_session()) {
                        self.arrived = target.into_arrived(around);
                    }
                }
                MAIL => self.on_mail(device)?,
                _ => {
                    // Fails only when nothing has expired.
                    let _ = self.timer.unset();
                    if let Some(incoming) = &mut self.incoming {
                        incoming.on_time(around);
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
        self.source.take_if(|source| source.is_forgotten());
        self.set_timer();
        Ok(())
    }

    fn set_timer(&self) {
        let deadlines = [
            self.source.as_ref().and_then(SourceEnd::deadline),
            self.target.as_ref().and_then(TargetEnd::deadline),
            self.incoming.as_ref().and_then(Incoming::deadline),
        ];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return };
        let left = deadline.saturating_sub(self.now()).max(Duration::from_millis(1));
        if let Err(error) = self.timer.set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty()) {
            limited!(warn, %error, "cannot set the hand-over's timer");
        }
    }

    /// The front-end has gone, with all rings stopped.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_left(&mut self, device: &mut Device, departure: Departure) -> Result<(), DeviceError> {
        self.transfer = Transfer::None;
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        // One that has left the device to a process that ends has it cleaned up by that.
        if let Some(target) = self.target.as_mut().filter(|_| departure == Departure::Left) {
            target.frontend_left(device, &self.wishes, around)?;
        }
        self.settle(device)?;
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        match &mut self.source {
            Some(source) => source.frontend_left(device, around, departure == Departure::Ending),
            None => Ok(()),
        }
    }

    /// Whether the front-end runs as this process' user or root, by the connection's peer.
    pub fn set_frontend_trusted(&mut self, trusted: bool) {
        self.frontend_trusted = trusted;
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
        let tap = tap.name();
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
                call.answer(Err(control::refusal(error_chain(&error))));
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
        let process = Peer::trusted_at(&link, path)?.pid;
        if u32::try_from(process) == Ok(std::process::id()) {
            return Err(HandoverError::Oneself);
        }
        self.epoll.add(&link, Events::EPOLLIN, SOURCE)?;
        SourceEnd::new(link, path.display().to_string())
    }

    /// What the command line decides of what arrives.
    pub fn wishes(&self) -> &Wishes {
        &self.wishes
    }

    /// A source that wants to hand a session over, and has just said so.
    pub fn take_arrived(&mut self) -> Option<Arrived> {
        self.arrived.take()
    }

    /// Whose session's hand-over is under way.
    pub fn set_live(&mut self, peer: Option<&str>) {
        if self.live.as_deref() != peer {
            self.live = peer.map(str::to_owned);
        }
    }

    /// Whether a session's hand-over is under way, or is about to be.
    fn is_live(&self) -> bool {
        self.live.is_some() || self.arrived.is_some()
    }

    /// That a session's hand-over can begin.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn check_live(&self, device: &Device) -> Result<(), HandoverError> {
        self.check_free(device)?;
        if self.is_transferring() { Err(HandoverError::DeviceState) } else { Ok(()) }
    }

    /// That this process has a device, and does not hand it over yet.
    fn check_free(&self, device: &Device) -> Result<(), HandoverError> {
        if let Some(peer) = &self.live {
            return Err(HandoverError::UnderWay(peer.clone()));
        }
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

    /// Whether this process has a device in another hand-over, though not the TAP: it would lose the one for another.
    fn is_occupied(&self) -> bool {
        self.target.is_some() || self.source.as_ref().is_some_and(SourceEnd::is_given)
    }

    /// Somebody wants to hand a device over.
    fn accept(&mut self, device: &Device) {
        let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
        let Some(link) = self.incoming.as_mut().and_then(|incoming| incoming.accept(around)) else { return };
        let trusted = Peer::trusted(&link);
        let refusal = match &trusted {
            Err(error) => Some(Refusal::User(error.to_string())),
            Ok(_) if device.tap().is_some() => Some(Refusal::AlreadyInitialised),
            Ok(_) if self.is_occupied() || self.is_live() || self.is_transferring() => Some(Refusal::Busy),
            Ok(_) => None,
        };
        if let Some(refusal) = refusal {
            limited!(warn, %refusal, "a hand-over was refused");
            target::refuse(&link, refusal);
            return;
        }
        if let Err(error) = self.epoll.add(&link, Events::EPOLLIN, TARGET) {
            limited!(warn, %error, "cannot wait for a source");
            return;
        }
        let same_user = trusted.is_ok_and(Peer::same_user);
        self.target = Some(TargetEnd::greeted(link, same_user, device, around.now));
    }
}
