//! The end that has the device: carries out what [`baton_protocol::handover::device::source`] decides.

use std::os::fd::AsFd;
use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::ownership::SharedWord;
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{HandoverReply, HandoverState, HandoverStatus};
use baton_protocol::end_reason::EndReason;
use baton_protocol::handover::device::source::{Action, Event, Source};
use baton_protocol::handover::wire::message::{Message, Offer};
use baton_protocol::ownership::{Owner, SwapOutcome, Word};

use super::{frames, snapshot};
use crate::control::{self, Answer};
use crate::dataplane::rx::FrameInHand;
use crate::device::{Device, DeviceError};
use crate::events::Watched;
use crate::handover::agreed::AgreedTarget;
use crate::handover::source_status;
use crate::tap::Tap;

/// How long a full socket is waited for: a front-end or a target may have filled it, and the event loop serves others.
const PATIENCE: Duration = Duration::ZERO;

/// How many messages of the target's are heard in a row: it has no reason to send more.
const MESSAGES: usize = 16;

/// Where the first offer of device state goes.
#[derive(Debug)]
struct Route {
    /// What the front-end gave.
    socket: MessageSocket,
    /// The target's end of the link.
    link: MessageSocket,
}

/// One hand-over, from this side.
#[derive(Debug)]
pub struct DeviceSource {
    state: Source,
    link: Option<Watched<MessageSocket>>,
    /// Until it is over: nobody asks any more, and it is a descriptor and a mapping.
    word: Option<SharedWord>,
    /// The TAP, while it is offered.
    tap: Option<Tap>,
    /// The target, for people.
    peer: String,
    route: Option<Route>,
    /// Asked for by the front-end, for one migration: not offered a second time.
    once: bool,
    /// The front-end knows that the device's state is saved, if it asked for that.
    known: bool,
    /// A target has held the device.
    confirmed: bool,
}

impl DeviceSource {
    fn new(state: Source, link: Option<Watched<MessageSocket>>, word: SharedWord, peer: String) -> Self {
        Self {
            state,
            link,
            word: Some(word),
            tap: None,
            peer,
            route: None,
            once: false,
            known: false,
            confirmed: false,
        }
    }

    /// With a target that has agreed: the device is offered when all rings have stopped. Answers the operator.
    ///
    /// # Errors
    /// How the hand-over ended, for want of memory, say.
    pub fn armed(target: AgreedTarget) -> Result<Self, HandoverStatus> {
        let AgreedTarget { link, peer, call, .. } = target;
        let (result, answer) = match SharedWord::create() {
            Ok(word) => {
                (Ok(Self::new(Source::armed(), link, word, peer)), control::answer(&HandoverReply::ARMED))
            }
            Err(error) => {
                let reason = EndReason::Failed(error_chain(&error));
                (Err(source_status(&peer, &reason)), Err(control::refusal(reason.to_string())))
            }
        };
        if let Some(call) = call {
            call.answer(answer);
        }
        result
    }

