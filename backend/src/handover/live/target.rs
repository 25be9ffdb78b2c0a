//! The end that waits for a session: carries out what [`baton_protocol::session::target`] decides.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use baton_channel::ownership::{SharedWord, SwapError};
use baton_channel::packet::{ChannelError, Packet, PacketSocket};
use baton_channel::peer::PeerProcess;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::CodecError;
use baton_protocol::control::{HandoverState, HandoverStatus, SessionReport};
use baton_protocol::handover::message::{Hello, Message, Refuse, SESSION};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::handover::state::DeviceState;
use baton_protocol::ownership::Owner;
use baton_protocol::reasons::Reasons;
use baton_protocol::session::state::SessionState;
use baton_protocol::session::target::{Action, Event, Taken, Target};
use baton_protocol::session::validate::{CheckedCommit, CheckedSession};

use super::super::snapshot::Wishes;
use super::stage::{self, Staged};
use super::{Around, MOMENT, Outcome, PATIENCE, lock, now};
use crate::device::DeviceError;
use crate::handover::PROGRAM;

/// One hand-over, from this side.
#[derive(Debug)]
pub struct LiveTarget {
    state: Target<OwnedFd, Box<Staged>>,
    link: Option<PacketSocket>,
    process: PeerProcess,
    /// The source runs as the same user.
    same_user: bool,
    wishes: Wishes,
    /// What this end says of itself.
    hello: Hello,
    /// The ownership word, once it is here.
    word: Option<Arc<SharedWord>>,
    /// What was taken, until the front-end may be heard.
    taken: Option<Box<Staged>>,
    /// COMMIT was waited for.
    hurried: bool,
    /// How many vhost-nets there were, once there may be more for the session.
    vhosts: Option<usize>,
}

impl LiveTarget {
    /// With a source at the other end of `link`.
    pub fn new(link: PacketSocket, process: PeerProcess, same_user: bool, wishes: Wishes) -> Self {
        let hello = Hello {
            purpose: SESSION.to_owned(),
            program: PROGRAM.to_owned(),
            dry_run: false,
            wants_vhost: wishes.vhost_from_source,
        };
        let state = Target::begin(now());
        Self {
            state,
            link: Some(link),
            process,
            same_user,
            wishes,
            hello,
            word: None,
            taken: None,
            hurried: false,
            vhosts: None,
        }
    }

