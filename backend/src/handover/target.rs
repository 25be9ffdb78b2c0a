//! The end that waits for a device: carries out what [`baton_protocol::handover::target`] decides.

use std::os::fd::OwnedFd;
use std::time::Duration;

use baton_channel::packet::{ChannelError, Packet, PacketSocket};
use baton_channel::peer::Peer;
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::codec::CodecError;
use baton_protocol::control::{HandoverState, HandoverStatus};
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::handover::message::{Hello, LINK_FD, Message, Offer, Refuse, SESSION};
use baton_protocol::handover::refusal::Refusal;
use baton_protocol::handover::state::DeviceState;
use baton_protocol::handover::target::{Action, Event, Target};
use baton_protocol::handover::validate::CheckedDevice;
use baton_protocol::reasons::Reasons;

use super::live::Arrived;
use super::snapshot::{self, Adopted, NotAdopted, Wishes};
use super::{PROGRAM, Surroundings, TARGET};
use crate::device::{Device, DeviceConfig, DeviceError};
use crate::events::Events;
use crate::features::Features;

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
pub struct TargetEnd {
    state: Target<Box<Adopted>>,
    link: Option<PacketSocket>,
    /// The connection of a source that has ended, or ends. It stays open as long as this is the source's device, or may
    /// be: to a source that ends, a connection that is closed means that this end does not keep the device.
    ended: Option<PacketSocket>,
    /// The source runs as the same user.
    same_user: bool,
    /// The descriptors of the message that is being looked at.
    fds: Option<NamedFds<OwnedFd>>,
    before: Before,
    /// Why the last offer was refused.
    refused: Option<Reasons>,
    /// Brought by the front-end, for one migration.
    once: bool,
    /// What a source of a session has said.
    for_session: Option<Hello>,
}

/// Refuses whoever has just connected.
pub fn refuse(link: &PacketSocket, refusal: Refusal) {
    let message = Message::Refuse(Refuse { reasons: refusal.into() });
    // Who does not read it finds the connection closed.
    let _ = link.send(&message, &[], PATIENCE);
}

impl TargetEnd {
    fn new(state: Target<Box<Adopted>>, link: PacketSocket, same_user: bool, device: &Device) -> Self {
        let before = Before { config: device.config().clone(), offer: device.offer(), pairs: device.pairs() };
        Self {
            state,
            link: Some(link),
            ended: None,
            same_user,
            fds: None,
            before,
            refused: None,
            once: false,
            for_session: None,
        }
    }

    /// With a source that has connected.
    pub fn greeted(link: PacketSocket, same_user: bool, device: &Device, now: Duration) -> Self {
        Self::new(Target::begin(now), link, same_user, device)
    }

