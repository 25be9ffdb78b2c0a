//! The target of a device. Carries out what [`baton_protocol::handover::device::target`] decides.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket, Packet};
use baton_channel::peer::Peer;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{HandoverState, HandoverStatus};
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::handover::device::target::{Action, Event, Target};
use baton_protocol::handover::device::validate::CheckedDevice;
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{LINK_FD, Message, Offer};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::ownership::SwapOutcome;
use baton_protocol::reasons::Reasons;

use super::snapshot::{self, Adopted, NotAdopted};
use crate::device::{Device, DeviceConfig, DeviceError};
use crate::events::{Epoll, Watched};
use crate::features::Features;
use crate::handover::agreed::AgreedSource;
use crate::handover::options::TargetOptions;
use crate::handover::{LINK, SOURCE_NAME};

/// How long to wait while a socket is full: a front-end or source that fills it must not block the event loop.
const PATIENCE: Duration = Duration::ZERO;

/// The most messages that a source sends without an answer, plus the end of its connection.
const MESSAGES: usize = 8;

/// The device's description before the source's took its place.
#[derive(Debug)]
struct Before {
    config: DeviceConfig,
    offer: Features,
    pairs: usize,
}

/// One hand-over of the device, on the target.
#[derive(Debug)]
pub struct DeviceTarget {
    state: Target<Box<Adopted>>,
    link: Option<Watched<MessageSocket>>,
    /// The connection of a source that has ended, or is about to. It stays open while this process may keep the device:
    /// for a source that ends, a closed connection means that the target does not keep it.
    ended: Option<Watched<MessageSocket>>,
    /// Whether the source runs as the same user.
    same_user: bool,
    /// The descriptors of the message that is being handled.
    fds: Option<NamedFds<OwnedFd>>,
    before: Before,
    /// Why the last offer was refused.
    refused: Option<Reasons>,
    /// The front-end brought the offer, for one migration.
    once: bool,
}

/// Checks whether this back-end can take the device. Opens the vhost-net instances for it now, before any frame has to
/// wait for that.
///
/// # Errors
/// Returns all reasons for a refusal.
pub fn judge(
    device: &mut Device,
    options: &TargetOptions,
    same_user: bool,
    state: DeviceState,
) -> Result<(), Reasons> {
    let capabilities = snapshot::capabilities(device, options, &state, same_user);
    let checked = CheckedDevice::try_from((state, &capabilities))?;
    let pairs = checked.state().queue_pairs.len();
    device.open_vhost(pairs).map_err(|error| Refusal::VhostNet(error.to_string()).into())
}

impl DeviceTarget {
    fn new(link: Option<Watched<MessageSocket>>, same_user: bool, device: &Device) -> Self {
        let before = Before { config: device.config().clone(), offer: device.offer(), pairs: device.pairs() };
        Self {
            state: Target::Ready,
            link,
            ended: None,
            same_user,
            fds: None,
            before,
            refused: None,
            once: false,
        }
    }

    /// Creates the target for a source that has agreed.
    pub fn ready(source: AgreedSource, device: &Device) -> Self {
        Self::new(source.link, source.same_user, device)
    }

