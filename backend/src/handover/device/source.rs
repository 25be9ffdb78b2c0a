//! The source of a device. Carries out what [`baton_protocol::handover::device::source`] decides.

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

/// How long to wait while a socket is full: a front-end or target that fills it must not block the event loop.
const PATIENCE: Duration = Duration::ZERO;

/// The most messages to read from the target in a row. It has no reason to send more.
const MESSAGES: usize = 16;

/// How an offer over device state is sent.
#[derive(Debug)]
struct Route {
    /// The socket from the front-end.
    socket: MessageSocket,
    /// The target's end of the link.
    link: MessageSocket,
}

/// One hand-over of the device, on the source.
#[derive(Debug)]
pub struct DeviceSource {
    state: Source,
    link: Option<Watched<MessageSocket>>,
    /// The ownership word. Dropped once this process keeps the device, to free a descriptor and a mapping.
    word: Option<SharedWord>,
    /// The TAP, while it is offered.
    tap: Option<Tap>,
    /// The target's name for the operator.
    peer: String,
    route: Option<Route>,
    /// The front-end asked for the hand-over, for one migration: the device is not offered a second time.
    once: bool,
    /// The front-end, if it asked for the hand-over, has been told that the device state is saved.
    known: bool,
    /// A target has confirmed that it holds the device.
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

    /// Arms a hand-over to a target that has agreed: the device is offered when all rings have stopped. Answers the
    /// operator.
    ///
    /// # Errors
    /// Returns the final status if the ownership word cannot be created.
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

    /// Offers the device at once, over a socket from the front-end. The target answers over `link`, whose other end
    /// `theirs` goes along with the offer. Also returns whether the offer was sent.
    ///
    /// # Errors
    /// Returns an error if the device fails.
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

    /// Returns the target's name for the operator.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Returns whether the hand-over has ended with the device here.
    pub fn is_over(&self) -> bool {
        matches!(self.state, Source::Ended(_))
    }

    /// Returns whether a hand-over that the front-end asked for has ended without a target's confirmation, so that
    /// `status` need not show it.
    pub fn is_forgotten(&self) -> bool {
        self.once && !self.confirmed && self.is_over()
    }

    /// Returns whether the process may end once no front-end is connected.
    pub fn is_done(&self) -> bool {
        self.state.is_done()
    }

    /// Returns the status.
    pub fn status(&self) -> HandoverStatus {
        let (state, epoch) = match &self.state {
            Source::Armed { word } => (HandoverState::Armed, Some(word.epoch)),
            Source::Offered { word, .. } => (HandoverState::Offered, Some(word.epoch)),
            Source::HandedOver => (HandoverState::HandedOver, None),
            Source::Ended(reason) => return source_status(&self.peer, reason),
        };
        HandoverStatus { state, peer: self.peer.clone(), epoch, reason: None }
    }

    /// Handles the target's next message or the end of the connection. Returns whether there was either.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn listen(&mut self, device: &mut Device) -> Result<bool, DeviceError> {
        let Some(link) = &self.link else { return Ok(false) };
        let event = match link.receive::<Message>(Duration::ZERO) {
            // The target's messages have no descriptors. Any that arrived are closed here.
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

    /// Handles all messages that the target has sent, up to [`MESSAGES`].
    fn hear_out(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        for _ in 0..MESSAGES {
            if !self.listen(device)? {
                break;
            }
        }
        Ok(())
    }

    /// Handles the loss of the connection. Closes it only after the ownership is settled: a target that ends and sees
    /// it closed takes a device that is still offered.
    fn lost(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        self.tell(device, Event::Closed)?;
        self.link = None;
        Ok(())
    }

    /// Follows the rings: offers the device when all have stopped, and takes it back when one starts.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn settle(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        match &self.state {
            Source::Armed { .. } if self.once => self.tell(device, Event::Cancel),
            Source::Armed { .. } if device.suspended() => self.tell(device, Event::Suspended),
            Source::Offered { .. } if device.wants_tap() => self.tell(device, Event::RingStarting),
            _ => Ok(()),
        }
    }

    /// Notes that the front-end has been told that the device state is saved.
    pub fn set_known(&mut self) {
        self.known = true;
    }

    /// Handles the front-end's departure, or that this process is `ending`, which does not take an offer back. A
    /// front-end that moves the device state itself, and leaves before it knows the result, has not moved its VM.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn frontend_left(&mut self, device: &mut Device, ending: bool) -> Result<(), DeviceError> {
        // This may be the last process with the device, so first learn whether the target still holds it.
        self.hear_out(device)?;
        let moved = ending || self.known || !self.once;
        self.tell(device, Event::FrontendLeft { moved })
    }

    /// Handles a new front-end.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn frontend_came(&mut self, device: &mut Device) -> Result<(), DeviceError> {
        self.tell(device, Event::FrontendCame)
    }

    /// Cancels the hand-over, unless the target already owns the device.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn cancel(&mut self, device: &mut Device) -> Result<Answer, DeviceError> {
        self.tell(device, Event::Cancel)?;
        Ok(if device.tap().is_some() {
            control::answer(&HandoverReply::CANCELLED)
        } else {
            Err(control::refusal("too late: the target owns the device"))
        })
    }

    /// Settles who owns the device when the process ends: a target that holds it and does not end as well, otherwise
    /// this process.
    ///
    /// Each end announces that it ends before it checks whether the other one does, so at least one of them notices the
    /// other. If both do, the ownership word decides.
    ///
    /// # Errors
    /// Returns an error if the device fails.
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
            limited!(info, peer = self.peer, %reason, "hand-over ended, this back-end keeps the device");
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
                        limited!(info, peer = self.peer, "took the device back");
                        device.use_tap(tap)?;
                    }
                }
                Action::Release => {
                    baton_faults::pass(Point::SourceBackendHandedOver);
                    self.tap = None;
                    for pair in 0..device.pairs() {
                        device.set_frame_in_hand(pair, None)?;
                    }
                    limited!(info, peer = self.peer, "the target took the device");
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
            // The end of the connection is handled after the target's last message.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => {
                limited!(warn, peer = self.peer, %error, "cannot send {}", message.name());
                self.lost(device)
            }
        }
    }

    /// Puts the TAP aside, offers it in the ownership word, and sends both.
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
        limited!(info, peer = self.peer, epoch = word.epoch, "TAP descriptors sent, device offered");
        Ok(())
    }

    fn send_offer(&mut self, device: &Device, word: Word, frames: &[Option<FrameInHand>]) -> bool {
        let route = self.route.take();
        let (Some(tap), Some(shared)) = (&self.tap, &self.word) else { return false };
        let (file, extents) = match frames::write(frames) {
            Ok(written) => written,
            Err(error) => {
                limited!(warn, %error, "cannot write the frames in hand");
                return false;
            }
        };
        let theirs = route.as_ref().map(|route| route.link.as_fd());
        let (fds, descriptors) = snapshot::descriptors(tap, shared, file.as_ref(), theirs);
        let state = snapshot::describe(device, Some(tap), &extents);
        let message = Message::Offer(Offer { epoch: word.epoch, device: state, fds });
        let socket = route.as_ref().map(|route| &route.socket).or(self.link.as_deref());
        // Over the front-end's socket, only credentials identify the source to the target.
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