    /// With an offer that the front-end's socket brought. The inner error says what is wrong with it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn offered(
        packet: Packet<Message>,
        sender: Option<Peer>,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<Result<Self, String>, DeviceError> {
        let Message::Offer(mut offer) = packet.message else {
            return Ok(Err(format!("the device state begins with {}", packet.message.name())));
        };
        let mut fds = match std::mem::take(&mut offer.fds).pair(packet.fds) {
            Ok(fds) => fds,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let link = match fds.claim(LINK_FD).map(PacketSocket::try_from) {
            Ok(Ok(link)) => link,
            Ok(Err(error)) => return Ok(Err(error.to_string())),
            Err(error) => return Ok(Err(error.to_string())),
        };
        // The peer of `link` proves nothing: a front-end can connect it to any listener. The kernel vouches for the sender.
        let same_user = sender.is_some_and(Peer::same_user);
        if let Err(error) = around.epoll.add(&link, Events::EPOLLIN, TARGET) {
            return Ok(Err(error.to_string()));
        }
        let mut target = Self::new(Target::Ready, link, same_user, device);
        target.fds = Some(fds);
        target.once = true;
        target.tell(device, wishes, around, Event::Message(Message::Offer(offer)))?;
        // Only that packet was vouched for.
        target.same_user = false;
        if let Some(reasons) = target.refused.take() {
            return Ok(Err(reasons.to_string()));
        }
        if matches!(target.state, Target::Ready) {
            // The front-end brings one offer, and no other can follow.
            target.close(around);
            return Ok(Err("the source took its offer back".to_owned()));
        }
        Ok(Ok(target))
    }

    /// Whether the source wants to hand over a session rather than a device.
    pub fn is_for_session(&self) -> bool {
        self.for_session.is_some()
    }

    /// What there is of a source of a session, which is not watched any more.
    pub fn into_arrived(mut self, around: Surroundings<'_>) -> Option<Arrived> {
        let (hello, link) = (self.for_session?, self.link.take()?);
        if let Err(error) = around.epoll.remove(&link) {
            limited!(warn, %error, "cannot stop watching a source");
        }
        Some(Arrived { link, hello, same_user: self.same_user })
    }

    /// Whether the next source may come.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Target::Ended | Target::Taken)
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline()
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch) = match &self.state {
            Target::Adopted { word, .. } => (HandoverState::Adopted, Some(word.epoch)),
            Target::Ready => (HandoverState::Ready, None),
            _ => (HandoverState::Checking, None),
        };
        HandoverStatus { state, peer: "the source".to_owned(), epoch, reason: None }
    }

    /// Hears what the source says.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        let event = match link.receive::<Message>(Duration::ZERO) {
            Ok(Packet { message: Message::Hello(hello), .. })
                if hello.purpose == SESSION && matches!(self.state, Target::Fresh { .. }) =>
            {
                self.for_session = Some(hello);
                return Ok(());
            }
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
                    Err(error) => self.nonsense(around, &error),
                }
            }
            Err(ChannelError::Timeout) => return Ok(()),
            Err(ChannelError::Codec(CodecError::Version(error)))
                if matches!(self.state, Target::Fresh { .. }) =>
            {
                limited!(warn, %error, "a source cannot be understood");
                refuse(link, Refusal::from(error));
                self.closed(around)
            }
            Err(ChannelError::Closed) => {
                self.ended = self.unwatch(around);
                self.closed(around)
            }
            Err(error) => self.nonsense(around, &error),
        };
        self.tell(device, wishes, around, event)
    }

    /// Hears all that the source has said, up to what it says in one hand-over.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn hear_out(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            self.listen(device, wishes, around)?;
        }
        Ok(())
    }

    /// Time has passed.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn on_time(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        self.tell(device, wishes, around, Event::Time(around.now))
    }

    /// The front-end has gone: what it brought, and has not taken, is not for the next one.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_left(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        if !self.once {
            return Ok(());
        }
        self.inherit(device, wishes, around)?;
        self.tell(device, wishes, around, Event::FrontendLeft)
    }

    /// Follows the rings: the first that starts takes the device.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn settle(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        match &self.state {
            Target::Adopted { .. } if device.wants_tap() => {
                self.tell(device, wishes, around, Event::RingStarting)
            }
            _ => Ok(()),
        }
    }

    /// The process ends.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        self.inherit(device, wishes, around)
    }

    /// Takes what the source has left behind, so that somebody cleans it up. A source that ends at the same time sees that
    /// this end gives the device up, or is seen here to have gone.
    fn inherit(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        if let Some(link) = &self.link {
            link.shutdown_write();
            self.hear_out(device, wishes, around)?;
        }
        match &self.state {
            Target::Adopted { linked: false, .. } => self.tell(device, wishes, around, Event::RingStarting),
            _ => Ok(()),
        }
    }

    fn nonsense(&mut self, around: Surroundings<'_>, error: &dyn std::error::Error) -> Event<Box<Adopted>> {
        limited!(warn, %error, "the source makes no sense");
        self.closed(around)
    }

    /// The event of a connection that ends here.
    fn closed(&mut self, around: Surroundings<'_>) -> Event<Box<Adopted>> {
        self.close(around);
        let word = match &self.state {
            Target::Adopted { device, .. } => device.word.load().ok(),
            _ => None,
        };
        Event::Closed { word }
    }

    fn tell(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
        event: Event<Box<Adopted>>,
    ) -> Result<(), DeviceError> {
        let state = std::mem::replace(&mut self.state, Target::Ended);
        match state.step(event, PROGRAM, around.now) {
            Ok((state, actions)) => {
                self.state = state;
                self.act(device, wishes, around, actions)
            }
            Err(failure) => {
                limited!(warn, message = failure.message, "the source sent this at the wrong time");
                self.state = failure.state;
                let closed = self.closed(around);
                self.tell(device, wishes, around, closed)
            }
        }
    }

    fn act(
        &mut self,
        device: &mut Device,
        wishes: &Wishes,
        around: Surroundings<'_>,
        actions: Vec<Action<Box<Adopted>>>,
    ) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Judge(state) => {
                    let verdict = self.judge(device, wishes, state);
                    self.tell(device, wishes, around, Event::Judged(verdict))?;
                }
                Action::Adopt(offer) => {
                    let event = self.adopt(device, wishes, offer);
                    self.tell(device, wishes, around, event)?;
                }
                Action::Swap { from, to } => {
                    baton_faults::pass(Point::TargetBackendTaking);
                    let won = match &self.state {
                        Target::Adopted { device, .. } => device.word.swap(from, to).is_ok(),
                        _ => false,
                    };
                    self.tell(device, wishes, around, Event::Swapped { won })?;
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
                Action::Close => self.close(around),
            }
        }
        Ok(())
    }

    fn judge(&self, device: &mut Device, wishes: &Wishes, state: DeviceState) -> Result<(), Reasons> {
        let capabilities = snapshot::capabilities(device, wishes, &state, self.same_user);
        let checked = CheckedDevice::try_from((state, &capabilities))?;
        // Opened now, while nobody waits.
        let pairs = checked.state().queue_pairs.len();
        device.open_vhost(pairs).map_err(|error| Refusal::VhostNet(error.to_string()).into())
    }

    fn adopt(&mut self, device: &mut Device, wishes: &Wishes, offer: Offer) -> Event<Box<Adopted>> {
        let epoch = offer.epoch;
        let empty = || std::iter::empty().collect();
        let fds = self.fds.take().unwrap_or_else(empty);
        let failed = baton_faults::point(Point::TargetBackendOfferReceived);
        let adoption = match failed {
            Ok(()) => snapshot::adopt(device, wishes, self.same_user, offer, fds),
            Err(error) => Err(Refusal::Tap(error.to_string()).into()),
        };
        match adoption {
            Ok((word, adopted)) => {
                baton_faults::pass(Point::TargetBackendAdopted);
                let state = adopted.device.state();
                let config = snapshot::config(state, wishes);
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

    fn close(&mut self, around: Surroundings<'_>) {
        drop(self.unwatch(around));
    }

    fn unwatch(&mut self, around: Surroundings<'_>) -> Option<PacketSocket> {
        let link = self.link.take()?;
        if let Err(error) = around.epoll.remove(&link) {
            limited!(warn, %error, "cannot stop watching the source");
        }
        Some(link)
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