    /// Offers at once, over a socket of the front-end's; the target answers at the other end of the link, `theirs`.
    /// Gives whether the offer was sent, too.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn offering(
        device: &mut Device,
        word: SharedWord,
        socket: MessageSocket,
        link: Watched<MessageSocket>,
        theirs: MessageSocket,
    ) -> Result<(Self, bool), DeviceError> {
        let (state, actions) = Source::offering();
        let mut source = Self::new(state, Some(link), word, "the front-end's device state".to_owned());
        source.route = Some(Route { socket, link: theirs });
        source.once = true;
        source.act(device, actions)?;
        let sent = matches!(source.state, Source::Offered { .. });
        Ok((source, sent))
    }

    /// The target, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether it is over, with the device here.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended(_))
    }

    /// Whether it is over, was the front-end's wish, and no target ever confirmed it: the operator need not hear of it.
    pub fn is_forgotten(&self) -> bool {
        self.once && !self.confirmed && self.is_over()
    }

    /// Whether the process may end once no front-end is connected.
    pub fn is_done(&self) -> bool {
        self.state.is_done()
    }

    /// How it stands.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch) = match &self.state {
            Source::Armed { word } => (HandoverState::Armed, Some(word.epoch)),
            Source::Offered { word, .. } => (HandoverState::Offered, Some(word.epoch)),
            Source::HandedOver => (HandoverState::HandedOver, None),
            Source::Ended(reason) => return source_status(&self.peer, reason),
        };
        HandoverStatus { state, peer: self.peer.clone(), epoch, reason: None }
    }

    /// Hears what the target says. Gives whether there was anything.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn listen(&mut self, device: &mut Device) -> Result<bool, DeviceError> {
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
                    limited!(warn, peer = self.peer, %error, "invalid message from the target");
                }
                self.lost(device)?;
                return Ok(true);
            }
        };
        self.tell(device, event)?;
        Ok(true)
    }

    /// Hears all that the target has said, up to what it has reason to say.
    fn hear_out(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            if !self.listen(device)? {
                break;
            }
        }
        Ok(())
    }

    /// The connection is of no more use. It is closed only when it is known whose the device is: a target that ends sees
    /// that, and takes what is still offered then.
    fn lost(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        self.tell(device, Event::Closed)?;
        self.link = None;
        Ok(())
    }

    /// Follows the rings.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn settle(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        match &self.state {
            Source::Armed { .. } if self.once => self.tell(device, Event::Cancel),
            Source::Armed { .. } if device.suspended() => self.tell(device, Event::Suspended),
            Source::Offered { .. } if device.wants_tap() => self.tell(device, Event::RingStarting),
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
    pub fn frontend_left(&mut self, device: &mut Device, ending: bool) -> Result<(), DeviceError> {
        // This may be the last process that has the device: whether the target still holds it is to be known first.
        self.hear_out(device)?;
        let moved = ending || self.known || !self.once;
        self.tell(device, Event::FrontendLeft { moved })
    }

    /// A front-end is there.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn frontend_came(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        self.tell(device, Event::FrontendCame)
    }

    /// Ends it, if the device is not the target's yet.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn cancel(&mut self, device: &mut Device) -> Result<Answer, DeviceError> {
        self.tell(device, Event::Cancel)?;
        Ok(if device.tap().is_some() {
            control::answer(&HandoverReply::CANCELLED)
        } else {
            Err(control::refusal("too late: the device is the target's"))
        })
    }

    /// The process ends: a target that holds the device, and does not end as well, keeps it; any other gets none.
    ///
    /// Either end says that it ends before it looks whether the other one does, so at least one of two sees the other;
    /// where both do, the word decides.
    ///
    /// # Errors
    /// [`DeviceError`]: the device cannot go on.
    pub fn finish(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        match self.state {
            Source::Offered { adopted: true, .. } => {
                if let Some(link) = &self.link {
                    link.shutdown_write();
                }
                self.hear_out(device)
            }
            _ => self.tell(device, Event::Cancel),
        }
    }

    fn tell(&mut self, device: &mut Device, event: Event) -> Result<(), DeviceError> {
        let over = self.is_over();
        let state = std::mem::replace(&mut self.state, Source::HandedOver);
        let (state, actions) = state.step(event);
        self.confirmed |= matches!(state, Source::Offered { adopted: true, .. } | Source::HandedOver);
        if let (false, Source::Ended(reason)) = (over, &state) {
            limited!(info, peer = self.peer, %reason, "the hand-over is over, the device is ours");
        }
        self.state = state;
        self.act(device, actions)?;
        self.word.take_if(|_| matches!(self.state, Source::Ended(_)));
        Ok(())
    }

    fn act(&mut self, device: &mut Device, actions: Vec<Action>) -> Result<(), DeviceError> {
        for action in actions {
            match action {
                Action::Offer(word) => self.offer(device, word)?,
                Action::Swap { from, to } => {
                    let outcome = self.word.as_ref().map(|word| word.swap(from, to));
                    let outcome = outcome.unwrap_or(SwapOutcome::Meaningless);
                    self.tell(device, Event::Swapped(outcome))?;
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
                Action::Send(message) => self.send(device, &message)?,
                Action::Close => self.link = None,
            }
        }
        Ok(())
    }

    fn send(&mut self, device: &mut Device, message: &Message) -> Result<(), DeviceError> {
        let Some(link) = &self.link else { return Ok(()) };
        match link.send(message, &[], PATIENCE) {
            // The end of a connection is heard after the target's last word.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                self.lost(device)
            }
        }
    }

    /// Puts the TAP aside, says so in the word, and sends both.
    fn offer(&mut self, device: &mut Device, word: Word) -> Result<(), DeviceError> {
        let frames = device.frames_in_hand()?;
        self.tap = device.set_tap_aside()?;
        baton_faults::pass(Point::SourceBackendTapAside);
        let before = Word { epoch: word.epoch - 1, owner: Owner::Source };
        let offered = self.word.as_ref().is_some_and(|shared| shared.swap(before, word) == SwapOutcome::Won);
        let failed = baton_faults::point(Point::SourceBackendOffered).is_err();
        if !offered || failed || !self.send_offer(device, word, &frames) {
            return self.lost(device);
        }
        baton_faults::pass(Point::SourceBackendOfferSent);
        limited!(info, peer = self.peer, epoch = word.epoch, "TAP descriptors sent: the device is offered");
        Ok(())
    }

    fn send_offer(&mut self, device: &Device, word: Word, frames: &[Option<FrameInHand>]) -> bool {
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
        let socket = route.as_ref().map(|route| &route.socket).or(self.link.as_deref());
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
}
