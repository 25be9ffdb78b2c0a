//! The target of a migration.
//!
//! The machine is created first, with its back-ends connected, so that a source does not wait for that. A machine
//! that a failed migration has used is not used again: its devices have seen the VM.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::ownership::{OwnershipError, SharedWord};
use baton_channel::peer::{Peer, PeerError};
use baton_control::{error_chain, limited};
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::{ManifestError, NamedFds};
use baton_protocol::migration::facts::MachineFacts;
use baton_protocol::migration::message::{Hello, Message, OWNERSHIP_FD, Prepare, State, device_fd, ram_fd};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::state::Clock;
use baton_protocol::migration::target::{Action, Event, Target, active};
use baton_protocol::migration::validate::{CheckedState, judge};
use baton_protocol::ownership::{SwapOutcome, Word};
use baton_protocol::reasons::Reasons;
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;

use super::{NO_TIMEOUT, SEND_TIMEOUT};
use crate::machine::{Machine, MachineError};
use crate::memory::{self, MemoryError};
use crate::shutdown::ShutdownHandle;

/// What can fail on this side.
#[derive(Debug, Error)]
pub enum TargetError {
    /// Another user's process.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The connection.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No descriptor left, for example.
    #[error("the system failed")]
    System(#[from] std::io::Error),
    /// The descriptors that came.
    #[error(transparent)]
    Descriptors(#[from] ManifestError),
    /// The ownership word that came.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The guest memory that came.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A state that is not possible.
    #[error(transparent)]
    State(#[from] Reasons),
    /// A back-end that does not begin to take a TAP.
    #[error("network device {device} takes no TAP")]
    Tap {
        /// The device.
        device: usize,
        /// What its back-end says.
        source: MachineError,
    },
}

impl TargetError {
    /// As the source is told.
    fn reasons(self) -> Reasons {
        let text = |error: &Self| error_chain(error);
        let refusal = match self {
            Self::State(reasons) => return reasons,
            Self::Descriptors(_) => Refusal::Descriptors(text(&self)),
            Self::Ownership(_) => Refusal::Ownership(text(&self)),
            Self::Memory(_) => Refusal::Ram(text(&self)),
            Self::Peer(_) => Refusal::User(text(&self)),
            Self::Tap { device, source } => Refusal::Tap { device, error: error_chain(&source) },
            _ => Refusal::Target(text(&self)),
        };
        Reasons::of([refusal])
    }
}

/// How a migration has ended.
#[derive(Debug)]
pub enum Outcome {
    /// The VM has arrived, and is paused.
    Arrived(Arrival),
    /// It has failed.
    Failed {
        /// Whether the machine has seen nothing of the VM.
        reusable: bool,
    },
}

/// A VM that has arrived.
#[derive(Debug)]
pub struct Arrival {
    /// Whether it ran at the source.
    pub running: bool,
    socket: MessageSocket,
}

impl Arrival {
    /// Tells the source that the VM is here, and whether it runs.
    pub fn confirm(self, running: bool) {
        // The source may have ended: the ownership word decides.
        if let Err(error) = self.socket.send(&active(running), &[], SEND_TIMEOUT) {
            tracing::debug!("migration: cannot confirm to the source: {error}");
        }
    }
}

/// Serves one source. `started` gets the handle that ends the migration early.
pub fn serve(
    machine: &Machine,
    stream: OwnedFd,
    started: impl FnOnce(ShutdownHandle),
) -> Result<Outcome, TargetError> {
    let socket = MessageSocket::try_from(stream)?;
    started(ShutdownHandle::new(&socket)?);
    baton_faults::point(Point::TargetVmmConnected)?;
    let peer = Peer::trusted(&socket);
    let serving = Serving {
        machine,
        socket,
        facts: None,
        word: None,
        loading: Vec::new(),
        clock: Clock::default(),
        running: false,
    };
    if let Err(error) = peer {
        let refuse =
            baton_protocol::migration::message::Refuse { reasons: TargetError::from(error).reasons() };
        serving.send(&Message::Refuse(refuse));
        return Ok(Outcome::Failed { reusable: true });
    }
    Ok(serving.run())
}

/// A migration under way.
struct Serving<'a> {
    machine: &'a Machine,
    socket: MessageSocket,
    /// What the source was told of this VMM.
    facts: Option<MachineFacts>,
    word: Option<SharedWord>,
    /// The local devices whose back-ends wait for their TAPs.
    loading: Vec<usize>,
    clock: Clock,
    running: bool,
}

impl Serving<'_> {
    fn run(mut self) -> Outcome {
        let began = Instant::now();
        let mut state = Target::begin(began.elapsed());
        let mut descriptors = Vec::new();
        let mut reusable = true;
        loop {
            let deadline = state.deadline().unwrap_or(NO_TIMEOUT);
            let event;
            (event, descriptors) = self.receive(deadline.saturating_sub(began.elapsed()), descriptors);
            // Tests make the deadline come early.
            let now = if event == Event::Time { deadline } else { began.elapsed() };
            let (next, actions) = state.step(event, now);
            state = next;
            let mut pending = VecDeque::from(actions);
            while let Some(action) = pending.pop_front() {
                reusable &= !matches!(action, Action::Prepare(_));
                // Each action may lead to an event, not only the last.
                if let Some(event) = self.carry_out(action, &mut descriptors) {
                    let (next, actions) = state.step(event, began.elapsed());
                    state = next;
                    pending.extend(actions);
                }
            }
            descriptors.clear();
            match state {
                Target::Active => {
                    return Outcome::Arrived(Arrival { running: self.running, socket: self.socket });
                }
                Target::Ended { why } => {
                    limited!(info, "migration: nothing came of it: {why}");
                    return Outcome::Failed { reusable };
                }
                _ => {}
            }
        }
    }

    fn receive(&self, patience: Duration, mut descriptors: Vec<OwnedFd>) -> (Event, Vec<OwnedFd>) {
        match self.socket.receive(baton_faults::patience(patience)) {
            Ok(packet) => {
                descriptors.extend(packet.fds);
                (Event::Message(packet.message), descriptors)
            }
            Err(ChannelError::Timeout) => (Event::Time, descriptors),
            Err(error) => {
                tracing::debug!("migration: {error}");
                (Event::Closed, descriptors)
            }
        }
    }

    /// Carries an action out; returns the event that it leads to, if any.
    fn carry_out(&mut self, action: Action, descriptors: &mut Vec<OwnedFd>) -> Option<Event> {
        let done = match action {
            Action::Send(message) => {
                self.send(&message);
                return None;
            }
            Action::Judge(hello) => self.judge(&hello),
            Action::Prepare(prepare) => self.prepare(prepare, std::mem::take(descriptors)),
            Action::Restore(state) => self.restore(*state),
            Action::Take { from, to } => return Some(Event::Swapped(self.take(from, to))),
            // The caller does it.
            Action::Activate => return None,
        };
        Some(match done {
            Ok(()) => Event::Done,
            Err(error) => Event::Failed(error.reasons()),
        })
    }

    fn send(&self, message: &Message) {
        // A source that does not read has ended, which receiving reports.
        if let Err(error) = self.socket.send(message, &[], SEND_TIMEOUT) {
            tracing::debug!("migration: cannot send {}: {error}", message.name());
        }
    }

    fn judge(&mut self, hello: &Hello) -> Result<(), TargetError> {
        limited!(info, "migration: {} has a VM", hello.program);
        let facts = self.machine.target_facts(hello.local);
        let refusals = judge(&hello.machine, &facts);
        self.facts = Some(facts);
        baton_faults::point(Point::TargetVmmGreeted)?;
        Ok(Reasons::none_of(refusals)?)
    }

    /// Adopts guest memory and the ownership word, shares the memory with KVM and the back-ends, has the back-ends
    /// of local devices wait for their TAPs, and sets up all rings.
    fn prepare(&mut self, prepare: Prepare, descriptors: Vec<OwnedFd>) -> Result<(), TargetError> {
        let mut named = prepare.fds.pair(descriptors)?;
        let files: Result<Vec<_>, _> =
            (0..prepare.ram.len()).map(|region| named.claim(&ram_fd(region)).map(File::from)).collect();
        self.word = Some(SharedWord::from_fd(named.claim(OWNERSHIP_FD)?)?);
        let ends = self.claim_ends(&mut named)?;
        named.finish()?;
        let size = self.facts.as_ref().map_or(0, |facts| facts.memory);
        if prepare.ram.iter().map(|region| (region.start, region.length)).ne(memory::ranges(size)) {
            return Err(MemoryError::Layout(size).into());
        }
        let memory = memory::adopt(size, files?)?;
        self.machine.use_memory(&memory)?;
        for (device, end) in ends {
            // A back-end that has a TAP of its own fails at once; one that has none begins to wait.
            let net = self.machine.device(device)?;
            net.call(|worker| {
                Ok(worker.connection()?.begin_transfer(VhostTransferStateDirection::LOAD, end)?)
            })
            .map_err(|source| TargetError::Tap { device, source })?;
            self.loading.push(device);
        }
        for (device, outline) in prepare.net.into_iter().enumerate() {
            if let Some(outline) = outline {
                self.machine.device(device)?.call(|worker| worker.prepare(outline))?;
            }
        }
        Ok(baton_faults::point(Point::TargetVmmPrepared)?)
    }

    /// Our ends of the sockets between the back-ends of the local devices.
    fn claim_ends(&self, named: &mut NamedFds<OwnedFd>) -> Result<Vec<(usize, OwnedFd)>, ManifestError> {
        let devices = self.facts.iter().flat_map(|facts| &facts.net).enumerate();
        let local = devices.filter(|(_, facts)| facts.local);
        local.map(|(device, _)| Ok((device, named.claim(&device_fd(device))?))).collect()
    }

    /// Waits for the TAPs of local devices, then restores the VM's state.
    fn restore(&mut self, state: State) -> Result<(), TargetError> {
        baton_faults::point(Point::TargetVmmStateReceived)?;
        let facts = self.facts.clone().unwrap_or_default();
        let vm = CheckedState::new(state.vm, &facts)?;
        for device in std::mem::take(&mut self.loading) {
            self.machine.device(device)?.call(|worker| Ok(worker.connection()?.finish_transfer()?))?;
            limited!(info, device, "migration: the back-end has adopted a TAP");
        }
        baton_faults::point(Point::TargetVmmDevicesAdopted)?;
        let local: Vec<bool> = facts.net.iter().map(|facts| facts.local).collect();
        self.machine.restore(&vm, &local)?;
        self.clock = vm.platform.clock;
        self.running = state.running;
        Ok(baton_faults::point(Point::TargetVmmRestored)?)
    }

    /// Takes ownership of the VM, if it is still offered.
    fn take(&mut self, offered: Word, taken: Word) -> SwapOutcome {
        let Some(word) = &self.word else { return SwapOutcome::Meaningless };
        if baton_faults::point(Point::TargetVmmCommitting).is_err() {
            return SwapOutcome::Meaningless;
        }
        let outcome = word.swap(offered, taken);
        if outcome != SwapOutcome::Won {
            limited!(info, ?outcome, "migration: the VM is not taken");
            return outcome;
        }
        baton_faults::pass(Point::TargetVmmTaken);
        limited!(info, "migration: the VM is taken");
        if let Err(error) = self.machine.set_clock(self.clock) {
            // The guest runs, with a clock that is wrong.
            limited!(error, "{}", error_chain(&error));
        }
        SwapOutcome::Won
    }
}
