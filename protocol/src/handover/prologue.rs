//! The prologue of every hand-over: HELLO both ways, PREPARE, READY. Nothing is handed over yet and no ownership word
//! is shared, so a failure has no effect beyond ending the hand-over.
//!
//! ```text
//!   source   Greeting ─HELLO─▶ Checking ─READY─▶ agreed
//!   target   Fresh ─HELLO─▶ Greeted ─PREPARE: judged, READY─▶ agreed
//! ```
//! In each state the peer has [`PATIENCE`] to answer. HELLO says what is to be handed over ([`Purpose`]). After READY
//! the state machines for that purpose take over.

use std::time::Duration;

use super::Phase;
use super::wire::message::{Hello, Message, Prepare, ReadyToTake, Refuse};
use super::wire::refusal::Refusal;
use crate::codec::Message as _;
use crate::end_reason::EndReason;
use crate::reasons::Reasons;
use crate::version::VersionError;

/// How long each side waits for an answer. Nothing has stopped yet, and on an overloaded host a process may get no
/// processor for seconds.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A device whose rings have stopped.
    Device,
    /// A running session.
    Session,
}

impl Purpose {
    /// Returns the name in [`Hello::purpose`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Session => "session",
        }
    }

    /// Returns the purpose with this name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Device, Self::Session].into_iter().find(|purpose| purpose.name() == name)
    }
}

/// An event for a source in the prologue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// The target process died. Follows its last message.
    Dead,
    /// Time has passed.
    Time,
    /// The operator cancelled.
    Cancel,
}

/// A source in the prologue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourcePrologue {
    /// HELLO is sent.
    Greeting {
        /// Only check whether the target would accept the hand-over.
        dry_run: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// PREPARE is sent.
    Checking {
        /// As in `Greeting`.
        dry_run: bool,
        /// The target asks for vhost-net instances.
        wants_vhost: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// The target is ready.
    Agreed {
        /// As in `Checking`.
        wants_vhost: bool,
    },
    /// The hand-over has ended.
    Ended {
        /// The phase in which it ended.
        phase: Phase,
        /// Why it ended.
        reason: EndReason,
    },
}

/// An action of a source. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send PREPARE with the current state of the device and the session.
    Prepare,
    /// Close the connection.
    Close,
}

impl SourcePrologue {
    /// Starts on a new connection. Returns the state and the HELLO to send.
    pub fn begin(purpose: Purpose, program: &str, dry_run: bool, now: Duration) -> (Self, Message) {
        let purpose = purpose.name().to_owned();
        let hello = Hello { purpose, program: program.to_owned(), dry_run, wants_vhost: false };
        (Self::Greeting { dry_run, deadline: now + PATIENCE }, Message::Hello(hello))
    }

    /// Returns when [`SourceEvent::Time`] is due, if ever.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. } | Self::Checking { deadline, .. } => Some(*deadline),
            Self::Agreed { .. } | Self::Ended { .. } => None,
        }
    }

    /// Returns the next state and the actions to carry out. `now` is the time of the event.
    #[must_use]
    pub fn step(self, event: SourceEvent, now: Duration) -> (Self, Vec<SourceAction>) {
        match (self, event) {
            (Self::Greeting { dry_run, .. }, SourceEvent::Message(Message::Hello(hello))) => {
                let wants_vhost = hello.wants_vhost;
                let state = Self::Checking { dry_run, wants_vhost, deadline: now + PATIENCE };
                (state, vec![SourceAction::Prepare])
            }
            (Self::Checking { dry_run: true, .. }, SourceEvent::Message(Message::Ready(_))) => {
                Self::end(Phase::Check, EndReason::Possible)
            }
            (Self::Checking { wants_vhost, .. }, SourceEvent::Message(Message::Ready(_))) => {
                (Self::Agreed { wants_vhost }, Vec::new())
            }
            (state @ (Self::Greeting { .. } | Self::Checking { .. }), event) => state.other(event, now),
            (state, _) => (state, Vec::new()),
        }
    }

    /// Handles every event but the expected answer.
    fn other(self, event: SourceEvent, now: Duration) -> (Self, Vec<SourceAction>) {
        let phase = if matches!(self, Self::Greeting { .. }) { Phase::Greet } else { Phase::Check };
        let reason = match event {
            SourceEvent::Message(message) => unexpected(message),
            SourceEvent::Closed => EndReason::Closed,
            SourceEvent::Dead => EndReason::Dead,
            SourceEvent::Cancel => EndReason::Cancelled,
            SourceEvent::Time if self.deadline().is_some_and(|deadline| now >= deadline) => EndReason::Silent,
            SourceEvent::Time => return (self, Vec::new()),
        };
        Self::end(phase, reason)
    }

    fn end(phase: Phase, reason: EndReason) -> (Self, Vec<SourceAction>) {
        (Self::Ended { phase, reason }, vec![SourceAction::Close])
    }
}

