//! The target of a session. Carries out what [`baton_protocol::handover::session::target`] decides.

use std::os::fd::OwnedFd;
use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket, Packet};
use baton_channel::ownership::SharedWord;
use baton_channel::peer::PeerProcess;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{HandoverState, HandoverStatus, SessionReport};
use baton_protocol::handover::session::target::{Action, Event, Taken, Target};
use baton_protocol::handover::session::validate::{CheckedCommit, CheckedSession};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{Message, Refuse};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session::SessionState;
use baton_protocol::ownership::{Owner, SwapOutcome};
use baton_protocol::reasons::Reasons;

use super::stage::{self, Staged};
use super::{MOMENT, PATIENCE};
use crate::device::DeviceError;
use crate::events::Watched;
use crate::handover::agreed::AgreedSource;
use crate::handover::transfer::Transfer;
use crate::handover::{Context, SOURCE_NAME, now};

/// One hand-over of the session, on the target.
#[derive(Debug)]
pub struct SessionTarget {
    state: Target<OwnedFd, Box<Staged>>,
    link: Option<Watched<MessageSocket>>,
    /// The source's process.
    process: Option<Watched<PeerProcess>>,
    /// Whether the source runs as the same user.
    same_user: bool,
    /// The ownership word, from STAGE on.
    word: Option<SharedWord>,
    /// What was staged, between taking the session and serving the front-end.
    taken: Option<Box<Staged>>,
    /// Whether [`Self::hurry`] has already waited for COMMIT.
    hurried: bool,
    /// How many vhost-net instances to keep if the hand-over fails.
    vhosts: Option<usize>,
}

/// Checks whether this back-end can take the session. Opens the vhost-net instances for it now, before any frame has to
/// wait for that.
///
/// # Errors
/// Returns all reasons for a refusal.
pub fn judge(
    cx: &mut Context<'_>,
    same_user: bool,
    device: DeviceState,
    session: SessionState,
) -> Result<(), Reasons> {
    let capabilities = stage::capabilities(cx, &device, same_user);
    let pairs = device.queue_pairs.len();
    CheckedSession::try_from((device, session, &capabilities))?;
    if cx.options.vhost_from_source {
        return Ok(());
    }
    cx.device.open_vhost(pairs).map_err(|error| Refusal::VhostNet(error.to_string()).into())
}

impl SessionTarget {
    /// Creates the target for a source that has agreed.
    pub fn ready(source: AgreedSource) -> Self {
        let AgreedSource { link, process, same_user, vhosts } = source;
        Self {
            state: Target::ready(now()),
            link,
            process,
            same_user,
            word: None,
            taken: None,
            hurried: false,
            vhosts,
        }
    }

