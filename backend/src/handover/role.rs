//! The part that this process has in a hand-over: one [`Role`] at a time.

use std::time::Duration;

use baton_protocol::control::HandoverStatus;
use baton_protocol::handover::prologue::{Purpose, SourcePrologue, TargetPrologue};

use super::device::source::DeviceSource;
use super::device::target::DeviceTarget;
use super::prologue::{Answering, Asking};
use super::session::source::SessionSource;
use super::session::target::SessionTarget;
use super::{Context, SOURCE_NAME};
use crate::device::DeviceError;

/// The role. [`Self::advance`] switches to the next one.
#[derive(Debug, Default)]
pub(super) enum Role {
    #[default]
    Idle,
    /// A source in the prologue.
    Asking(Box<Asking>),
    /// A target in the prologue.
    Answering(Box<Answering>),
    DeviceSource(Box<DeviceSource>),
    DeviceTarget(Box<DeviceTarget>),
    SessionSource(Box<SessionSource>),
    SessionTarget(Box<SessionTarget>),
}

impl Role {
    /// Returns whether there is no hand-over.
    pub fn is_idle(&self) -> bool {
        matches!(self, Self::Idle)
    }

    /// Handles the peer's next message.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn listen(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        match self {
            Self::Idle => Ok(()),
            Self::Asking(asking) => {
                asking.listen(cx);
                Ok(())
            }
            Self::Answering(answering) => {
                answering.listen(cx);
                Ok(())
            }
            Self::DeviceSource(source) => source.listen(cx.device).map(drop),
            Self::DeviceTarget(target) => target.listen(cx.device, cx.options),
            Self::SessionSource(source) => source.listen(cx),
            Self::SessionTarget(target) => target.listen(cx),
        }
    }

    /// Handles all messages that a source has sent, to learn whether it has left before the next one is accepted.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn hear_out(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        match self {
            Self::Answering(answering) => {
                answering.hear_out(cx);
                Ok(())
            }
            Self::DeviceTarget(target) => target.hear_out(cx.device, cx.options),
            _ => Ok(()),
        }
    }

    /// Handles the death of the peer's process.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn died(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        match self {
            Self::Asking(asking) => asking.died(cx),
            Self::Answering(answering) => answering.died(cx),
            Self::SessionSource(source) => source.died(cx)?,
            Self::SessionTarget(target) => target.died(cx)?,
            Self::Idle | Self::DeviceSource(_) | Self::DeviceTarget(_) => {}
        }
        Ok(())
    }

    /// Returns when [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Asking(asking) => asking.prologue.deadline(),
            Self::Answering(answering) => answering.prologue.deadline(),
            Self::SessionSource(source) => source.deadline(),
            Self::SessionTarget(target) => target.deadline(),
            Self::Idle | Self::DeviceSource(_) | Self::DeviceTarget(_) => None,
        }
    }

    /// Handles a timeout at time `now`.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn on_time(&mut self, cx: &mut Context<'_>, now: Duration) -> Result<(), DeviceError> {
        match self {
            Self::Asking(asking) => asking.on_time(cx, now),
            Self::Answering(answering) => answering.on_time(cx, now),
            Self::SessionSource(source) => source.on_time(cx, now)?,
            Self::SessionTarget(target) => target.on_time(cx, now)?,
            Self::Idle | Self::DeviceSource(_) | Self::DeviceTarget(_) => {}
        }
        Ok(())
    }

    /// While no frame moves, briefly waits for the peer's next message, which is faster than using the event loop.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn hurry(&mut self, cx: &mut Context<'_>) -> Result<(), DeviceError> {
        match self {
            Self::SessionSource(source) => source.hurry(cx),
            Self::SessionTarget(target) => target.hurry(cx),
            _ => Ok(()),
        }
    }

    /// Switches to the next role if this one has ended. Returns the final status of a source that keeps the device or
    /// the session.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn advance(&mut self, cx: &mut Context<'_>) -> Result<Option<HandoverStatus>, DeviceError> {
        match self {
            Self::Asking(asking) => {
                if let SourcePrologue::Agreed { wants_vhost } = asking.prologue {
                    return self.become_source(cx, wants_vhost);
                }
            }
            Self::Answering(answering) => {
                if let TargetPrologue::Agreed(purpose) = answering.prologue {
                    self.become_target(cx, purpose);
                }
            }
            _ => {}
        }
        Ok(self.end())
    }

    fn become_source(
        &mut self,
        cx: &mut Context<'_>,
        wants_vhost: bool,
    ) -> Result<Option<HandoverStatus>, DeviceError> {
        let Self::Asking(asking) = std::mem::take(self) else { return Ok(None) };
        match asking.purpose {
            Purpose::Device => match DeviceSource::armed(asking.into_target()) {
                Ok(source) => *self = Self::DeviceSource(Box::new(source)),
                Err(status) => return Ok(Some(status)),
            },
            Purpose::Session => {
                let mut source = Box::new(SessionSource::new(asking.into_target()));
                source.stage(cx, wants_vhost)?;
                *self = Self::SessionSource(source);
            }
        }
        Ok(self.end())
    }

    fn become_target(&mut self, cx: &Context<'_>, purpose: Purpose) {
        let Self::Answering(answering) = std::mem::take(self) else { return };
        *self = match purpose {
            Purpose::Device => {
                Self::DeviceTarget(Box::new(DeviceTarget::ready(answering.into_source(), cx.device)))
            }
            Purpose::Session => Self::SessionTarget(Box::new(SessionTarget::ready(answering.into_source()))),
        };
    }

    /// Becomes idle if this role has ended. Returns the final status of a source that keeps the device or the session.
    pub fn end(&mut self) -> Option<HandoverStatus> {
        let (over, tells) = match self {
            Self::Idle => (false, false),
            Self::Asking(asking) => (matches!(asking.prologue, SourcePrologue::Ended { .. }), true),
            Self::Answering(answering) => (answering.prologue == TargetPrologue::Ended, false),
            Self::DeviceSource(source) => (source.is_over(), !source.is_forgotten()),
            Self::DeviceTarget(target) => (target.is_over(), false),
            Self::SessionSource(source) => (source.is_over(), true),
            Self::SessionTarget(target) => (target.is_over(), false),
        };
        if !over {
            return None;
        }
        let status = self.status().filter(|_| tells);
        *self = Self::Idle;
        status
    }

    /// Returns the status, or `None` if there is no hand-over.
    pub fn status(&self) -> Option<HandoverStatus> {
        match self {
            Self::Idle => None,
            Self::Asking(asking) => Some(asking.status()),
            Self::Answering(answering) => Some(answering.status()),
            Self::DeviceSource(source) => Some(source.status()),
            Self::DeviceTarget(target) => Some(target.status()),
            Self::SessionSource(source) => Some(source.status()),
            Self::SessionTarget(target) => Some(target.status()),
        }
    }

    /// Returns the peer, if the device or session may be moving to or from it.
    pub fn peer(&self) -> Option<&str> {
        match self {
            Self::Idle | Self::Answering(_) | Self::DeviceTarget(_) => None,
            Self::Asking(asking) => Some(asking.peer()),
            Self::DeviceSource(source) => Some(source.peer()),
            Self::SessionSource(source) => Some(source.peer()),
            Self::SessionTarget(_) => Some(SOURCE_NAME),
        }
    }

    /// Returns whether the process may end once no front-end is connected.
    pub fn is_done(&self) -> bool {
        match self {
            Self::DeviceSource(source) => source.is_done(),
            Self::SessionSource(source) => source.is_done(),
            _ => false,
        }
    }
}
