//! The end that serves the session: carries out what [`baton_protocol::session::source`] decides.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use baton_channel::ownership::{OwnershipError, SharedWord, SwapError};
use baton_channel::packet::{ChannelError, PacketSocket};
use baton_channel::peer::PeerProcess;
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus, SessionReport};
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::handover::message::{Commit, Descriptors, Message, Prepare, Stage};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::ownership::Word;
use baton_protocol::session::report::nanoseconds;
use baton_protocol::session::source::{Action, Ended, Event, Source};
use baton_protocol::session::state::FreezeTimes;

use super::super::snapshot::describe as describe_device;
use super::frames::Slots;
use super::{Around, MOMENT, Outcome, PATIENCE, lock, now, snapshot};
use crate::control::{self, Answer, Call};
use crate::device::{DeviceError, Frozen};
use crate::handover::PROGRAM;
use crate::handover::error::HandoverError;
use crate::vhost_net::{self, VhostNetError};

/// How long the target may take to tidy up before this process ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why a session cannot be staged.
#[derive(Debug, thiserror::Error)]
enum StageError {
    #[error(transparent)]
    Word(#[from] OwnershipError),
    #[error(transparent)]
    Vhost(#[from] VhostNetError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    System(#[from] io::Error),
}

/// What there is while a session is staged.
#[derive(Debug)]
struct Shared {
    word: SharedWord,
    frames: Slots,
}

/// One hand-over, from this side.
#[derive(Debug)]
pub struct LiveSource {
    state: Source,
    link: Option<PacketSocket>,
    /// Until it does not matter any more: a process that has ended stays so, and would be told of for ever.
    process: Option<PeerProcess>,
    /// The target, for people.
    peer: String,
    /// Who asked, until it is over.
    call: Option<Call>,
    shared: Option<Shared>,
    /// What is said in COMMIT.
    frozen: Option<Frozen>,
    holds_front: bool,
    /// The answer was waited for.
    hurried: bool,
    /// Until when the target is given to tidy up.
    farewell: Option<Duration>,
}

impl LiveSource {
    /// Over `link`, to whom `peer` names.
    pub fn new(link: PacketSocket, process: PeerProcess, peer: String) -> Self {
        Self {
            state: Source::HandedOver(None),
            link: Some(link),
            process: Some(process),
            peer,
            call: None,
            shared: None,
            frozen: None,
            holds_front: false,
            hurried: false,
            farewell: None,
        }
    }

    /// The target, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether another one may begin.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended { .. })
    }

    /// It is over: only how it ended is kept.
    pub fn forget_peer(&mut self) {
        self.link = None;
        self.process = None;
    }

    /// Whether the process may end.
    pub fn is_done(&self) -> bool {
        matches!(self.state, Source::HandedOver(_)) && self.link.is_none()
    }

    /// Whether the front-end is left alone.
    pub fn holds_front(&self) -> bool {
        self.holds_front
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline().or(self.farewell)
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let (state, reason) = match &self.state {
            Source::Greeting { .. } | Source::Checking { .. } => (HandoverState::Checking, None),
            Source::Staging { .. } => (HandoverState::Staging, None),
            Source::Freezing { .. }
            | Source::Offering { .. }
            | Source::Committed { .. }
            | Source::Leaving { .. }
            | Source::Lost { .. }
            | Source::Surviving { .. } => (HandoverState::Offered, None),
            Source::HandedOver(_) => (HandoverState::HandedOver, None),
            Source::Ended { ended: Ended::Cancelled, .. } => (HandoverState::Cancelled, None),
            Source::Ended { ended: Ended::Possible, .. } => (HandoverState::Possible, None),
            Source::Ended { ended, .. } => (HandoverState::Failed, Some(ended.to_string())),
        };
        HandoverStatus { state, peer: self.peer.clone(), epoch: None, reason }
    }

    /// Says hello.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn begin(
        &mut self,
        around: Around<'_>,
        dry_run: bool,
        call: Call,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        self.call = Some(call);
        let (state, actions) = Source::begin(PROGRAM, dry_run, now());
        self.state = state;
        self.act(around, actions, outcomes)
    }

