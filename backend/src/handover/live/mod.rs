//! Handing a running session over, and taking one (DESIGN: "The handover protocol"): the device with its rings, the
//! front-end's connection, and where front-ends come from. What is said, and what follows from it, is
//! [`baton_protocol::session`]'s; here it is carried out.
//!
//! [`source`] lasts from the operator's command until the session is the target's or for good ours, [`target`] from a
//! source's first word until it is ours, or dropped. [`snapshot`] says what a session is, [`stage`] makes one of what was
//! said, [`frames`] has the frames in hand.
//!
//! A session is more than the device, so this is the event loop's own, and asks for the device when it needs it. What the
//! event loop has to do comes back as [`Outcome`]s.

pub mod frames;
pub mod snapshot;
pub mod source;
pub mod stage;
pub mod target;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_channel::packet::PacketSocket;
use baton_channel::peer::{Peer, PeerProcess};
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::control::HandoverStatus;
use baton_protocol::handover::message::{Hello, Message, Refuse};
use baton_protocol::handover::refusal::Refusal;
use nix::sys::time::TimeSpec;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;

use super::error::HandoverError;
use super::snapshot::Wishes;
use crate::control::{self, Call};
use crate::device::DeviceError;
use crate::dispatch::Dispatch;
use crate::endpoint::Endpoint;
use crate::events::{Epoll, Events, Ready};
use crate::session::Session;
use source::LiveSource;
use target::LiveTarget;

const TIMER: u64 = 0;
const LINK: u64 = 1;
const PEER_PROCESS: u64 = 2;

/// How long the event loop stands still for what is to come at once, while nobody serves.
const MOMENT: Duration = Duration::from_millis(2);

/// How long a peer's socket may be full.
const PATIENCE: Duration = Duration::from_millis(100);

/// The front-end, as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    /// Its connection, if there is one.
    pub session: Option<&'a Session>,
    /// Where others come from.
    pub endpoint: &'a Endpoint,
}

/// What is around a hand-over.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// The front-end.
    pub front: Front<'a>,
    /// The device.
    pub dispatch: &'a Arc<Mutex<Dispatch>>,
}

/// What the event loop has to do.
#[derive(Debug)]
pub enum Outcome {
    /// Hear the front-end again: the session is ours.
    Resumed,
    /// Let go of the front-end: the session is another process'.
    Released,
    /// Take the front-end: the session is ours.
    Taken {
        /// Its connection.
        session: Option<Box<Session>>,
        /// Where others come from.
        endpoint: Endpoint,
    },
    /// End: another process has taken the session back.
    Abandoned,
}

/// Somebody who wants to hand a session over.
#[derive(Debug)]
pub struct Arrived {
    /// The connection.
    pub link: PacketSocket,
    /// What was said first.
    pub hello: Hello,
    /// It runs as the same user.
    pub same_user: bool,
}

/// One of the two ends, or none.
#[derive(Debug, Default)]
enum End {
    /// None, or one that is over.
    #[default]
    None,
    Source(LiveSource),
    Target(LiveTarget),
}

/// The hand-over of this process' session. Readable while there is something to do.
#[derive(Debug)]
pub struct Live {
    epoll: Epoll,
    timer: TimerFd,
    /// What the timer is set for.
    due: Duration,
    end: End,
}

impl AsFd for Live {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Live {
    /// Waits for what there is to do.
    ///
    /// # Errors
    /// For want of descriptors.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        epoll.add(&timer, Events::EPOLLIN, TIMER)?;
        Ok(Self { epoll, timer, due: Duration::ZERO, end: End::None })
    }

    /// Whether the front-end, and those that would come, are left alone for now.
    pub fn holds_front(&self) -> bool {
        match &self.end {
            End::None => false,
            End::Source(source) => source.holds_front(),
            End::Target(target) => target.holds_front(),
        }
    }

    /// Whether the process has nothing more to do.
    pub fn is_done(&self) -> bool {
        matches!(&self.end, End::Source(source) if source.is_done())
    }

    /// How it stands, or ended.
    pub fn status(&self) -> Option<HandoverStatus> {
        match &self.end {
            End::None => None,
            End::Source(source) => Some(source.status()),
            End::Target(target) => Some(target.status()),
        }
    }

    /// The other one's name while a hand-over is under way.
    pub fn peer(&self) -> Option<&str> {
        match &self.end {
            End::Source(source) if !source.is_over() => Some(source.peer()),
            End::Target(target) if !target.is_over() => Some("the source"),
            _ => None,
        }
    }

