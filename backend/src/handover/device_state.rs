//! Device state that the front-end moves (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`): over a socket for packets it is an
//! offer of the device, over anything else the state alone.

use std::fs::File;

use baton_channel::packet::PacketSocket;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::handover::message::{Message, StateOnly};
use baton_protocol::handover::validate::check_without_tap;
use virtio_bindings::virtio_net;

use super::error::{DeviceStateError, HandoverError};
use super::source::SourceEnd;
use super::target::TargetEnd;
use super::transfer::{Outcome, Route, Running};
use super::{Handover, SOURCE, Surroundings, snapshot};
use crate::args::DeviceState as Permission;
use crate::device::{Device, DeviceError};
use crate::events::Events;

/// The transfer of device state that the front-end asked for last.
#[derive(Debug)]
pub(super) enum Transfer {
    /// None was asked for.
    None,
    /// A thread is at it.
    Running(Running),
    /// It is over.
    Over(Result<(), DeviceStateError>),
}

impl Handover {
    /// Whether a transfer of device state runs: [`Self::check_device_state`] must wait.
    pub fn is_transferring(&self) -> bool {
        matches!(self.transfer, Transfer::Running(_))
    }

    fn check_transfer(&self, device: &Device) -> Result<(), DeviceStateError> {
        if !device.suspended() {
            return Err(DeviceStateError::NotSuspended);
        }
        if self.is_transferring() { Err(DeviceStateError::UnderWay) } else { Ok(()) }
    }

    /// That this front-end may give what it gave.
    fn check_permitted(&self, route: &Route) -> Result<(), DeviceStateError> {
        match (self.wishes.device_state, route) {
            (Some(Permission::Off), _) => Err(DeviceStateError::Off),
            (Some(Permission::Pipe), Route::Socket(_)) => Err(DeviceStateError::StateOnly),
            (None, Route::Socket(_)) if !self.frontend_trusted => Err(DeviceStateError::StateOnly),
            _ => Ok(()),
        }
    }

    /// `SET_DEVICE_STATE_FD`, save.
    ///
    /// # Errors
    /// [`DeviceStateError`]; the device is as before.
    pub fn save_device_state(&mut self, device: &mut Device, fd: File) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::SourceBackendSaving).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        let route = Route::from(fd);
        self.check_permitted(&route)?;
        match route {
            Route::Pipe(pipe) => {
                let message = Message::Device(StateOnly { device: snapshot::describe_alone(device) });
                self.transfer = Transfer::Running(self.threads.save(pipe, &message)?);
            }
            Route::Socket(socket) => {
                self.check_free(device).map_err(|error| match error {
                    HandoverError::UnderWay(_) => DeviceStateError::Busy,
                    other => other.into(),
                })?;
                let (link, theirs) = PacketSocket::pair().map_err(HandoverError::from)?;
                self.epoll.add(&link, Events::EPOLLIN, SOURCE).map_err(HandoverError::from)?;
                let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
                let end = SourceEnd::new(link, "the front-end's device state".to_owned())?;
                let sent = self.source.insert(end).offer_over(device, around, socket, theirs);
                let sent = sent.map_err(|error| DeviceStateError::Failed(error.to_string()))?;
                let result = if sent {
                    Ok(())
                } else {
                    Err(DeviceStateError::Failed("the device state could not be sent".to_owned()))
                };
                self.transfer = Transfer::Over(result);
            }
        }
        Ok(())
    }

    /// `SET_DEVICE_STATE_FD`, load.
    ///
    /// # Errors
    /// [`DeviceStateError`]; the device is as before.
    pub fn load_device_state(&mut self, device: &Device, fd: File) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::TargetBackendLoading).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        let route = Route::from(fd);
        self.check_permitted(&route)?;
        if matches!(route, Route::Socket(_)) {
            if device.tap().is_some() || self.incoming.is_none() {
                return Err(DeviceStateError::AlreadyInitialised);
            }
            if self.is_occupied() || self.live.is_some() {
                return Err(DeviceStateError::Busy);
            }
        }
        self.transfer = Transfer::Running(self.threads.load(route)?);
        Ok(())
    }

    /// `CHECK_DEVICE_STATE`, once no transfer runs.
    ///
    /// # Errors
    /// How the last transfer failed.
    pub fn check_device_state(&mut self) -> Result<(), DeviceStateError> {
        match std::mem::replace(&mut self.transfer, Transfer::None) {
            Transfer::Over(result) => {
                if let (Ok(()), Some(source)) = (&result, &mut self.source) {
                    source.set_known();
                }
                result
            }
            other => {
                self.transfer = other;
                Err(DeviceStateError::None)
            }
        }
    }

    /// Whether the last transfer succeeded, if it is over and [`Self::check_device_state`] has not told.
    pub fn device_state_moved(&self) -> Option<bool> {
        match &self.transfer {
            Transfer::Over(result) => Some(result.is_ok()),
            Transfer::None | Transfer::Running(_) => None,
        }
    }

    /// Takes over how a transfer ended that another process has made for this front-end.
    pub fn inherit_transfer(&mut self, moved: Option<bool>) {
        self.transfer = match moved {
            None => Transfer::None,
            Some(true) => Transfer::Over(Ok(())),
            Some(false) => Transfer::Over(Err(DeviceStateError::BeforeHandover)),
        };
    }

    pub(super) fn on_mail(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        while let Some(letter) = self.mail.take() {
            // One that was given up is nobody's any more.
            if !matches!(&self.transfer, Transfer::Running(running) if running.sent(&letter)) {
                continue;
            }
            let result = match letter.outcome {
                Outcome::Saved(result) => result.map_err(DeviceStateError::from),
                Outcome::Read(Ok(Message::Device(StateOnly { device: state }))) => {
                    // The guest's MAC and MTU can be the front-end's own matter.
                    let config = [virtio_net::VIRTIO_NET_F_MAC, virtio_net::VIRTIO_NET_F_MTU];
                    let offered = device.offer().with(&config);
                    check_without_tap(&state, offered.0)
                        .map_err(|reasons| DeviceStateError::Failed(reasons.to_string()))
                }
                Outcome::Read(Ok(other)) => Err(DeviceStateError::Failed(format!(
                    "the device state begins with {}, which needs a socket for packets",
                    other.name()
                ))),
                Outcome::Received(Ok((packet, sender))) => {
                    let around = Surroundings { epoll: &self.epoll, now: self.began.elapsed() };
                    match TargetEnd::offered(packet, sender, device, &self.wishes, around)? {
                        Ok(target) => {
                            self.target = Some(target);
                            Ok(())
                        }
                        Err(why) => Err(DeviceStateError::Failed(why)),
                    }
                }
                Outcome::Read(Err(error)) | Outcome::Received(Err(error)) => Err(error.into()),
            };
            if let Err(error) = &result {
                limited!(warn, error = %error, "device state was not moved");
            }
            self.transfer = Transfer::Over(result);
        }
        Ok(())
    }
}
