//! The end that has the device: carries out what [`baton_protocol::handover::source`] decides.

use std::os::fd::AsFd;
use std::time::Duration;

use baton_channel::ownership::{SharedWord, SwapError};
use baton_channel::packet::{ChannelError, PacketSocket};
use baton_control::limited;
use baton_faults::Point;
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus};
use baton_protocol::handover::message::{Message, Offer, Prepare};
use baton_protocol::handover::source::{Action, Ended, Event, Source};
use baton_protocol::ownership::{Owner, Word};

use super::error::HandoverError;
use super::{Surroundings, frames, snapshot};
use crate::control::{self, Call};
use crate::device::{Device, DeviceError};
use crate::tap::Tap;

/// How long a full socket is waited for: a front-end or a target may have filled it, and the event loop serves others.
const PATIENCE: Duration = Duration::ZERO;

/// How many messages of the target's are heard in a row: it has no reason to send more.
const MESSAGES: usize = 16;

/// Where the first offer of device state goes.
#[derive(Debug)]
struct Route {
    /// What the front-end gave.
    socket: PacketSocket,
    /// The target's end of the link.
    link: PacketSocket,
}

/// One hand-over, from this side.
#[derive(Debug)]
pub struct SourceEnd {
    state: Source,
    link: Option<PacketSocket>,
    /// Until it is over: nobody asks any more, and it is a descriptor and a mapping.
    word: Option<SharedWord>,
    /// The TAP, while it is offered.
    tap: Option<Tap>,
    /// The target, for people.
    peer: String,
    /// Who asked, until it is known whether the target would take it.
    call: Option<Call>,
    route: Option<Route>,
    /// Asked for by the front-end, for one migration: not offered a second time.
    once: bool,
    /// The front-end knows that the device's state is saved, if it asked for that.
    known: bool,
    /// A target has held the device.
    confirmed: bool,
}

impl SourceEnd {
    /// Over `link`, to whom `peer` names.
    ///
    /// # Errors
    /// [`HandoverError::Ownership`].
    pub fn new(link: PacketSocket, peer: String) -> Result<Self, HandoverError> {
        Ok(Self {
            state: Source::HandedOver,
            link: Some(link),
            word: Some(SharedWord::create()?),
            tap: None,
            peer,
            call: None,
            route: None,
            once: false,
            known: false,
            confirmed: false,
        })
    }

