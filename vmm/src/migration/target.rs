//! The target of a migration.
//!
//! The machine is created, and its back-ends are connected, before a source connects, so that the source does not wait
//! for that. A machine that a failed migration has used is not reused, because its devices have seen the VM.

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

/// Why the target fails.
#[derive(Debug, Error)]
pub enum TargetError {
    /// The source runs as another user.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The connection failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A system call failed, for example for lack of descriptors.
    #[error("system call failed")]
    System(#[from] std::io::Error),
    /// The received descriptors do not match the message.
    #[error(transparent)]
    Descriptors(#[from] ManifestError),
    /// The received ownership word cannot be used.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The received guest memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An operation on the machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The source's VM or its state is refused.
    #[error(transparent)]
    State(#[from] Reasons),
    /// The back-end of a local device does not begin to receive a TAP.
    #[error("the back-end of network device {device} cannot receive a TAP")]
    Tap {
        /// The device.
        device: usize,
        /// The back-end's error.
        source: MachineError,
    },
}

impl TargetError {
    /// Returns the reasons that the source receives.
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

/// How a migration ended.
#[derive(Debug)]
pub enum Outcome {
    /// The VM has arrived, and is paused.
    Arrived(Arrival),
    /// No VM has arrived: the migration failed, or was a dry run.
    Failed {
        /// Whether the machine has seen nothing of the VM and can serve another source.
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
        // The source may have ended. That does not matter: the ownership word decides.
        if let Err(error) = self.socket.send(&active(running), &[], SEND_TIMEOUT) {
            tracing::debug!("migration: cannot confirm to the source: {error}");
        }
    }
}

/// Serves one source. `started` receives the handle that aborts the migration.
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

/// A migration in progress.
struct Serving<'a> {
    machine: &'a Machine,
    socket: MessageSocket,
    /// This machine's facts, which the source's HELLO was compared with.
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
            // Tests shorten the wait, so the time is that of the deadline.
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
                    limited!(info, "migration: no VM arrived: {why}");
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

    /// Carries out an action. Returns the event that it leads to, if any.
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
            // The caller of `serve` resumes the VM.
            Action::Activate => return None,
        };
        Some(match done {
            Ok(()) => Event::Done,
            Err(error) => Event::Failed(error.reasons()),
        })
    }

    fn send(&self, message: &Message) {
        // A source that does not read has ended; `receive` reports that.
        if let Err(error) = self.socket.send(message, &[], SEND_TIMEOUT) {
            tracing::debug!("migration: cannot send {}: {error}", message.name());
        }
    }

    fn judge(&mut self, hello: &Hello) -> Result<(), TargetError> {
        limited!(info, "migration: request from {}", hello.program);
        let facts = self.machine.target_facts(hello.local);
        let refusals = judge(&hello.machine, &facts);
        self.facts = Some(facts);
        baton_faults::point(Point::TargetVmmGreeted)?;
        Ok(Reasons::none_of(refusals)?)
    }

    /// Adopts guest memory and the ownership word, shares the memory with KVM and the back-ends, tells the back-ends of
    /// local devices to wait for their TAPs, and sets up all rings.
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
            // A back-end that has its own TAP fails at once; one without a TAP begins to wait.
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

    /// Claims our ends of the socket pairs that connect the back-ends of the local devices.
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
            limited!(info, device, "migration: the back-end adopted a TAP");
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
            limited!(info, ?outcome, "migration: did not take the VM");
            return outcome;
        }
        baton_faults::pass(Point::TargetVmmTaken);
        limited!(info, "migration: took the VM");
        if let Err(error) = self.machine.set_clock(self.clock) {
            // The guest runs all the same, with a wrong clock.
            limited!(error, "{}", error_chain(&error));
        }
        SwapOutcome::Won
    }
}
