//! How every hand-over begins: HELLO both ways, PREPARE, READY. Nothing is handed over yet and no word is shared, so any
//! failure ends the hand-over, and nothing else.
//!
//! ```text
//!   source   Greeting ─HELLO─▶ Checking ─READY─▶ agreed
//!   target   Fresh ─HELLO─▶ Greeted ─PREPARE: judged, READY─▶ agreed
//! ```
//! In each state the peer may take [`PATIENCE`]. HELLO says what is to be handed over ([`Purpose`]); from READY on the
//! machines of that purpose go on.

use std::time::Duration;

use super::Phase;
use super::wire::message::{Hello, Message, Prepare, ReadyToTake, Refuse};
use super::wire::refusal::Refusal;
use crate::codec::Message as _;
use crate::end_reason::EndReason;
use crate::reasons::Reasons;
use crate::version::VersionError;

/// How long the peer may take for each answer.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// What is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A device whose rings have stopped.
    Device,
    /// A running session.
    Session,
}

impl Purpose {
    /// The word in [`Hello::purpose`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Session => "session",
        }
    }

    /// The purpose with this name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::Device, Self::Session].into_iter().find(|purpose| purpose.name() == name)
    }
}

/// What happens to a source that has not agreed with its target yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// The target's process ended. Comes after its last message.
    Dead,
    /// Time passed.
    Time,
    /// The operator cancelled.
    Cancel,
}

/// A source that has not agreed with its target yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourcePrologue {
    /// HELLO is sent.
    Greeting {
        /// Only to find out whether the target would take it.
        dry_run: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// PREPARE is sent.
    Checking {
        /// As in `Greeting`.
        dry_run: bool,
        /// The target wants the source to send instances of vhost-net.
        wants_vhost: bool,
        /// When to give up.
        deadline: Duration,
    },
    /// The target is ready to take it.
    Agreed {
        /// As in `Checking`.
        wants_vhost: bool,
    },
    /// It is over.
    Ended {
        /// How far it was.
        phase: Phase,
        /// Why.
        reason: EndReason,
    },
}

/// What a source does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send device and session as they are now in a PREPARE.
    Prepare,
    /// Close the connection.
    Close,
}

impl SourcePrologue {
    /// Begins on a fresh connection, with the HELLO to send.
    pub fn begin(purpose: Purpose, program: &str, dry_run: bool, now: Duration) -> (Self, Message) {
        let purpose = purpose.name().to_owned();
        let hello = Hello { purpose, program: program.to_owned(), dry_run, wants_vhost: false };
        (Self::Greeting { dry_run, deadline: now + PATIENCE }, Message::Hello(hello))
    }

    /// When [`SourceEvent::Time`] matters.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Greeting { deadline, .. } | Self::Checking { deadline, .. } => Some(*deadline),
            Self::Agreed { .. } | Self::Ended { .. } => None,
        }
    }

    /// The next state, and what to do. `now` is the time of the event.
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

    /// Everything but the answer that it waits for.
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

/// What it means that the target sent this instead of what the source waits for.
pub(super) fn unexpected(message: Message) -> EndReason {
    match message {
        Message::Refuse(refuse) => EndReason::Refused(refuse.reasons.bounded()),
        message => EndReason::Wrong(message.name()),
    }
}

/// What happens to a target that has not agreed with a source yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// A message arrived.
    Message(Message),
    /// The connection ended, or brought something that is not a message.
    Closed,
    /// A message arrived in a version that this build does not understand.
    Stranger(VersionError),
    /// The source's process ended. Comes after its last message.
    Dead,
    /// Time passed.
    Time,
    /// The answer to [`TargetAction::Judge`].
    Judged(Result<(), Reasons>),
}

/// What a target says of itself in its HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Program and version, for the log.
    pub program: String,
    /// The target uses vhost-net and may not open it: a source of a session sends the instances.
    pub wants_vhost: bool,
}

/// A target that has not agreed with a source yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPrologue {
    /// A source has connected.
    Fresh {
        /// What the target answers.
        own: Introduction,
        /// When to give up.
        deadline: Duration,
    },
    /// HELLO is answered.
    Greeted {
        /// What the source wants to hand over.
        purpose: Purpose,
        /// When to give up.
        deadline: Duration,
    },
    /// READY is sent.
    Agreed(Purpose),
    /// Nothing more comes of this connection.
    Ended,
}

/// What a target does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Judge whether the target would take this, and report with [`TargetEvent::Judged`].
    Judge(Purpose, Prepare),
    /// Send this.
    Send(Message),
    /// Close the connection.
    Close,
}

impl TargetPrologue {
    /// Begins on a fresh connection.
    pub fn begin(own: Introduction, now: Duration) -> Self {
        Self::Fresh { own, deadline: now + PATIENCE }
    }

    /// When [`TargetEvent::Time`] matters.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Fresh { deadline, .. } | Self::Greeted { deadline, .. } => Some(*deadline),
            Self::Agreed(_) | Self::Ended => None,
        }
    }

    /// The next state, and what to do. `now` is the time of the event.
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
