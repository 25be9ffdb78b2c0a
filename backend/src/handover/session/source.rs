//! The end that serves the session: carries out what [`baton_protocol::handover::session::source`] decides.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::ownership::{OwnershipError, SharedWord};
use baton_channel::peer::PeerProcess;
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus, SessionReport};
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::handover::session::report::nanoseconds;
use baton_protocol::handover::session::source::{Action, Event, Source};
use baton_protocol::handover::wire::message::{Commit, Descriptors, Message, Stage};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::FreezeTimes;
use baton_protocol::ownership::{SwapOutcome, Word};
use baton_protocol::reasons::Reasons;

use super::frames::FrameSlots;
use super::{MOMENT, PATIENCE, snapshot};
use crate::control::{self, Answer, Call};
use crate::device::{DeviceError, Frozen};
use crate::events::Watched;
use crate::handover::agreed::AgreedTarget;
use crate::handover::device::snapshot::describe as describe_device;
use crate::handover::error::HandoverError;
use crate::handover::{Context, now, source_status};
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
    frames: FrameSlots,
}

/// One hand-over, from this side.
#[derive(Debug)]
pub struct SessionSource {
    state: Source,
    link: Option<Watched<MessageSocket>>,
    /// Until it does not matter any more: a process that has ended stays so, and would be told of for ever.
    process: Option<Watched<PeerProcess>>,
    /// The target, for people.
    peer: String,
    /// The operator's request, until it is over.
    call: Option<Call>,
    began: Duration,
    shared: Option<Shared>,
    /// What is said in COMMIT.
    frozen: Option<Frozen>,
    /// The answer was waited for.
    hurried: bool,
    /// Until when the target is given to tidy up.
    farewell: Option<Duration>,
}

impl SessionSource {
    /// With a target that has agreed. [`Self::stage`] goes on.
    pub fn new(target: AgreedTarget) -> Self {
        let AgreedTarget { link, process, peer, call, began } = target;
        Self {
            state: Source::HandedOver(None),
            link,
            process,
            peer,
            call,
            began,
            shared: None,
            frozen: None,
            hurried: false,
            farewell: None,
        }
    }

