//! The prologue of either kind of hand-over, on the source ([`Asking`]) and the target ([`Answering`]). Carries out
//! what [`baton_protocol::handover::prologue`] decides. Once both have agreed, [`super::Handovers`] switches to the
//! next role.

use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket, Packet};
use baton_channel::peer::PeerProcess;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::{CodecError, Message as _};
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus, SessionReport};
use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::prologue::{
    Introduction, Purpose, SourceAction, SourceEvent, SourcePrologue, TargetAction, TargetEvent,
    TargetPrologue,
};
use baton_protocol::handover::wire::message::{Message, Prepare, Refuse};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::reasons::Reasons;

use super::agreed::{AgreedSource, AgreedTarget};
use super::device::snapshot as device_snapshot;
use super::device::target as device_target;
use super::session::{snapshot as session_snapshot, target as session_target};
use super::{Context, PROCESS, PROGRAM, SOURCE_NAME, now, source_status};
use crate::control::{self, Call};
use crate::events::Watched;

/// How long to wait while the socket is full: a peer that fills it must not block the event loop.
const PATIENCE: Duration = Duration::ZERO;

/// The most messages to read from a source in a row.
const MESSAGES: usize = 8;

/// Sends a refusal to a source that has connected.
pub fn refuse(link: &MessageSocket, refusal: Refusal) {
    let message = Message::Refuse(Refuse { reasons: refusal.into() });
    // If this fails, the source still sees the connection close.
    let _ = link.send(&message, &[], PATIENCE);
}

/// A source that asks a target whether it will take the device or the session.
#[derive(Debug)]
pub struct Asking {
    /// The state of the prologue.
    pub prologue: SourcePrologue,
    /// What the source wants to hand over.
    pub purpose: Purpose,
    target: AgreedTarget,
}

impl Asking {
    /// Starts the prologue by sending HELLO.
    pub fn begin(
        cx: &Context<'_>,
        purpose: Purpose,
        link: Watched<MessageSocket>,
        process: Option<Watched<PeerProcess>>,
        peer: String,
        call: Call,
    ) -> Self {
        let began = now();
        let (prologue, hello) = SourcePrologue::begin(purpose, PROGRAM, call.is_dry_run(), began);
        let target = AgreedTarget { link: Some(link), process, peer, call: Some(call), began };
        let mut asking = Self { prologue, purpose, target };
        asking.send(cx, &hello);
        asking
    }

    /// Returns the target, which has agreed.
    pub fn into_target(self) -> AgreedTarget {
        self.target
    }

    /// Returns the target's path.
    pub fn peer(&self) -> &str {
        &self.target.peer
    }

    /// Returns the status.
    pub fn status(&self) -> HandoverStatus {
        match &self.prologue {
            SourcePrologue::Ended { reason, .. } => source_status(&self.target.peer, reason),
            _ => HandoverStatus {
                state: HandoverState::Checking,
                peer: self.target.peer.clone(),
                epoch: None,
                reason: None,
            },
        }
    }