    /// Whether the next source may come.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Target::Ended | Target::Active(_))
    }

    /// Whether front-ends of its own are left alone.
    pub fn holds_front(&self) -> bool {
        matches!(self.state, Target::Staged(_) | Target::Taking { .. } | Target::Starting { .. })
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline()
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let state = match &self.state {
            Target::Ready { .. } | Target::Gathering { .. } | Target::Staging { .. } => HandoverState::Ready,
            Target::Staged(_) | Target::Taking { .. } => HandoverState::Adopted,
            _ => HandoverState::Checking,
        };
        HandoverStatus { state, peer: "the source".to_owned(), epoch: None, reason: None }
    }

    /// The source said hello.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn greeted(
        &mut self,
        around: Around<'_>,
        hello: Hello,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        self.tell(around, Event::Message(Message::Hello(hello), Vec::new()), outcomes)
    }

    /// Hears what the source says.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        self.hear(around, Duration::ZERO, outcomes)
    }

    /// Once everything is staged, waits a moment for COMMIT: the source stops its rings as soon as it hears of it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn hurry(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        if matches!(self.state, Target::Staged(_)) && !std::mem::replace(&mut self.hurried, true) {
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
            Ok(Packet { message, fds }) => self.tell(around, Event::Message(message, fds), outcomes),
            Err(ChannelError::Timeout) => Ok(()),
            Err(ChannelError::Codec(CodecError::Version(error))) => {
                self.tell(around, Event::Stranger(error), outcomes)
            }
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, %error, "the source makes no sense");
                    let reason = Refusal::Unusable { what: "a message", text: error.to_string() };
                    let refuse = Message::Refuse(Refuse { reasons: reason.into() });
                    // Whoever does not hear it sees the end of the connection.
                    let _ = link.send(&refuse, &[], PATIENCE);
                }
                self.closed(around, outcomes)
            }
        }
    }

    /// The connection is of no more use. Whether the source is dead is said first.
    fn closed(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        self.link = None;
        if self.process.has_exited() {
            self.tell(around, Event::Dead, outcomes)?;
        }
        self.tell(around, Event::Closed, outcomes)
    }

    /// The source is dead.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn died(&mut self, around: Around<'_>, outcomes: &mut Vec<Outcome>) -> Result<(), DeviceError> {
        // What it had said before is heard first.
        while let Some(link) = &self.link {
            match link.receive::<Message>(Duration::ZERO) {
                Ok(Packet { message, fds }) => self.tell(around, Event::Message(message, fds), outcomes)?,
                Err(_) => self.link = None,
            }
        }
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
        self.tell_at(around, Event::Time, now, outcomes)
    }

    fn tell(
        &mut self,
        around: Around<'_>,
        event: Event<OwnedFd, Box<Staged>>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        self.tell_at(around, event, now(), outcomes)
    }

    fn tell_at(
        &mut self,
        around: Around<'_>,
        event: Event<OwnedFd, Box<Staged>>,
        now: Duration,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.state, Target::Ended);
        let (state, actions) = state.step(event, &self.hello, now);
        self.state = state;
        if matches!(self.state, Target::Gathering { .. }) {
            baton_faults::pass(Point::TargetSessionGathering);
        }
        self.act(around, actions, outcomes)?;
        if matches!(self.state, Target::Ended)
            && let Some(before) = self.vhosts.take()
        {
            lock(around.dispatch).device.keep_vhosts(before);
        }
        Ok(())
    }

    fn act(
        &mut self,
        around: Around<'_>,
        actions: Vec<Action<OwnedFd, Box<Staged>>>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Judge(device, session) => {
                    let verdict = self.judge(around, device, *session);
                    if verdict.is_ok() {
                        baton_faults::pass(Point::TargetSessionJudged);
                    }
                    self.tell(around, Event::Judged(verdict), outcomes)?;
                }
                Action::Stage(stage, fds) => {
                    let Around { front, dispatch } = around;
                    let staged = stage::stage(dispatch, front, &self.wishes, self.same_user, *stage, fds);
                    let staged = staged.map(|(word, staged, shape)| {
                        self.word = Some(word);
                        (Box::new(staged), shape)
                    });
                    match &staged {
                        Ok(_) => baton_faults::pass(Point::TargetSessionStaged),
                        Err(reasons) => limited!(warn, %reasons, "a session is refused"),
                    }
                    self.tell(around, Event::Staged(staged), outcomes)?;
                }
                Action::Swap { from, to } => {
                    if to.owner == Owner::Target {
                        baton_faults::pass(Point::TargetSessionTaking);
                    }
                    let result = match &self.word {
                        Some(word) => word.swap(from, to).map_err(SwapError::word),
                        None => Err(None),
                    };
                    self.tell(around, Event::Swapped(result), outcomes)?;
                }
                Action::Look => {
                    let word = self.word.as_ref().and_then(|word| word.load().ok());
                    self.tell(around, Event::Seen(word), outcomes)?;
                }
                Action::Activate(staged, commit) => {
                    baton_faults::pass(Point::TargetSessionTaken);
                    self.activate(around, staged, &commit)?;
                    baton_faults::pass(Point::TargetSessionRunning);
                    self.tell(around, Event::Activated, outcomes)?;
                }
                Action::Recover(staged) => {
                    baton_faults::pass(Point::TargetSessionTaken);
                    lock(around.dispatch).device.inherit()?;
                    self.taken = Some(staged);
                    baton_faults::pass(Point::TargetSessionRunning);
                    self.tell(around, Event::Activated, outcomes)?;
                }
                Action::Listen => {
                    baton_faults::pass(Point::TargetSessionSettled);
                    self.listen_to_front(around, outcomes)?;
                }
                Action::Release(staged) => {
                    lock(around.dispatch).device.unstage()?;
                    drop(staged);
                    self.word = None;
                    limited!(info, "the session stays the source's");
                }
                Action::Abandon => {
                    let device = &mut lock(around.dispatch).device;
                    device.freeze(|_, _| Ok(0))?;
                    device.let_go()?;
                    self.taken = None;
                    outcomes.push(Outcome::Abandoned);
                }
                Action::Send(message) => {
                    if let Some(link) = &self.link
                        && let Err(error) = link.send(&message, &[], PATIENCE)
                    {
                        // The end of the connection will be seen.
                        limited!(warn, %error, "cannot send {}", message.name());
                    }
                    match message {
                        Message::Staged(_) => baton_faults::pass(Point::TargetSessionStagedSent),
                        Message::Active(_) => baton_faults::pass(Point::TargetSessionActiveSent),
                        _ => {}
                    }
                }
                // Once the event loop has the session, the source learns so from the end of the connection.
                Action::Close if matches!(self.state, Target::Active(_)) => {}
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    fn judge(
        &mut self,
        around: Around<'_>,
        device_state: DeviceState,
        session: SessionState,
    ) -> Result<(), Reasons> {
        let device = &mut lock(around.dispatch).device;
        let capabilities =
            stage::capabilities(device, around.front, &self.wishes, &device_state, self.same_user);
        let pairs = device_state.queue_pairs.len();
        CheckedSession::try_from((device_state, session, &capabilities))?;
        self.vhosts = Some(device.vhosts());
        if self.wishes.vhost_from_source {
            return Ok(());
        }
        // Opened now, while nobody waits.
        device.open_vhost(pairs).map_err(|error| Refusal::VhostNet(error.to_string()).into())
    }

    /// The session is ours: its rings run.
    fn activate(
        &mut self,
        around: Around<'_>,
        staged: Box<Staged>,
        commit: &CheckedCommit,
    ) -> Result<(), DeviceError> {
        let mut frames = Vec::new();
        for (pair, offset, length) in commit.frames() {
            match staged.frames.take(offset, length) {
                Ok(frame) => frames.push((pair, frame)),
                // The session is ours now, whatever becomes of a frame.
                Err(error) => limited!(warn, pair, %error, "the frame in hand is lost"),
            }
        }
        let said = commit.commit();
        lock(around.dispatch).device.take_over(&said.vrings, &said.pairs, frames)?;
        self.taken = Some(staged);
        Ok(())
    }

    fn listen_to_front(
        &mut self,
        around: Around<'_>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), DeviceError> {
        lock(around.dispatch).device.tidy()?;
        match &self.state {
            Target::Active(Taken::Committed(report)) => {
                let report = serde_json::to_string(&SessionReport::completed(report.clone()));
                limited!(info, report = report.unwrap_or_default(), "the session is ours");
            }
            _ => limited!(info, "the source is dead: the session is ours"),
        }
        if let Some(staged) = self.taken.take() {
            let Staged { session, device_state_moved, mut endpoint, .. } = *staged;
            lock(around.dispatch).handover.inherit_transfer(device_state_moved);
            endpoint.own();
            outcomes.push(Outcome::Taken { session: session.map(Box::new), endpoint });
        }
        Ok(())
    }
}