    /// Holds the front-end's messages and sends everything to the target, with instances of vhost-net if it wants them.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn stage(&mut self, cx: &mut Context<'_>, wants_vhost: bool) -> Result<(), DeviceError> {
        let (state, actions) = Source::staging(wants_vhost, self.began, now());
        self.state = state;
        self.act(cx, actions)
    }

    /// The target, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether it is over, with the session here.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended { .. })
    }

    /// Whether the process may end.
    pub fn is_done(&self) -> bool {
        matches!(self.state, Source::HandedOver(_)) && self.link.is_none()
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline().or(self.farewell)
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let state = match &self.state {
            Source::Staging { .. } => HandoverState::Staging,
            Source::Freezing { .. }
            | Source::Offering { .. }
            | Source::Committed { .. }
            | Source::Leaving { .. }
            | Source::Lost { .. }
            | Source::Surviving { .. } => HandoverState::Offered,
            Source::HandedOver(_) => HandoverState::HandedOver,
            Source::Ended { reason, .. } => return source_status(&self.peer, reason),
        };
        HandoverStatus { state, peer: self.peer.clone(), epoch: None, reason: None }
    }

    /// Hears what the target says.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.hear(cx, Duration::ZERO)
    }

    /// Once the session is offered, waits a moment for the target's answer: it has the processor at once if there is but
    /// one.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn hurry(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        if matches!(self.state, Source::Committed { .. }) && !std::mem::replace(&mut self.hurried, true) {
            self.hear(cx, MOMENT)?;
        }
        Ok(())
    }

    fn hear(&mut self, cx: &mut Context<'_>, patience: Duration) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.receive::<Message>(patience) {
            // None of the target's messages has descriptors; any that came are closed.
            Ok(packet) => self.tell(cx, Event::Message(packet.message)),
            Err(ChannelError::Timeout) => Ok(()),
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, peer = self.peer, %error, "invalid message from the target");
                }
                self.closed(cx)
            }
        }
    }

    /// The connection is of no more use. Whether the target is dead is said first.
    fn closed(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.link = None;
        self.farewell = None;
        if self.process.take_if(|process| process.has_exited()).is_some() {
            self.tell(cx, Event::Dead)?;
        }
        self.tell(cx, Event::Closed)
    }

    /// The target is dead.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn died(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        // What it had said before is heard first.
        while let Some(link) = &self.link {
            match link.receive::<Message>(Duration::ZERO) {
                Ok(packet) => self.tell(cx, Event::Message(packet.message))?,
                Err(_) => self.link = None,
            }
        }
        self.farewell = None;
        self.process = None;
        self.tell(cx, Event::Dead)
    }

    /// It is `now`.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn on_time(&mut self, cx: &mut Context<'_>, now: Duration) -> Result<(), DeviceError> {
        if self.farewell.take_if(|until| *until <= now).is_some() {
            self.link = None;
        }
        self.tell_at(cx, Event::Time, now)
    }

    /// Ends it, if the session is not the target's yet.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(&mut self, cx: &mut Context<'_>) -> Result<Answer, DeviceError> {
        self.tell(cx, Event::Cancel)?;
        Ok(match &self.state {
            Source::Ended { .. } => control::answer(&HandoverReply::CANCELLED),
            _ => Err(control::refusal("too late: the session is the target's")),
        })
    }

    /// The process ends: the session ends with it, unless it is the target's.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.tell(cx, Event::Cancel)?;
        if !matches!(self.state, Source::Ended { .. } | Source::HandedOver(_)) {
            cx.device.let_go()?;
            cx.front.release();
        }
        Ok(())
    }

    fn tell(&mut self, cx: &mut Context<'_>, event: Event) -> Result<(), DeviceError> {
        self.tell_at(cx, event, now())
    }

    fn tell_at(&mut self, cx: &mut Context<'_>, event: Event, now: Duration) -> Result<(), DeviceError> {
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
        self.act(cx, actions)?;
        self.report();
        self.process.take_if(|_| matches!(self.state, Source::Ended { .. }));
        Ok(())
    }

    /// Reports the end to the operator and to the log.
    fn report(&mut self) {
        let report = match &self.state {
            Source::Ended { phase, reason } => {
                let (phase, reason) = (phase.name().to_owned(), reason.to_string());
                SessionReport::RolledBack { phase, reason }
            }
            Source::HandedOver(report) => SessionReport::completed(report.clone().unwrap_or_default()),
            _ => return,
        };
        let Some(call) = self.call.take() else { return };
        let peer = &self.peer;
        let answer = control::answer(&report);
        match (&report, &answer) {
            (SessionReport::RolledBack { reason, .. }, _) => {
                limited!(info, peer, reason, "the hand-over is over, the session is ours");
            }
            (_, Ok(report)) => limited!(info, peer, %report, "the session is the target's"),
            _ => {}
        }
        call.answer(answer);
    }

    fn act(&mut self, cx: &mut Context<'_>, actions: Vec<Action>) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Hold => {
                    cx.front.hold();
                    // It may have begun a transfer of device state since the hand-over was allowed.
                    if cx.transfer.is_running() {
                        let text = HandoverError::DeviceState.to_string();
                        return self.tell(cx, Event::Failed(cannot("the session", &text)));
                    }
                }
                Action::Stage { vhost } => match self.send_stage(cx, vhost) {
                    // The end of a connection is heard after the target's last word.
                    Ok(()) | Err(StageError::Channel(ChannelError::Closed)) => {}
                    Err(error) => {
                        self.tell(cx, Event::Failed(cannot("the session", &error_chain(&error))))?;
                    }
                },
                Action::Freeze => self.freeze(cx)?,
                Action::Commit { word, times } => self.commit(cx, word, times)?,
                Action::Swap { from, to } => {
                    // If nothing was staged, no other process has the word.
                    let outcome =
                        self.shared.as_ref().map_or(SwapOutcome::Won, |shared| shared.word.swap(from, to));
                    self.tell(cx, Event::Swapped(outcome))?;
                }
                Action::Look => {
                    let word = self.shared.as_ref().and_then(|shared| shared.word.load().ok());
                    self.tell(cx, Event::Seen(word))?;
                }
                Action::Resume => {
                    cx.device.thaw()?;
                    self.resumed(cx);
                }
                Action::Recover => {
                    cx.device.survive()?;
                    self.resumed(cx);
                }
                Action::Release => {
                    baton_faults::pass(Point::SourceSessionHandedOver);
                    cx.device.let_go()?;
                    self.frozen = None;
                    baton_faults::pass(Point::SourceSessionReleased);
                    cx.front.release();
                }
                Action::Send(message) => self.send(cx, &message, &[])?,
                // The target may have something to tidy up, and closes the connection then.
                Action::Close if matches!(self.state, Source::HandedOver(_)) && self.link.is_some() => {
                    self.farewell = Some(now() + FAREWELL);
                }
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    fn resumed(&mut self, cx: &mut Context<'_>) {
        self.frozen = None;
        self.shared = None;
        cx.front.resume();
    }

    fn send(
        &mut self,
        cx: &mut Context<'_>,
        message: &Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.send(message, fds, PATIENCE) {
            // The end of a connection is heard after the target's last word.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                self.closed(cx)
            }
        }
    }

    fn send_stage(&mut self, cx: &mut Context<'_>, vhost: bool) -> Result<(), StageError> {
        baton_faults::point(Point::SourceSessionReady)?;
        cx.device.remember_tap();
        let pairs = cx.device.pairs();
        let shared = Shared { word: SharedWord::create()?, frames: FrameSlots::create(pairs)? };
        let shared = self.shared.insert(shared);
        let vhost: Vec<File> =
            (0..if vhost { pairs } else { 0 }).map(|_| vhost_net::open()).collect::<Result<_, _>>()?;
        let fds = snapshot::descriptors(cx.device, cx.front, &shared.word, &shared.frames, &vhost);
        let mut packets = fds.packets().into_iter().map(NamedFds::unzip);
        let Some(link) = &self.link else { return Ok(()) };
        let (names, first) = packets.next().unwrap_or((FdManifest::default(), Vec::new()));
        let stage = Stage {
            device: describe_device(cx.device, cx.device.tap(), &[]),
            session: snapshot::describe(cx),
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

    fn freeze(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        baton_faults::pass(Point::SourceSessionStaged);
        let Some(shared) = &self.shared else { return Ok(()) };
        let frozen = cx.device.freeze(|pair, frame| shared.frames.keep(pair, frame));
        match frozen {
            Ok(frozen) => {
                self.frozen = Some(frozen);
                let event = match baton_faults::point(Point::SourceSessionFrozen) {
                    Ok(()) => Event::Frozen,
                    Err(error) => Event::Failed(cannot("the rings", &error.to_string())),
                };
                self.tell(cx, event)
            }
            Err(DeviceError::Dataplane { source, .. }) => {
                self.tell(cx, Event::Failed(cannot("a frame in hand", &source.to_string())))
            }
            Err(error) => Err(error),
        }
    }

    fn commit(&mut self, cx: &mut Context<'_>, word: Word, times: FreezeTimes) -> Result<(), DeviceError> {
        let Some(Frozen { vrings, pairs }) = self.frozen.take() else { return Ok(()) };
        baton_faults::pass(Point::SourceSessionOffered);
        // As the target hears it: when this process runs again, it may be long after that.
        let now = now();
        let times = FreezeTimes { sent: nanoseconds(now), ..times };
        let message = Message::Commit(Commit { epoch: word.epoch, vrings, pairs, times });
        self.send(cx, &message, &[])?;
        baton_faults::pass(Point::SourceSessionCommitSent);
        self.tell_at(cx, Event::Sent, now)
    }
}

/// Why the source cannot go on.
fn cannot(what: &'static str, text: &str) -> String {
    Reasons::from(Refusal::Source { what, text: text.to_owned() }).to_string()
}
