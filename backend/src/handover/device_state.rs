//! Device state that the front-end moves (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`). Over a `SOCK_SEQPACKET` socket
//! this is an offer of the device with its TAP; over any other descriptor, only the state is transferred.

use std::fs::File;

use baton_channel::message_socket::MessageSocket;
use baton_channel::ownership::SharedWord;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::handover::device::validate::check_without_tap;
use baton_protocol::handover::wire::message::{Message, StateOnly};
use virtio_bindings::virtio_net;

use super::device::snapshot;
use super::device::source::DeviceSource;
use super::device::target::DeviceTarget;
use super::error::{DeviceStateError, HandoverError};
use super::role::Role;
use super::transfer::{Outcome, Route, Transfer};
use super::{Handovers, LINK};
use crate::args::DeviceState as Permission;
use crate::device::{Device, DeviceError};
use crate::events::Watched;

impl Handovers {
    /// Returns whether a transfer of device state is running, for which [`Self::check_device_state`] must wait.
    pub fn is_transferring(&self) -> bool {
        self.transfer.is_running()
    }

    fn check_transfer(&self, device: &Device) -> Result<(), DeviceStateError> {
        if !device.suspended() {
            return Err(DeviceStateError::NotSuspended);
        }
        if self.is_transferring() { Err(DeviceStateError::UnderWay) } else { Ok(()) }
    }

    /// Checks that the front-end may use this route. `trusted` says that it runs as the same user or as root.
    fn check_permitted(&self, route: &Route, trusted: bool) -> Result<(), DeviceStateError> {
        match (self.options.device_state, route) {
            (Some(Permission::Off), _) => Err(DeviceStateError::Off),
            (Some(Permission::Pipe), Route::Socket(_)) => Err(DeviceStateError::StateOnly),
            (None, Route::Socket(_)) if !trusted => Err(DeviceStateError::StateOnly),
            _ => Ok(()),
        }
    }

    /// Handles `SET_DEVICE_STATE_FD` in direction save.
    ///
    /// # Errors
    /// Returns an error if the transfer is not permitted or cannot begin. The device is unchanged.
    pub fn save_device_state(
        &mut self,
        device: &mut Device,
        fd: File,
        trusted: bool,
    ) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::SourceBackendSaving).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        let route = Route::from(fd);
        self.check_permitted(&route, trusted)?;
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
                let (link, theirs) = MessageSocket::pair().map_err(HandoverError::from)?;
                let link = Watched::new(link, &self.epoll, LINK).map_err(HandoverError::from)?;
                let word = SharedWord::create().map_err(HandoverError::from)?;
                let offering = DeviceSource::offering(device, word, socket, link, theirs);
                let (source, sent) = offering.map_err(|error| DeviceStateError::Failed(error.to_string()))?;
                self.role = Role::DeviceSource(Box::new(source));
                // If the offer could not be sent, this role ends so that the front-end can try again.
                let ended = self.role.end();
                self.note(ended);
                let result = if sent {
                    Ok(())
                } else {
                    Err(DeviceStateError::Failed("cannot send the device state".to_owned()))
                };
                self.transfer = Transfer::Over(result);
            }
        }
        Ok(())
    }

    /// Handles `SET_DEVICE_STATE_FD` in direction load.
    ///
    /// # Errors
    /// Returns an error if the transfer is not permitted or cannot begin. The device is unchanged.
    pub fn load_device_state(
        &mut self,
        device: &Device,
        fd: File,
        trusted: bool,
    ) -> Result<(), DeviceStateError> {
        self.check_transfer(device)?;
        baton_faults::point(Point::TargetBackendLoading).map_err(HandoverError::from)?;
        self.transfer = Transfer::None;
        let route = Route::from(fd);
        self.check_permitted(&route, trusted)?;
        if matches!(route, Route::Socket(_)) {
            if device.tap().is_some() || self.incoming.is_none() {
                return Err(DeviceStateError::AlreadyInitialised);
            }
            if !self.role.is_idle() {
                return Err(DeviceStateError::Busy);
            }
        }
        self.transfer = Transfer::Running(self.threads.load(route)?);
        Ok(())
    }

    /// Handles `CHECK_DEVICE_STATE`. No transfer may be running.
    ///
    /// # Errors
    /// Returns an error if the last transfer failed, or if there was none.
    pub fn check_device_state(&mut self) -> Result<(), DeviceStateError> {
        match std::mem::replace(&mut self.transfer, Transfer::None) {
            Transfer::Over(result) => {
                if let (Ok(()), Role::DeviceSource(source)) = (&result, &mut self.role) {
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

    pub(super) fn on_transfer(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        while let Some(finished) = self.finished.take() {
            // Ignore the result of a cancelled transfer.
            if !matches!(&self.transfer, Transfer::Running(running) if running.sent(&finished)) {
                continue;
            }
            let result = match finished.outcome {
                Outcome::Saved(result) => result.map_err(DeviceStateError::from),
                Outcome::Read(Ok(Message::Device(StateOnly { device: state }))) => {
                    // The front-end may provide the guest's MAC and MTU itself.
                    let config = [virtio_net::VIRTIO_NET_F_MAC, virtio_net::VIRTIO_NET_F_MTU];
                    let offered = device.offer().with(&config);
                    check_without_tap(&state, offered.0)
                        .map_err(|reasons| DeviceStateError::Failed(reasons.to_string()))
                }
                Outcome::Read(Ok(other)) => Err(DeviceStateError::Failed(format!(
                    "the device state begins with {}, which requires a SOCK_SEQPACKET socket",
                    other.name()
                ))),
                Outcome::Received(Ok((packet, sender))) => {
                    match DeviceTarget::offered(packet, sender, device, &self.options, &self.epoll)? {
                        Ok(target) => {
                            self.role = Role::DeviceTarget(Box::new(target));
                            Ok(())
                        }
                        Err(why) => Err(DeviceStateError::Failed(why)),
                    }
                }
                Outcome::Read(Err(error)) | Outcome::Received(Err(error)) => Err(error.into()),
            };
            if let Err(error) = &result {
                limited!(warn, error = %error, "cannot transfer device state");
            }
            self.transfer = Transfer::Over(result);
        }
        Ok(())
    }
}