    /// Hands the session over to the back-end that waits at `path`. `call` is answered when it is over.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn begin(
        &mut self,
        around: Around<'_>,
        path: &Path,
        dry_run: bool,
        call: Call,
    ) -> Result<Vec<Outcome>, DeviceError> {
        match self.connect(path) {
            Ok((link, process)) => {
                let mut source = LiveSource::new(link, process, path.display().to_string());
                let mut outcomes = Vec::new();
                source.begin(around, dry_run, call, &mut outcomes)?;
                self.end = End::Source(source);
                self.set_timer();
                Ok(outcomes)
            }
            Err(error) => {
                call.answer(Err(control::refusal(error_chain(&error))));
                Ok(Vec::new())
            }
        }
    }

    fn connect(&self, path: &Path) -> Result<(PacketSocket, PeerProcess), HandoverError> {
        let link = PacketSocket::connect(path)?;
        baton_faults::point(Point::SourceSessionConnected).map_err(HandoverError::from)?;
        if u32::try_from(Peer::trusted_at(&link, path)?.pid) == Ok(std::process::id()) {
            return Err(HandoverError::Oneself);
        }
        let process = PeerProcess::of(&link).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => HandoverError::Gone,
            _ => error.into(),
        })?;
        self.watch(&link, &process)?;
        Ok((link, process))
    }

    /// Somebody wants to hand a session over to this process.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn arrived(
        &mut self,
        around: Around<'_>,
        wishes: Wishes,
        arrived: Arrived,
    ) -> Result<Vec<Outcome>, DeviceError> {
        let Arrived { link, hello, same_user } = arrived;
        let process = baton_faults::point(Point::TargetSessionArrived).and_then(|()| PeerProcess::of(&link));
        let process = match process.and_then(|process| self.watch(&link, &process).map(|()| process)) {
            Ok(process) => process,
            Err(error) => {
                limited!(warn, %error, "a source cannot be known");
                let reason = Refusal::Unusable { what: "the source", text: error.to_string() };
                let refuse = Message::Refuse(Refuse { reasons: reason.into() });
                // Whoever does not hear it sees the end of the connection.
                let _ = link.send(&refuse, &[], PATIENCE);
                return Ok(Vec::new());
            }
        };
        let mut target = LiveTarget::new(link, process, same_user, wishes);
        let mut outcomes = Vec::new();
        target.greeted(around, hello, &mut outcomes)?;
        self.end = End::Target(target);
        self.set_timer();
        Ok(outcomes)
    }

    fn watch(&self, link: &PacketSocket, process: &PeerProcess) -> io::Result<()> {
        self.epoll.add(link, Events::EPOLLIN, LINK)?;
        self.epoll.add(process, Events::EPOLLIN, PEER_PROCESS)
    }

    /// Does what there is to do.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn progress(&mut self, around: Around<'_>) -> Result<Vec<Outcome>, DeviceError> {
        let mut ready = Ready::<4>::default();
        let mut tokens: Vec<u64> = match self.epoll.wait(0, &mut ready) {
            Ok(events) => events.map(|(token, _)| token).collect(),
            Err(error) => {
                limited!(warn, %error, "cannot wait for the hand-over");
                return Ok(Vec::new());
            }
        };
        // What the peer said, then its death, then time.
        tokens.sort_by_key(|token| [LINK, PEER_PROCESS, TIMER].iter().position(|other| other == token));
        let mut outcomes = Vec::new();
        let due = self.due;
        for token in tokens {
            // For who is in a hurry it comes early.
            let time = now().max(due);
            match (&mut self.end, token) {
                (End::Source(source), LINK) => source.listen(around, &mut outcomes)?,
                (End::Source(source), PEER_PROCESS) => source.died(around, &mut outcomes)?,
                (End::Source(source), _) => source.on_time(around, time, &mut outcomes)?,
                (End::Target(target), LINK) => target.listen(around, &mut outcomes)?,
                (End::Target(target), PEER_PROCESS) => target.died(around, &mut outcomes)?,
                (End::Target(target), _) => target.on_time(around, time, &mut outcomes)?,
                (End::None, _) => {}
            }
            if token == TIMER {
                // Fails only when nothing has expired.
                let _ = self.timer.unset();
            }
        }
        // Nobody serves: what comes next is waited for here, which is faster than through the event loop.
        match &mut self.end {
            End::None => {}
            End::Source(source) => source.hurry(around, &mut outcomes)?,
            End::Target(target) => target.hurry(around, &mut outcomes)?,
        }
        self.set_timer();
        Ok(outcomes)
    }

    /// The outcomes have been seen to: of an end that is over, the peer is let go.
    pub fn settle(&mut self) {
        match &mut self.end {
            End::Target(target) if target.is_over() => self.end = End::None,
            End::Source(source) if source.is_over() => source.forget_peer(),
            _ => return,
        }
        self.set_timer();
    }

    /// The process ends. What is staged is dropped, what is ours stays ours, what is the target's is let go.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, around: Around<'_>) -> Result<Vec<Outcome>, DeviceError> {
        let mut outcomes = Vec::new();
        match &mut self.end {
            End::None => {}
            End::Source(source) => source.finish(around, &mut outcomes)?,
            End::Target(_) => lock(around.dispatch).device.unstage()?,
        }
        Ok(outcomes)
    }

    /// Ends the hand-over that this process began, if the session is not the target's yet. `None` where there is none.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(
        &mut self,
        around: Around<'_>,
    ) -> Result<Option<(control::Answer, Vec<Outcome>)>, DeviceError> {
        let End::Source(source) = &mut self.end else { return Ok(None) };
        if source.is_over() {
            return Ok(None);
        }
        let mut outcomes = Vec::new();
        let answer = source.cancel(around, &mut outcomes)?;
        self.set_timer();
        Ok(Some((answer, outcomes)))
    }

    fn set_timer(&mut self) {
        let deadline = match &self.end {
            End::None => None,
            End::Source(source) => source.deadline(),
            End::Target(target) => target.deadline(),
        };
        let result = match deadline {
            // Zero would be no time at all.
            Some(deadline) => {
                self.due = deadline;
                let now = now();
                let at = now + baton_faults::patience(deadline.saturating_sub(now));
                let at = TimeSpec::from(at.max(Duration::from_nanos(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
            None => self.timer.unset(),
        };
        if let Err(error) = result {
            limited!(warn, %error, "cannot set the hand-over's timer");
        }
    }
}

/// `CLOCK_MONOTONIC`, which is one for all processes.
fn now() -> Duration {
    clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

fn lock(dispatch: &Mutex<Dispatch>) -> MutexGuard<'_, Dispatch> {
    dispatch.lock().unwrap_or_else(PoisonError::into_inner)
}