    /// Hears what the target says.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        self.hear(around, Duration::ZERO, outcomes)
    }

    /// Once the session is offered, waits a moment for the target's answer: it has the processor at once if there is but
    /// one.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn hurry(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        if matches!(self.state, Source::Committed { .. }) && !std::mem::replace(&mut self.hurried, true) {
            self.hear(around, MOMENT, outcomes)?;
        }
        Ok(())
    }

    fn hear(
        &mut self,
        around: Around<'_>,
        patience: Duration,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.receive::<Message>(patience) {
            // None of the target's messages has descriptors; any that came are closed.
            Ok(packet) => self.tell(around, Event::Message(packet.message), outcomes),
            Err(ChannelError::Timeout) => Ok(()),
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, peer = self.peer, %error, "the target makes no sense");
                }
                self.closed(around, outcomes)
            }
        }
    }

    /// The connection is of no more use. Whether the target is dead is said first.
    fn closed(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        self.link = None;
        self.farewell = None;
        if self.process.take_if(|process| process.has_exited()).is_some() {
            self.tell(around, Event::Dead, outcomes)?;
        }
        self.tell(around, Event::Closed, outcomes)
    }

    /// The target is dead.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn died(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        // What it had said before is heard first.
        while let Some(link) = &self.link {
            match link.receive::<Message>(Duration::ZERO) {
                Ok(packet) => self.tell(around, Event::Message(packet.message), outcomes)?,
                Err(_) => self.link = None,
            }
        }
        self.farewell = None;
        self.process = None;
        self.tell(around, Event::Dead, outcomes)
    }

    /// It is `now`.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn on_time(
        &mut self,
        around: Around<'_>,
        now: Duration,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        if self.farewell.take_if(|until| *until <= now).is_some() {
            self.link = None;
        }
        self.tell_at(around, Event::Time, now, outcomes)
    }

    /// Ends it, if the session is not the target's yet.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<Answer, DeviceError> {
        self.tell(around, Event::Cancel, outcomes)?;
        Ok(match &self.state {
            Source::Ended { .. } => control::answer(&HandoverReply::CANCELLED),
            _ => Err(control::refusal("too late: the session is the target's")),
        })
    }

    /// The process ends: the session ends with it, unless it is the target's.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        self.tell(around, Event::Cancel, outcomes)?;
        if !matches!(self.state, Source::Ended { .. } | Source::HandedOver(_)) {
            lock(around.dispatch).device.let_go()?;
            outcomes.push(Outcome::Released);
        }
        Ok(())
    }

    fn tell(
        &mut self,
        around: Around<'_>,
        event: Event,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        self.tell_at(around, event, now(), outcomes)
    }

    fn tell_at(
        &mut self,
        around: Around<'_>,
        event: Event,
        now: Duration,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.state, Source::HandedOver(None));
        let lost_before = matches!(state, Source::Lost { .. });
        let (state, actions) = state.step(event, now);
        self.state = state;
        // One that has said ACTIVE settles next.
        if !lost_before && matches!(self.state, Source::Lost { active: None, .. }) {
            let peer = &self.peer;
            limited!(
                warn,
                peer,
                "the target has taken the session, but does not go on; it has it while it lives"
            );
        }
        self.act(around, actions, outcomes)?;
        self.report();
        self.process.take_if(|_| matches!(self.state, Source::Ended { .. }));
        Ok(())
    }

    /// Says how it ended, to who asked and to the log.
    fn report(&mut self) {
        let dry_run = matches!(&self.call, Some(call) if call.is_dry_run());
        let answer = match &self.state {
            Source::Ended { ended: Ended::Possible, .. } => control::answer(&HandoverReply::POSSIBLE),
            Source::Ended { ended, .. } if dry_run => Err(control::refusal(ended.to_string())),
            Source::Ended { phase, ended } => control::answer(&SessionReport::RolledBack {
                phase: phase.name().to_owned(),
                reason: ended.to_string(),
            }),
            Source::HandedOver(report) => {
                control::answer(&SessionReport::completed(report.clone().unwrap_or_default()))
            }
            _ => return,
        };
        let Some(call) = self.call.take() else { return };
        match (&self.state, &answer) {
            (Source::HandedOver(_), Ok(report)) => {
                limited!(info, peer = self.peer, %report, "the session is the target's");
            }
            (Source::Ended { ended, .. }, _) => {
                limited!(info, peer = self.peer, reason = %ended, "the hand-over is over, the session is ours");
            }
            _ => {}
        }
        call.answer(answer);
    }

    fn act(
        &mut self,
        around: Around<'_>,
        actions: Vec<Action>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Prepare => {
                    baton_faults::pass(Point::SourceSessionGreeted);
                    let message = {
                        let dispatch = &*lock(around.dispatch);
                        let device = &dispatch.device;
                        Message::Prepare(Prepare {
                            device: describe_device(device, device.tap(), &[]),
                            session: Some(Box::new(snapshot::describe(dispatch, around.front))),
                        })
                    };
                    self.send(around, &message, &[], outcomes)?;
                }
                Action::Hold => {
                    self.holds_front = true;
                    // It may have begun a transfer of device state since the hand-over was allowed.
                    if lock(around.dispatch).handover.is_transferring() {
                        let text = HandoverError::DeviceState.to_string();
                        let reason = Refusal::Source { what: "the session", text };
                        return self.tell(around, Event::Failed(reason.into()), outcomes);
                    }
                }
                Action::Stage { vhost } => match self.stage(around, vhost) {
                    // The end of a connection is heard after the target's last word.
                    Ok(()) | Err(StageError::Channel(ChannelError::Closed)) => {}
                    Err(error) => {
                        let reason = Refusal::Source { what: "the session", text: error_chain(&error) };
                        self.tell(around, Event::Failed(reason.into()), outcomes)?;
                    }
                },
                Action::Freeze => self.freeze(around, outcomes)?,
                Action::Commit { word, times } => self.commit(around, word, times, outcomes)?,
                Action::Swap { from, to } => {
                    let result = match &self.shared {
                        Some(shared) => shared.word.swap(from, to).map_err(SwapError::word),
                        // Nothing was staged, so nobody else has the word.
                        None => Ok(()),
                    };
                    self.tell(around, Event::Swapped(result), outcomes)?;
                }
                Action::Look => {
                    let word = self.shared.as_ref().and_then(|shared| shared.word.load().ok());
                    self.tell(around, Event::Seen(word), outcomes)?;
                }
                Action::Resume => {
                    lock(around.dispatch).device.thaw()?;
                    self.resumed(outcomes);
                }
                Action::Recover => {
                    lock(around.dispatch).device.survive()?;
                    self.resumed(outcomes);
                }
                Action::Release => {
                    baton_faults::pass(Point::SourceSessionHandedOver);
                    lock(around.dispatch).device.let_go()?;
                    self.frozen = None;
                    outcomes.push(Outcome::Released);
                    baton_faults::pass(Point::SourceSessionReleased);
                }
                Action::Send(message) => self.send(around, &message, &[], outcomes)?,
                // The target may have something to tidy up, and closes the connection then.
                Action::Close if matches!(self.state, Source::HandedOver(_)) && self.link.is_some() => {
                    self.farewell = Some(now() + FAREWELL);
                }
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    fn resumed(&mut self, outcomes: &mut Vec<Outcome>) {
        self.holds_front = false;
        self.frozen = None;
        self.shared = None;
        outcomes.push(Outcome::Resumed);
    }

    fn send(
        &mut self,
        around: Around<'_>,
        message: &Message,
        fds: &[BorrowedFd<'_>],
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.send(message, fds, PATIENCE) {
            // The end of a connection is heard after the target's last word.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                self.closed(around, outcomes)
            }
        }
    }

    fn stage(&mut self, around: Around<'_>, vhost: bool) -> Result<(), StageError> {
        baton_faults::point(Point::SourceSessionReady)?;
        let dispatch = &mut *lock(around.dispatch);
        dispatch.device.remember_tap();
        let device = &dispatch.device;
        let pairs = device.pairs();
        let shared = Shared { word: SharedWord::create()?, frames: Slots::create(pairs)? };
        let shared = self.shared.insert(shared);
        let vhost: Vec<File> =
            (0..if vhost { pairs } else { 0 }).map(|_| vhost_net::open()).collect::<Result<_, _>>()?;
        let fds = snapshot::descriptors(device, around.front, &shared.word, &shared.frames, &vhost);
        let mut packets = fds.packets().into_iter().map(NamedFds::unzip);
        let Some(link) = &self.link else { return Ok(()) };
        let (names, first) = packets.next().unwrap_or((FdManifest::default(), Vec::new()));
        let stage = Stage {
            device: describe_device(device, device.tap(), &[]),
            session: snapshot::describe(dispatch, around.front),
            more: u16::try_from(packets.len()).unwrap_or(u16::MAX),
            fds: names,
        };
        link.send(&Message::Stage(Box::new(stage)), &first, PATIENCE)?;
        baton_faults::pass(Point::SourceSessionStageSent);
        for (fds, more) in packets {
            link.send(&Message::Descriptors(Descriptors { fds }), &more, PATIENCE)?;
        }
        Ok(())
    }

    fn freeze(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        baton_faults::pass(Point::SourceSessionStaged);
        let frozen = {
            let Some(shared) = &self.shared else { return Ok(()) };
            lock(around.dispatch).device.freeze(|pair, frame| shared.frames.keep(pair, frame))
        };
        match frozen {
            Ok(frozen) => {
                self.frozen = Some(frozen);
                let event = match baton_faults::point(Point::SourceSessionFrozen) {
                    Ok(()) => Event::Frozen,
                    Err(error) => {
                        Event::Failed(Refusal::Source { what: "the rings", text: error.to_string() }.into())
                    }
                };
                self.tell(around, event, outcomes)
            }
            Err(DeviceError::Dataplane { source, .. }) => {
                let reason = Refusal::Source { what: "a frame in hand", text: source.to_string() };
                self.tell(around, Event::Failed(reason.into()), outcomes)
            }
            Err(error) => Err(error),
        }
    }

    fn commit(
        &mut self,
        around: Around<'_>,
        word: Word,
        times: FreezeTimes,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        let Some(Frozen { vrings, pairs }) = self.frozen.take() else { return Ok(()) };
        baton_faults::pass(Point::SourceSessionOffered);
        // As the target hears it: when this process runs again, it may be long after that.
        let now = now();
        let times = FreezeTimes { sent: nanoseconds(now), ..times };
        let message = Message::Commit(Commit { epoch: word.epoch, vrings, pairs, times });
        self.send(around, &message, &[], outcomes)?;
        baton_faults::pass(Point::SourceSessionCommitSent);
        self.tell_at(around, Event::Sent, now, outcomes)
    }
}