    /// Returns whether the hand-over has ended and the next source may connect.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Target::Ended | Target::Active(_))
    }

    /// Returns when [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline()
    }

    /// Returns the status.
    pub fn status(&self) -> HandoverStatus {
        let state = match &self.state {
            Target::Staged(_) | Target::Taking { .. } => HandoverState::Adopted,
            Target::Starting { .. } => HandoverState::Checking,
            _ => HandoverState::Ready,
        };
        HandoverStatus { state, peer: SOURCE_NAME.to_owned(), epoch: None, reason: None }
    }

    /// Handles the source's next message or the end of the connection.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.hear(cx, Duration::ZERO)
    }

    /// Once everything is staged, briefly waits for COMMIT: the source stops its rings as soon as it reads STAGED.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn hurry(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        if matches!(self.state, Target::Staged(_)) && !std::mem::replace(&mut self.hurried, true) {
            self.hear(cx, MOMENT)?;
        }
        Ok(())
    }

    fn hear(&mut self, cx: &mut Context<'_>, patience: Duration) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.receive::<Message>(patience) {
            Ok(Packet { message, fds }) => self.tell(cx, Event::Message(message, fds)),
            Err(ChannelError::Timeout) => Ok(()),
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, %error, "invalid message from the source");
                    let reason = Refusal::Unusable { what: "a message", text: error.to_string() };
                    let refuse = Message::Refuse(Refuse { reasons: reason.into() });
                    // If this fails, the source still sees the connection close.
                    let _ = link.send(&refuse, &[], PATIENCE);
                }
                self.closed(cx)
            }
        }
    }

    /// Handles the end of the connection. If the source is dead, reports its death first.
    fn closed(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.link = None;
        if self.process.take_if(|process| process.has_exited()).is_some() {
            self.tell(cx, Event::Dead)?;
        }
        self.tell(cx, Event::Closed)
    }

    /// Handles the death of the source.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn died(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        // First handle the messages that it sent before.
        while let Some(link) = &self.link {
            match link.receive::<Message>(Duration::ZERO) {
                Ok(Packet { message, fds }) => self.tell(cx, Event::Message(message, fds))?,
                Err(_) => self.link = None,
            }
        }
        self.process = None;
        self.tell(cx, Event::Dead)
    }

    /// Handles a timeout at time `now`.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn on_time(&mut self, cx: &mut Context<'_>, now: Duration) -> Result<(), DeviceError> {
        self.tell_at(cx, Event::Time, now)
    }

    fn tell(&mut self, cx: &mut Context<'_>, event: Event<OwnedFd, Box<Staged>>) -> Result<(), DeviceError> {
        self.tell_at(cx, event, now())
    }

    fn tell_at(
        &mut self,
        cx: &mut Context<'_>,
        event: Event<OwnedFd, Box<Staged>>,
        now: Duration,
    ) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.state, Target::Ended);
        let (state, actions) = state.step(event, now);
        self.state = state;
        if matches!(self.state, Target::Gathering { .. }) {
            baton_faults::pass(Point::TargetSessionGathering);
        }
        self.act(cx, actions)?;
        if matches!(self.state, Target::Ended)
            && let Some(before) = self.vhosts.take()
        {
            cx.device.keep_vhosts(before);
        }
        Ok(())
    }

    fn act(
        &mut self,
        cx: &mut Context<'_>,
        actions: Vec<Action<OwnedFd, Box<Staged>>>,
    ) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Stage(stage, fds) => {
                    let staged = stage::stage(cx, self.same_user, *stage, fds);
                    let staged = staged.map(|(word, staged, shape)| {
                        self.word = Some(word);
                        (Box::new(staged), shape)
                    });
                    match &staged {
                        Ok(_) => baton_faults::pass(Point::TargetSessionStaged),
                        Err(reasons) => limited!(warn, %reasons, "refused a session"),
                    }
                    self.tell(cx, Event::Staged(staged))?;
                }
                Action::Swap { from, to } => {
                    if to.owner == Owner::Target {
                        baton_faults::pass(Point::TargetSessionTaking);
                    }
                    let outcome = self.word.as_ref().map(|word| word.swap(from, to));
                    self.tell(cx, Event::Swapped(outcome.unwrap_or(SwapOutcome::Meaningless)))?;
                }
                Action::Look => {
                    let word = self.word.as_ref().and_then(|word| word.load().ok());
                    self.tell(cx, Event::Seen(word))?;
                }
                Action::Activate(staged, commit) => {
                    baton_faults::pass(Point::TargetSessionTaken);
                    self.activate(cx, staged, &commit)?;
                    baton_faults::pass(Point::TargetSessionRunning);
                    self.tell(cx, Event::Activated)?;
                }
                Action::Recover(staged) => {
                    baton_faults::pass(Point::TargetSessionTaken);
                    cx.device.inherit(&staged.counters)?;
                    self.taken = Some(staged);
                    baton_faults::pass(Point::TargetSessionRunning);
                    self.tell(cx, Event::Activated)?;
                }
                Action::Listen => {
                    baton_faults::pass(Point::TargetSessionSettled);
                    self.listen_to_front(cx)?;
                }
                Action::Release(staged) => {
                    cx.device.unstage()?;
                    cx.front.unstage();
                    drop(staged);
                    self.word = None;
                    limited!(info, "the source keeps the session");
                }
                Action::Abandon => {
                    cx.device.freeze(|_, _| Ok(0))?;
                    cx.device.let_go()?;
                    self.taken = None;
                    cx.front.abandon();
                }
                Action::Send(message) => {
                    if let Some(link) = &self.link
                        && let Err(error) = link.send(&message, &[], PATIENCE)
                    {
                        // If the connection has ended, the next read reports it.
                        limited!(warn, %error, "cannot send {}", message.name());
                    }
                    match message {
                        Message::Staged(_) => baton_faults::pass(Point::TargetSessionStagedSent),
                        Message::Active(_) => baton_faults::pass(Point::TargetSessionActiveSent),
                        _ => {}
                    }
                }
                // Kept open until the event loop serves the session: the source waits for the end of the connection.
                Action::Close if matches!(self.state, Target::Active(_)) => {}
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    /// Starts the rings of the session, which this process now owns.
    fn activate(
        &mut self,
        cx: &mut Context<'_>,
        staged: Box<Staged>,
        commit: &CheckedCommit,
    ) -> Result<(), DeviceError> {
        let mut frames = Vec::new();
        for (pair, offset, length) in commit.frames() {
            match staged.frames.take(offset, length) {
                Ok(frame) => frames.push((pair, frame)),
                // This process owns the session, so it must go on without the frame.
                Err(error) => limited!(warn, pair, %error, "lost the frame in hand"),
            }
        }
        let said = commit.commit();
        cx.device.take_over(&said.vrings, &said.pairs, frames)?;
        self.taken = Some(staged);
        Ok(())
    }

    fn listen_to_front(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        cx.device.tidy()?;
        let poll_us = cx.device.config().poll;
        match &self.state {
            Target::Active(Taken::Committed(report)) => {
                let report = serde_json::to_string(&SessionReport::completed(report.clone()));
                limited!(info, report = report.unwrap_or_default(), %poll_us, "took the session");
            }
            _ => limited!(info, %poll_us, "the source is dead, took the session"),
        }
        if let Some(staged) = self.taken.take() {
            *cx.transfer = Transfer::inherited(staged.device_state_moved);
            cx.front.take();
        }
        Ok(())
    }
}