    /// Creates the target for an offer that arrived over the front-end's socket. The inner error says why the offer is
    /// not adopted.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn offered(
        packet: Packet<Message>,
        sender: Option<Peer>,
        device: &mut Device,
        options: &TargetOptions,
        epoll: &Arc<Epoll>,
    ) -> Result<Result<Self, String>, DeviceError> {
        let Message::Offer(mut offer) = packet.message else {
            return Ok(Err(format!(
                "the device state begins with {} instead of an offer",
                packet.message.name()
            )));
        };
        let mut fds = match std::mem::take(&mut offer.fds).pair(packet.fds) {
            Ok(fds) => fds,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let link = match fds.claim(LINK_FD).map(MessageSocket::try_from) {
            Ok(Ok(link)) => link,
            Ok(Err(error)) => return Ok(Err(error.to_string())),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let link = match Watched::new(link, epoll, LINK) {
            Ok(link) => link,
            Err(error) => return Ok(Err(error.to_string())),
        };
        // Do not trust the peer of `link`: a front-end can connect it to any listener. The kernel vouches for `sender`.
        let mut target = Self::new(Some(link), sender.is_some_and(Peer::same_user), device);
        target.fds = Some(fds);
        target.once = true;
        target.tell(device, options, Event::Message(Message::Offer(offer)))?;
        // The credentials cover only that packet.
        target.same_user = false;
        if let Some(reasons) = target.refused.take() {
            return Ok(Err(reasons.to_string()));
        }
        if matches!(target.state, Target::Ready) {
            // No other offer can follow over the front-end's socket.
            return Ok(Err("the source retracted its offer".to_owned()));
        }
        Ok(Ok(target))
    }

    /// Returns whether the hand-over has ended and the next source may connect.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Target::Ended | Target::Taken)
    }

    /// Returns the status.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch) = match &self.state {
            Target::Adopted { word, .. } => (HandoverState::Adopted, Some(word.epoch)),
            _ => (HandoverState::Ready, None),
        };
        HandoverStatus { state, peer: SOURCE_NAME.to_owned(), epoch, reason: None }
    }

    /// Handles the source's next message or the end of the connection.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn listen(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        let event = match link.receive::<Message>(Duration::ZERO) {
            Ok(Packet { mut message, fds }) => {
                let manifest = match &mut message {
                    Message::Offer(offer) => std::mem::take(&mut offer.fds),
                    _ => FdManifest::default(),
                };
                match manifest.pair(fds) {
                    Ok(fds) => {
                        self.fds = Some(fds);
                        Event::Message(message)
                    }
                    Err(error) => self.invalid(&error),
                }
            }
            Err(ChannelError::Timeout) => return Ok(()),
            Err(ChannelError::Closed) => {
                self.ended = self.link.take();
                if let Some(link) = &mut self.ended {
                    link.ignore();
                }
                Event::Closed
            }
            Err(error) => self.invalid(&error),
        };
        self.tell(device, options, event)
    }

    /// Handles all messages that the source has sent, up to the number that one hand-over takes.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn hear_out(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            self.listen(device, options)?;
        }
        Ok(())
    }

    /// Handles the front-end's departure. A device that it brought and did not take is not for the next front-end.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn frontend_left(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        if self.once { self.tell(device, options, Event::FrontendLeft) } else { Ok(()) }
    }

    /// Follows the rings: the first one that starts takes the device.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn settle(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        match &self.state {
            Target::Adopted { .. } if device.wants_tap() => self.tell(device, options, Event::RingStarting),
            _ => Ok(()),
        }
    }

    /// Settles who owns the device when the process ends.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn finish(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        self.inherit(device, options)
    }

    /// Takes the device of a source that has ended, so that this process cleans it up. A source that ends at the same
    /// time either sees that this end gives up the device, or is seen here to have ended.
    fn inherit(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        if let Some(link) = &self.link {
            link.shutdown_write();
            self.hear_out(device, options)?;
        }
        match &self.state {
            Target::Adopted { linked: false, .. } => self.tell(device, options, Event::RingStarting),
            _ => Ok(()),
        }
    }

    fn invalid(&mut self, error: &dyn std::error::Error) -> Event<Box<Adopted>> {
        limited!(warn, %error, "invalid message from the source");
        self.link = None;
        Event::Closed
    }

    fn tell(
        &mut self,
        device: &mut Device,
        options: &TargetOptions,
        event: Event<Box<Adopted>>,
    ) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.state, Target::Ended);
        let (state, actions) = state.step(event);
        self.state = state;
        for action in actions {
            match action {
                Action::Adopt(offer) => {
                    let event = self.adopt(device, options, offer);
                    self.tell(device, options, event)?;
                }
                Action::Swap { from, to } => {
                    baton_faults::pass(Point::TargetBackendTaking);
                    let outcome = match &self.state {
                        Target::Adopted { device, .. } => device.word.swap(from, to),
                        _ => SwapOutcome::Meaningless,
                    };
                    self.tell(device, options, Event::Swapped(outcome))?;
                }
                Action::Look => {
                    let word = match &self.state {
                        Target::Adopted { device, .. } => device.word.load().ok(),
                        _ => None,
                    };
                    self.tell(device, options, Event::Seen(word))?;
                }
                Action::Activate(adopted) => {
                    baton_faults::pass(Point::TargetBackendTaken);
                    activate(device, *adopted)?;
                    baton_faults::pass(Point::TargetBackendActive);
                }
                Action::Release(adopted) => {
                    limited!(info, tap = adopted.tap.name(), "the source keeps the device");
                    let Before { config, offer, pairs } = &self.before;
                    device.describe(config.clone(), *offer, *pairs);
                }
                Action::Send(message) => {
                    if let Some(link) = &self.link
                        && let Err(error) = link.send(&message, &[], PATIENCE)
                    {
                        // If the connection has ended, the next read reports it.
                        limited!(warn, %error, "cannot send {}", message.name());
                    }
                }
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    fn adopt(&mut self, device: &mut Device, options: &TargetOptions, offer: Offer) -> Event<Box<Adopted>> {
        let epoch = offer.epoch;
        let empty = || std::iter::empty().collect();
        let fds = self.fds.take().unwrap_or_else(empty);
        let failed = baton_faults::point(Point::TargetBackendOfferReceived);
        let adoption = match failed {
            Ok(()) => snapshot::adopt(device, options, self.same_user, offer, fds),
            Err(error) => Err(Refusal::Tap(error.to_string()).into()),
        };
        match adoption {
            Ok((word, adopted)) => {
                baton_faults::pass(Point::TargetBackendAdopted);
                let state = adopted.device.state();
                let config = snapshot::config(state, options);
                let offer = device.offer_with(&config, adopted.tap.has_ufo(), adopted.tap.has_uso());
                device.describe(config, offer, adopted.tap.pairs());
                Event::Adoption(Ok((word, Box::new(adopted))))
            }
            Err(NotAdopted::Withdrawn) => {
                limited!(info, epoch, "the source retracted the offer before it was read");
                Event::Withdrawn
            }
            Err(NotAdopted::Refused(reasons)) => {
                limited!(warn, %reasons, "refused an offered device");
                self.refused = Some(reasons.clone());
                Event::Adoption(Err(reasons))
            }
        }
    }
}

/// Activates the device, which this process now owns: restores counters and frames in hand, and uses the TAP.
fn activate(device: &mut Device, adopted: Adopted) -> Result<(), DeviceError> {
    let Adopted { tap, device: checked, frames, .. } = adopted;
    for (counters, saved) in device.counters().iter().zip(&checked.state().queue_pairs) {
        counters.rx.restore(&saved.rx);
        counters.tx.restore(&saved.tx);
    }
    let poll_us = device.config().poll;
    device.set_poll(poll_us)?;
    for (pair, frame) in frames {
        device.set_frame_in_hand(pair, Some(frame))?;
    }
    limited!(info, tap = tap.name(), queue_pairs = tap.pairs(), %poll_us, "took the device");
    device.use_tap(tap)
}