    /// Handles the target's next message.
    pub fn listen(&mut self, cx: &Context<'_>) {
        let Some(link) = &self.target.link else { return };
        match link.receive::<Message>(Duration::ZERO) {
            // The target's messages have no descriptors. Any that arrived are closed here.
            Ok(packet) => self.tell(cx, SourceEvent::Message(packet.message), now()),
            Err(ChannelError::Timeout) => {}
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, peer = self.target.peer, %error, "invalid message from the target");
                }
                self.closed(cx);
            }
        }
    }

    /// Handles the end of the connection. If the target is dead, reports its death first.
    fn closed(&mut self, cx: &Context<'_>) {
        self.target.link = None;
        if self.target.process.take_if(|process| process.has_exited()).is_some() {
            self.tell(cx, SourceEvent::Dead, now());
        }
        self.tell(cx, SourceEvent::Closed, now());
    }

    /// Handles the death of the target's process, after the messages that it sent before.
    pub fn died(&mut self, cx: &Context<'_>) {
        while let Some(link) = &self.target.link {
            match link.receive::<Message>(Duration::ZERO) {
                Ok(packet) => self.tell(cx, SourceEvent::Message(packet.message), now()),
                Err(_) => self.target.link = None,
            }
        }
        self.target.process = None;
        self.tell(cx, SourceEvent::Dead, now());
    }

    /// Handles a timeout at time `now`.
    pub fn on_time(&mut self, cx: &Context<'_>, now: Duration) {
        self.tell(cx, SourceEvent::Time, now);
    }

    /// Cancels the hand-over.
    pub fn cancel(&mut self, cx: &Context<'_>) {
        self.tell(cx, SourceEvent::Cancel, now());
    }

    fn tell(&mut self, cx: &Context<'_>, event: SourceEvent, now: Duration) {
        let (prologue, actions) = self.prologue.clone().step(event, now);
        self.prologue = prologue;
        for action in actions {
            match action {
                SourceAction::Prepare => {
                    let prepare = self.prepare(cx);
                    self.send(cx, &Message::Prepare(prepare));
                }
                SourceAction::Close => self.target.link = None,
            }
        }
        self.report();
    }

    fn prepare(&self, cx: &Context<'_>) -> Prepare {
        let session = match self.purpose {
            Purpose::Device => None,
            Purpose::Session => {
                baton_faults::pass(Point::SourceSessionGreeted);
                Some(Box::new(session_snapshot::describe(cx)))
            }
        };
        Prepare { device: device_snapshot::describe(cx.device, cx.device.tap(), &[]), session }
    }

    fn send(&mut self, cx: &Context<'_>, message: &Message) {
        let Some(link) = &self.target.link else { return };
        match link.send(message, &[], PATIENCE) {
            // The end of the connection is handled after the target's last message.
            Ok(()) | Err(ChannelError::Closed) => {}
            Err(error) => {
                limited!(warn, peer = self.target.peer, %error, "cannot send {}", message.name());
                self.closed(cx);
            }
        }
    }

    /// Reports a failed or dry-run hand-over to the operator and in the log.
    fn report(&mut self) {
        let SourcePrologue::Ended { phase, reason } = &self.prologue else { return };
        let Some(call) = self.target.call.take() else { return };
        limited!(info, peer = self.target.peer, %reason, "hand-over ended, nothing was handed over");
        let answer = match (reason, self.purpose) {
            (EndReason::Possible, _) => control::answer(&HandoverReply::POSSIBLE),
            (reason, Purpose::Session) if !call.is_dry_run() => {
                let (phase, reason) = (phase.name().to_owned(), reason.to_string());
                control::answer(&SessionReport::RolledBack { phase, reason })
            }
            (reason, _) => Err(control::refusal(reason.to_string())),
        };
        call.answer(answer);
    }
}

/// A target to which a source has connected.
#[derive(Debug)]
pub struct Answering {
    /// The state of the prologue.
    pub prologue: TargetPrologue,
    source: AgreedSource,
}

impl Answering {
    /// Starts the prologue, in which the target waits for HELLO.
    pub fn begin(link: Watched<MessageSocket>, same_user: bool, wants_vhost: bool) -> Self {
        let own = Introduction { program: PROGRAM.to_owned(), wants_vhost };
        let prologue = TargetPrologue::begin(own, now());
        let source = AgreedSource { link: Some(link), process: None, same_user, vhosts: None };
        Self { prologue, source }
    }

    /// Returns the source, with which this target has agreed.
    pub fn into_source(self) -> AgreedSource {
        self.source
    }

    /// Returns the status.
    pub fn status(&self) -> HandoverStatus {
        HandoverStatus {
            state: HandoverState::Checking,
            peer: SOURCE_NAME.to_owned(),
            epoch: None,
            reason: None,
        }
    }

