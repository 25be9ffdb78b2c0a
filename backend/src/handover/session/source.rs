//! The source of a session. Carries out what [`baton_protocol::handover::session::source`] decides.

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

/// How long this process waits for the target to clean up before it ends.
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

/// What source and target share while a session is staged.
#[derive(Debug)]
struct Shared {
    word: SharedWord,
    frames: FrameSlots,
}

/// One hand-over of the session, on the source.
#[derive(Debug)]
pub struct SessionSource {
    state: Source,
    link: Option<Watched<MessageSocket>>,
    /// The target's process. Dropped when its end no longer matters: epoll would report the end again and again.
    process: Option<Watched<PeerProcess>>,
    /// The target's name for the operator.
    peer: String,
    /// The operator's request, until it is answered.
    call: Option<Call>,
    began: Duration,
    shared: Option<Shared>,
    /// The state of the stopped rings, for COMMIT.
    frozen: Option<Frozen>,
    /// Whether [`Self::hurry`] has already waited for the answer.
    hurried: bool,
    /// When to stop waiting for the target to clean up.
    farewell: Option<Duration>,
}

impl SessionSource {
    /// Creates the source for a target that has agreed. [`Self::stage`] must follow.
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

    /// Holds the front-end's messages and sends the session to the target, with vhost-net instances if it wants them.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn stage(&mut self, cx: &mut Context<'_>, wants_vhost: bool) -> Result<(), DeviceError> {
        let (state, actions) = Source::staging(wants_vhost, self.began, now());
        self.state = state;
        self.act(cx, actions)
    }

    /// Returns the target's name for the operator.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Returns whether the hand-over has ended with the session here.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended { .. })
    }

    /// Returns whether the process may end.
    pub fn is_done(&self) -> bool {
        matches!(self.state, Source::HandedOver(_)) && self.link.is_none()
    }

    /// Returns when [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline().or(self.farewell)
    }

    /// Returns the status.
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

    /// Handles the target's next message or the end of the connection.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.hear(cx, Duration::ZERO)
    }

    /// Once the session is offered, briefly waits for the target's answer. On a machine with one processor, this lets
    /// the target run at once.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn hurry(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        if matches!(self.state, Source::Committed { .. }) && !std::mem::replace(&mut self.hurried, true) {
            self.hear(cx, MOMENT)?;
        }
        Ok(())
    }

    fn hear(&mut self, cx: &mut Context<'_>, patience: Duration) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.receive::<Message>(patience) {
            // The target's messages have no descriptors. Any that arrived are closed here.
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

    /// Handles the end of the connection. If the target is dead, reports its death first.
    fn closed(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.link = None;
        self.farewell = None;
        if self.process.take_if(|process| process.has_exited()).is_some() {
            self.tell(cx, Event::Dead)?;
        }
        self.tell(cx, Event::Closed)
    }

    /// Handles the death of the target.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn died(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        // First handle the messages that it sent before.
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

    /// Handles a timeout at time `now`.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn on_time(&mut self, cx: &mut Context<'_>, now: Duration) -> Result<(), DeviceError> {
        if self.farewell.take_if(|until| *until <= now).is_some() {
            self.link = None;
        }
        self.tell_at(cx, Event::Time, now)
    }

    /// Cancels the hand-over, unless the target already owns the session.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn cancel(&mut self, cx: &mut Context<'_>) -> Result<Answer, DeviceError> {
        self.tell(cx, Event::Cancel)?;
        Ok(match &self.state {
            Source::Ended { .. } => control::answer(&HandoverReply::CANCELLED),
            _ => Err(control::refusal("too late: the target owns the session")),
        })
    }

    /// Settles who owns the session when the process ends. The session ends with the process unless the target owns it.
    ///
    /// # Errors
    /// Returns an error if the device fails.
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
        // A target that has sent ACTIVE settles next.
        if !lost_before && matches!(self.state, Source::Lost { active: None, .. }) {
            let peer = &self.peer;
            limited!(
                warn,
                peer,
                "the target took the session but does not serve it; it keeps the session until it dies"
            );
        }
        self.act(cx, actions)?;
        self.report();
        self.process.take_if(|_| matches!(self.state, Source::Ended { .. }));
        Ok(())
    }

    /// Reports the end of the hand-over to the operator and in the log.
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
                limited!(info, peer, reason, "hand-over ended, this back-end keeps the session");
            }
            (_, Ok(report)) => limited!(info, peer, %report, "the target took the session"),
            _ => {}
        }
        call.answer(answer);
    }

    fn act(&mut self, cx: &mut Context<'_>, actions: Vec<Action>) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Hold => {
                    cx.front.hold();
                    // The front-end may have begun a transfer of device state since the hand-over was accepted.
                    if cx.transfer.is_running() {
                        let text = HandoverError::DeviceState.to_string();
                        return self.tell(cx, Event::Failed(cannot("the session", &text)));
                    }
                }
                Action::Stage { vhost } => match self.send_stage(cx, vhost) {
                    // The end of the connection is handled after the target's last message.
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
                // The target closes the connection when it has cleaned up.
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
            // The end of the connection is handled after the target's last message.
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
        // The time before the message is sent: this process may be scheduled again long after the target reads it.
        let now = now();
        let times = FreezeTimes { sent: nanoseconds(now), ..times };
        let message = Message::Commit(Commit { epoch: word.epoch, vrings, pairs, times });
        self.send(cx, &message, &[])?;
        baton_faults::pass(Point::SourceSessionCommitSent);
        self.tell_at(cx, Event::Sent, now)
    }
}

/// Formats the reason why the source cannot hand over `what`.
fn cannot(what: &'static str, text: &str) -> String {
    Reasons::from(Refusal::Source { what, text: text.to_owned() }).to_string()
}