/// Returns the end reason for an unexpected message from the target.
pub(super) fn unexpected(message: Message) -> EndReason {
    match message {
        Message::Refuse(refuse) => EndReason::Refused(refuse.reasons.bounded()),
        message => EndReason::Wrong(message.name()),
    }
}

/// An event for a target in the prologue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or the peer sent an invalid message.
    Closed,
    /// A message arrived from a peer with no version in common.
    Stranger(VersionError),
    /// The source process died. Follows its last message.
    Dead,
    /// Time has passed.
    Time,
    /// The answer to [`TargetAction::Judge`].
    Judged(Result<(), Reasons>),
}

/// What a target reports about itself in its HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Program and version, for the log.
    pub program: String,
    /// The target uses vhost-net but may not open it: the source of a session provides the instances.
    pub wants_vhost: bool,
}

/// A target in the prologue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPrologue {
    /// A source has connected.
    Fresh {
        /// The contents of the target's HELLO.
        own: Introduction,
        /// When to give up.
        deadline: Duration,
    },
    /// HELLO is answered.
    Greeted {
        /// What is to be handed over.
        purpose: Purpose,
        /// When to give up.
        deadline: Duration,
    },
    /// READY is sent.
    Agreed(Purpose),
    /// This hand-over has ended.
    Ended,
}

/// An action of a target. Actions are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Check whether the target can take what PREPARE describes, then report [`TargetEvent::Judged`].
    Judge(Purpose, Prepare),
    /// Send this message.
    Send(Message),
    /// Close the connection.
    Close,
}

impl TargetPrologue {
    /// Starts on a new connection.
    pub fn begin(own: Introduction, now: Duration) -> Self {
        Self::Fresh { own, deadline: now + PATIENCE }
    }

    /// Returns when [`TargetEvent::Time`] is due, if ever.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Fresh { deadline, .. } | Self::Greeted { deadline, .. } => Some(*deadline),
            Self::Agreed(_) | Self::Ended => None,
        }
    }

    /// Returns the next state and the actions to carry out. `now` is the time of the event.
    #[must_use]
    pub fn step(self, event: TargetEvent, now: Duration) -> (Self, Vec<TargetAction>) {
        match (self, event) {
            (Self::Fresh { own, .. }, TargetEvent::Message(Message::Hello(hello))) => {
                Self::greet(hello, own, now)
            }
            (Self::Fresh { .. }, TargetEvent::Stranger(error)) => Self::refuse(Refusal::from(error).into()),
            (Self::Greeted { purpose, .. }, TargetEvent::Message(Message::Prepare(prepare))) => {
                if purpose == Purpose::Session && prepare.session.is_none() {
                    return Self::refuse(Refusal::NoSession.into());
                }
                let state = Self::Greeted { purpose, deadline: now + PATIENCE };
                (state, vec![TargetAction::Judge(purpose, prepare)])
            }
            (Self::Greeted { purpose, .. }, TargetEvent::Judged(Ok(()))) => {
                (Self::Agreed(purpose), vec![TargetAction::Send(Message::Ready(ReadyToTake {}))])
            }
            (Self::Greeted { .. }, TargetEvent::Judged(Err(reasons))) => Self::refuse(reasons),
            (state @ (Self::Fresh { .. } | Self::Greeted { .. }), event) => {
                let over = match event {
                    TargetEvent::Time => state.deadline().is_some_and(|deadline| now >= deadline),
                    TargetEvent::Judged(_) => false,
                    _ => true,
                };
                if over { (Self::Ended, vec![TargetAction::Close]) } else { (state, Vec::new()) }
            }
            (state, _) => (state, Vec::new()),
        }
    }

    fn greet(hello: Hello, own: Introduction, now: Duration) -> (Self, Vec<TargetAction>) {
        let Some(purpose) = Purpose::of(&hello.purpose) else {
            let purpose = hello.purpose.chars().filter(|c| !c.is_control()).take(64).collect();
            return Self::refuse(Refusal::Purpose(purpose).into());
        };
        let answer = Hello {
            program: own.program,
            wants_vhost: own.wants_vhost && purpose == Purpose::Session,
            ..hello
        };
        let state = Self::Greeted { purpose, deadline: now + PATIENCE };
        (state, vec![TargetAction::Send(Message::Hello(answer))])
    }

    fn refuse(reasons: Reasons) -> (Self, Vec<TargetAction>) {
        (Self::Ended, vec![TargetAction::Send(Message::Refuse(Refuse { reasons })), TargetAction::Close])
    }
}