    /// Handles the source's next message.
    pub fn listen(&mut self, cx: &mut Context<'_>) {
        let Some(link) = &self.source.link else { return };
        match link.receive::<Message>(Duration::ZERO) {
            // Messages of the prologue have no descriptors. Any that arrived are closed here.
            Ok(Packet { message, .. }) => match self.watch_source(cx, &message) {
                Ok(()) => self.tell(cx, TargetEvent::Message(message), now()),
                Err(error) => {
                    limited!(warn, %error, "cannot watch the source's process");
                    self.invalid(cx, "the source", &error);
                }
            },
            Err(ChannelError::Timeout) => {}
            Err(ChannelError::Codec(CodecError::Version(error))) => {
                limited!(warn, %error, "a source has no protocol version in common");
                self.tell(cx, TargetEvent::Stranger(error), now());
            }
            Err(ChannelError::Closed) => self.closed(cx),
            Err(error) => {
                limited!(warn, %error, "invalid message from the source");
                self.invalid(cx, "a message", &error);
            }
        }
    }

    /// Handles all messages that the source has sent, up to the number that one hand-over takes.
    pub fn hear_out(&mut self, cx: &mut Context<'_>) {
        for _ in 0..MESSAGES {
            self.listen(cx);
        }
    }

    /// Watches the source of a session from its HELLO on: the target may have to take over when the source dies.
    fn watch_source(&mut self, cx: &Context<'_>, message: &Message) -> std::io::Result<()> {
        let Message::Hello(hello) = message else { return Ok(()) };
        if self.source.process.is_some() || Purpose::of(&hello.purpose) != Some(Purpose::Session) {
            return Ok(());
        }
        let Some(link) = &self.source.link else { return Ok(()) };
        baton_faults::point(Point::TargetSessionArrived)?;
        self.source.process = Some(Watched::new(PeerProcess::of(&**link)?, cx.epoll, PROCESS)?);
        Ok(())
    }

    fn invalid(&mut self, cx: &mut Context<'_>, what: &'static str, error: &dyn std::error::Error) {
        if let Some(link) = &self.source.link {
            refuse(link, Refusal::Unusable { what, text: error.to_string() });
        }
        self.closed(cx);
    }

    /// Handles the end of the connection.
    fn closed(&mut self, cx: &mut Context<'_>) {
        self.source.link = None;
        self.tell(cx, TargetEvent::Closed, now());
    }

    /// Handles the death of the source's process.
    pub fn died(&mut self, cx: &mut Context<'_>) {
        self.source.process = None;
        self.tell(cx, TargetEvent::Dead, now());
    }

    /// Handles a timeout at time `now`.
    pub fn on_time(&mut self, cx: &mut Context<'_>, now: Duration) {
        self.tell(cx, TargetEvent::Time, now);
    }

    fn tell(&mut self, cx: &mut Context<'_>, event: TargetEvent, now: Duration) {
        let (prologue, actions) = self.prologue.clone().step(event, now);
        self.prologue = prologue;
        for action in actions {
            match action {
                TargetAction::Judge(purpose, prepare) => {
                    let verdict = self.judge(cx, purpose, prepare);
                    self.tell(cx, TargetEvent::Judged(verdict), super::now());
                }
                TargetAction::Send(message) => {
                    if let Some(link) = &self.source.link
                        && let Err(error) = link.send(&message, &[], PATIENCE)
                    {
                        // If the connection has ended, the next read reports it.
                        limited!(warn, %error, "cannot send {}", message.name());
                    }
                }
                TargetAction::Close => self.source.link = None,
            }
        }
        if self.prologue == TargetPrologue::Ended
            && let Some(before) = self.source.vhosts.take()
        {
            cx.device.keep_vhosts(before);
        }
    }

    fn judge(&mut self, cx: &mut Context<'_>, purpose: Purpose, prepare: Prepare) -> Result<(), Reasons> {
        let Prepare { device, session } = prepare;
        match (purpose, session) {
            (Purpose::Device, _) => {
                device_target::judge(cx.device, cx.options, self.source.same_user, device)
            }
            (Purpose::Session, Some(session)) => {
                self.source.vhosts = Some(cx.device.vhosts());
                session_target::judge(cx, self.source.same_user, device, *session)?;
                baton_faults::pass(Point::TargetSessionJudged);
                Ok(())
            }
            (Purpose::Session, None) => Err(Refusal::NoSession.into()),
        }
    }
}