    /// The target, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The TAP, while it is offered.
    pub fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    /// Whether another one may begin.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended(_))
    }

    /// Whether it is over, was the front-end's wish, and no target ever confirmed it: the operator need not hear of it.
    pub fn is_forgotten(&self) -> bool {
        self.once && !self.confirmed && self.is_over()
    }

    /// Whether the device is out of this process's hands, for now or for good: it can take no other meanwhile.
    pub fn is_given(&self) -> bool {
        matches!(self.state, Source::Offered { .. } | Source::HandedOver)
    }

    /// Whether the process may end once no front-end is connected.
    pub fn is_done(&self) -> bool {
        self.state.is_done()
    }

    /// When [`Self::on_time`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.deadline()
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch, reason) = match &self.state {
            Source::Greeting { .. } | Source::Checking { .. } => (HandoverState::Checking, None, None),
            Source::Armed { word } => (HandoverState::Armed, Some(word.epoch), None),
            Source::Offered { word, .. } => (HandoverState::Offered, Some(word.epoch), None),
            Source::HandedOver => (HandoverState::HandedOver, None, None),
            Source::Ended(Ended::Cancelled) => (HandoverState::Cancelled, None, None),
            Source::Ended(Ended::Possible) => (HandoverState::Possible, None, None),
            Source::Ended(ended) => (HandoverState::Failed, None, Some(ended.to_string())),
        };
        HandoverStatus { state, peer: self.peer.clone(), epoch, reason }
    }

    /// Says hello.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn begin(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        program: &str,
        dry_run: bool,
        call: Call,
    ) -> Result<(), DeviceError> {
        let (state, actions) = Source::begin(program, dry_run, around.now);
        self.state = state;
        self.call = Some(call);
        self.act(device, around, actions)
    }

    /// Offers at once, over a socket of the front-end's; the target answers at the other end of the link, `theirs`.
    /// Gives whether the offer was sent.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn offer_over(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        socket: PacketSocket,
        theirs: PacketSocket,
    ) -> Result<bool, DeviceError> {
        self.route = Some(Route { socket, link: theirs });
        self.once = true;
        let (state, actions) = Source::offering();
        self.state = state;
        self.act(device, around, actions)?;
        Ok(matches!(self.state, Source::Offered { .. }))
    }

    /// Hears what the target says. Gives whether there was anything.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<bool, DeviceError> {
        let Some(link) = &self.link else { return Ok(false) };
        let event = match link.receive::<Message>(Duration::ZERO) {
            // None of the target's messages has descriptors; any that came are closed.
            Ok(packet) => {
                if matches!(packet.message, Message::Adopted(_)) {
                    baton_faults::pass(Point::SourceBackendAdopted);
                }
                Event::Message(packet.message)
            }
            Err(ChannelError::Timeout) => return Ok(false),
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    limited!(warn, peer = self.peer, %error, "the target makes no sense");
                }
                self.lost(device, around)?;
                return Ok(true);
            }
        };
        self.tell(device, around, event)?;
        Ok(true)
    }

    /// Hears all that the target has said, up to what it has reason to say.
    fn hear_out(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            if !self.listen(device, around)? {
                break;
            }
        }
        Ok(())
    }

    /// The connection is of no more use. It is closed only when it is known whose the device is: a target that ends sees
    /// that, and takes what is still offered then.
    fn lost(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        self.tell(device, around, Event::Closed)?;
        self.close(around);
        Ok(())
    }

    /// Time has passed.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn on_time(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        self.tell(device, around, Event::Time(around.now))
    }

    /// Follows the rings.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn settle(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        match &self.state {
            Source::Armed { .. } if self.once => self.tell(device, around, Event::Cancel),
            Source::Armed { .. } if device.suspended() => self.tell(device, around, Event::Suspended),
            Source::Offered { .. } if device.wants_tap() => self.tell(device, around, Event::RingStarting),
            _ => Ok(()),
        }
    }

    /// The front-end has been told that the device's state is saved.
    pub fn set_known(&mut self) {
        self.known = true;
    }

    /// The front-end has gone, or this process is `ending`, which is no reason to take anything back. One that has moved the
    /// device's state itself, and does not know how that went, has not moved its VM either.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_left(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        ending: bool,
    ) -> Result<(), DeviceError> {
        // This may be the last process that has the device: whether the target still holds it is to be known first.
        self.hear_out(device, around)?;
        let moved = ending || self.known || !self.once;
        self.tell(device, around, Event::FrontendLeft { moved })
    }

    /// A front-end is there.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_came(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
    ) -> Result<(), DeviceError> {
        self.tell(device, around, Event::FrontendCame)
    }

    /// Ends it, if the device is not the target's yet.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        self.tell(device, around, Event::Cancel)
    }

    /// The process ends: a target that holds the device, and does not end as well, keeps it; any other gets none.
    ///
    /// Either end says that it ends before it looks whether the other one does, so at least one of two sees the other;
    /// where both do, the word decides.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, device: &mut Device, around: Surroundings<'_>) -> Result<(), DeviceError> {
        match self.state {
            Source::Offered { adopted: true, .. } => {
                if let Some(link) = &self.link {
                    link.shutdown_write();
                }
                self.hear_out(device, around)
            }
            _ => self.tell(device, around, Event::Cancel),
        }
    }

    fn tell(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        event: Event,
    ) -> Result<(), DeviceError> {
        let over = self.is_over();
        let state = std::mem::replace(&mut self.state, Source::HandedOver);
        match state.step(event, around.now) {
            Ok((state, actions)) => {
                self.confirmed |= matches!(state, Source::Offered { adopted: true, .. } | Source::HandedOver);
                if !over {
                    self.report(&state);
                }
                self.state = state;
                self.act(device, around, actions)?;
                self.word.take_if(|_| matches!(self.state, Source::Ended(_)));
                Ok(())
            }
            Err(failure) => {
                limited!(warn, peer = self.peer, error = %failure, "the target makes no sense");
                self.state = failure.state;
                self.lost(device, around)
            }
        }
    }

    /// Says what has changed, to who asked and to the log.
    fn report(&mut self, new: &Source) {
        let peer = &self.peer;
        let answer = match new {
            Source::Armed { .. } => control::answer(&HandoverReply::ARMED),
            Source::Ended(Ended::Possible) => control::answer(&HandoverReply::POSSIBLE),
            Source::Ended(ended) => {
                limited!(info, peer, reason = %ended, "the hand-over is over, the device is ours");
                Err(control::refusal(ended.to_string()))
            }
            Source::HandedOver
            | Source::Offered { .. }
            | Source::Greeting { .. }
            | Source::Checking { .. } => {
                return;
            }
        };
        if let Some(call) = self.call.take() {
            call.answer(answer);
        }
    }

    fn act(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        actions: Vec<Action>,
    ) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Prepare => {
                    let state = snapshot::describe(device, device.tap(), &[]);
                    let message = Message::Prepare(Prepare { device: state, session: None });
                    self.send(device, around, &message)?;
                }
                Action::Offer(word) => self.offer(device, around, word)?,
                Action::Swap { from, to } => {
                    let result = self.word.as_ref().ok_or(None);
                    let result = result.and_then(|word| word.swap(from, to).map_err(SwapError::word));
                    self.tell(device, around, Event::Swapped(result))?;
                }
                Action::Resume => {
                    if let Some(tap) = self.tap.take() {
                        limited!(info, peer = self.peer, "the device is ours again");
                        device.use_tap(tap)?;
                    }
                }
                Action::Release => {
                    baton_faults::pass(Point::SourceBackendHandedOver);
                    self.tap = None;
                    for pair in 0..device.pairs() {
                        device.set_frame_in_hand(pair, None)?;
                    }
                    limited!(info, peer = self.peer, "the device is the target's");
                }
                Action::Send(message) => self.send(device, around, &message)?,
                Action::Close => self.close(around),
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        message: &Message,
    ) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.send(message, &[], PATIENCE) {
            // The end of a connection is heard after the target's last word.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                self.lost(device, around)
            }
        }
    }

    /// Puts the TAP aside, says so in the word, and sends both.
    fn offer(
        &mut self,
        device: &mut Device,
        around: Surroundings<'_>,
        word: Word,
    ) -> Result<(), DeviceError> {
        let frames = device.frames_in_hand()?;
        self.tap = device.set_tap_aside()?;
        baton_faults::pass(Point::SourceBackendTapAside);
        let before = Word { epoch: word.epoch - 1, owner: Owner::Source };
        let offered = self.word.as_ref().is_some_and(|shared| shared.swap(before, word).is_ok());
        let failed = baton_faults::point(Point::SourceBackendOffered).is_err();
        if !offered || failed || !self.send_offer(device, word, &frames) {
            return self.lost(device, around);
        }
        baton_faults::pass(Point::SourceBackendOfferSent);
        limited!(info, peer = self.peer, epoch = word.epoch, "TAP descriptors sent: the device is offered");
        Ok(())
    }

    fn send_offer(
        &mut self,
        device: &Device,
        word: Word,
        frames: &[Option<crate::dataplane::rx::FrameInHand>],
    ) -> bool {
        let route = self.route.take();
        let (Some(tap), Some(shared)) = (&self.tap, &self.word) else { return false };
        let (file, extents) = match frames::write(frames) {
            Ok(written) => written,
            Err(error) => {
                limited!(warn, %error, "cannot hand the frames in hand over");
                return false;
            }
        };
        let theirs = route.as_ref().map(|route| route.link.as_fd());
        let (fds, descriptors) = snapshot::descriptors(tap, shared, file.as_ref(), theirs);
        let state = snapshot::describe(device, Some(tap), &extents);
        let message = Message::Offer(Offer { epoch: word.epoch, device: state, fds });
        let socket = route.as_ref().map(|route| &route.socket).or(self.link.as_ref());
        // Over the front-end's socket only credentials tell the target who the source is.
        let with_credentials = route.is_some();
        match socket.map(|socket| match with_credentials {
            true => socket.send_with_credentials(&message, &descriptors, PATIENCE),
            false => socket.send(&message, &descriptors, PATIENCE),
        }) {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                false
            }
            None => false,
        }
    }

    fn close(&mut self, around: Surroundings<'_>) {
        if let Some(link) = self.link.take()
            && let Err(error) = around.epoll.remove(&link)
        {
            limited!(warn, %error, "cannot stop watching the target");
        }
    }
}
