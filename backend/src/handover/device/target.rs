//! The end that waits for a device: carries out what [`baton_protocol::handover::device::target`] decides.

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

/// How long a full socket is waited for: a front-end or a source may have filled it, and the event loop serves others.
const PATIENCE: Duration = Duration::ZERO;

/// How many messages a source sends at most without an answer, and the end of its connection.
const MESSAGES: usize = 8;

/// What the device was before it was described by a source.
#[derive(Debug)]
struct Before {
    config: DeviceConfig,
    offer: Features,
    pairs: usize,
}

/// One hand-over, from this side.
#[derive(Debug)]
pub struct DeviceTarget {
    state: Target<Box<Adopted>>,
    link: Option<Watched<MessageSocket>>,
    /// The connection of a source that has ended, or ends. It stays open as long as this is the source's device, or may
    /// be: to a source that ends, a connection that is closed means that this end does not keep the device.
    ended: Option<Watched<MessageSocket>>,
    /// The source runs as the same user.
    same_user: bool,
    /// The descriptors of the message that is being looked at.
    fds: Option<NamedFds<OwnedFd>>,
    before: Before,
    /// Why the last offer was refused.
    refused: Option<Reasons>,
    /// Brought by the front-end, for one migration.
    once: bool,
}

/// Checks whether this back-end would take the device, and opens what it needs for it while no frame waits.
///
/// # Errors
/// All [`Reasons`] against it.
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

    /// With a source that has agreed.
    pub fn ready(source: AgreedSource, device: &Device) -> Self {
        Self::new(source.link, source.same_user, device)
    }

    /// With an offer that the front-end's socket brought. The inner error says what is wrong with it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn offered(
        packet: Packet<Message>,
        sender: Option<Peer>,
        device: &mut Device,
        options: &TargetOptions,
        epoll: &Arc<Epoll>,
    ) -> Result<Result<Self, String>, DeviceError> {
        let Message::Offer(mut offer) = packet.message else {
            return Ok(Err(format!("the device state begins with {}", packet.message.name())));
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
        // The peer of `link` proves nothing: a front-end can connect it to any listener. The kernel vouches for the sender.
        let mut target = Self::new(Some(link), sender.is_some_and(Peer::same_user), device);
        target.fds = Some(fds);
        target.once = true;
        target.tell(device, options, Event::Message(Message::Offer(offer)))?;
        // Only that packet was vouched for.
        target.same_user = false;
        if let Some(reasons) = target.refused.take() {
            return Ok(Err(reasons.to_string()));
        }
        if matches!(target.state, Target::Ready) {
            // The front-end brings one offer, and no other can follow.
            return Ok(Err("the source took its offer back".to_owned()));
        }
        Ok(Ok(target))
    }

    /// Whether the next source may come.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Target::Ended | Target::Taken)
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch) = match &self.state {
            Target::Adopted { word, .. } => (HandoverState::Adopted, Some(word.epoch)),
            _ => (HandoverState::Ready, None),
        };
        HandoverStatus { state, peer: SOURCE_NAME.to_owned(), epoch, reason: None }
    }

    /// Hears what the source says.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
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

    /// Hears all that the source has said, up to what it says in one hand-over.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn hear_out(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            self.listen(device, options)?;
        }
        Ok(())
    }

    /// The front-end has gone: what it brought, and has not taken, is not for the next one.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_left(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        if self.once { self.tell(device, options, Event::FrontendLeft) } else { Ok(()) }
    }

    /// Follows the rings: the first that starts takes the device.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn settle(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        match &self.state {
            Target::Adopted { .. } if device.wants_tap() => self.tell(device, options, Event::RingStarting),
            _ => Ok(()),
        }
    }

    /// The process ends.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, device: &mut Device, options: &TargetOptions) -> Result<(), DeviceError> {
        self.inherit(device, options)
    }

    /// Takes what the source has left behind, so that somebody cleans it up. A source that ends at the same time sees that
    /// this end gives the device up, or is seen here to have gone.
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
                    limited!(info, tap = adopted.tap.name(), "the device stays the source's");
                    let Before { config, offer, pairs } = &self.before;
                    device.describe(config.clone(), *offer, *pairs);
                }
                Action::Send(message) => {
                    if let Some(link) = &self.link
                        && let Err(error) = link.send(&message, &[], PATIENCE)
                    {
                        // The end of the connection will be seen.
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
                limited!(info, epoch, "the source took the offer back before it was read");
                Event::Withdrawn
            }
            Err(NotAdopted::Refused(reasons)) => {
                limited!(warn, %reasons, "an offered device is refused");
                self.refused = Some(reasons.clone());
                Event::Adoption(Err(reasons))
            }
        }
    }
}

/// The device is ours: counters go on, frames in hand go first, and the TAP is used.
fn activate(device: &mut Device, adopted: Adopted) -> Result<(), DeviceError> {
    let Adopted { tap, device: checked, frames, .. } = adopted;
    for (counters, saved) in device.counters().iter().zip(&checked.state().queue_pairs) {
        counters.rx.restore(&saved.rx);
        counters.tx.restore(&saved.tx);
    }
    let poll = device.config().poll;
    device.set_poll(poll)?;
    for (pair, frame) in frames {
        device.set_frame_in_hand(pair, Some(frame))?;
    }
    limited!(info, tap = tap.name(), queue_pairs = tap.pairs(), "the device is ours");
    device.use_tap(tap)
}
