//! The source of a migration.
//!
//! Any failure before the VM is offered rolls back. Only [`Migration::commit`] offers it. From then on the ownership
//! word alone decides which VMM owns the VM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_channel::connect::connect;
use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::ownership::{OwnershipError, SharedWord};
use baton_channel::peer::{Peer, PeerError};
use baton_control::error_chain;
use baton_faults::Point;
use baton_protocol::codec::Message as _;
use baton_protocol::control::{MigrationPhases, MigrationReport};
use baton_protocol::end_reason::EndReason;
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::migration::message::{
    Hello, Message, OWNERSHIP_FD, PROGRAM, Prepare, RamRegion, State, device_fd, ram_fd,
};
use baton_protocol::migration::source::{Action, Event, Phase, Source};
use baton_protocol::ownership::{NotSwapped, SwapOutcome, Word};
use nix::sys::socket::SockType;
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::SEND_TIMEOUT;
use crate::machine::{Machine, MachineError};
use crate::shutdown::ShutdownHandle;

/// A request to migrate the VM.
#[derive(Clone, Debug)]
pub struct MigrationRequest {
    /// The socket at which the target waits.
    pub path: PathBuf,
    /// Whether the TAPs of the devices that allow it migrate, too.
    pub local: bool,
    /// Whether to only check if the target accepts the VM.
    pub dry_run: bool,
    /// Whether the VM runs.
    pub running: bool,
}

/// Why the source fails.
#[derive(Debug, Error)]
pub enum SourceError {
    /// No target waits there.
    #[error("cannot connect to {}; start a baton-vmm there with --incoming", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The error of `connect(2)`.
        #[source]
        source: std::io::Error,
    },
    /// Another user's process waits there.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The connection failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The ownership word cannot be created.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The ownership word is not what this VMM set it to.
    #[error(transparent)]
    Word(#[from] NotSwapped),
    /// An operation on the VM failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Guest memory without files.
    #[error("guest memory has no files to send")]
    Memory,
    /// A system call failed, for example for lack of descriptors.
    #[error("system call failed")]
    System(#[from] std::io::Error),
}

/// Migrates `machine`. `started` receives the handle that aborts the migration.
pub fn migrate(
    machine: &Machine,
    request: &MigrationRequest,
    started: impl FnOnce(ShutdownHandle),
) -> MigrationReport {
    let failed = |error: SourceError| MigrationReport::RolledBack {
        phase: Phase::Greeting.name().to_owned(),
        reason: error_chain(&error),
    };
    let migration = connect_to(&request.path).and_then(|socket| {
        Peer::trusted(&socket)?;
        started(ShutdownHandle::new(&socket)?);
        baton_faults::point(Point::SourceVmmConnected)?;
        Migration::new(machine, request, socket)
    });
    match migration {
        Ok(mut migration) => migration.run(),
        Err(error) => failed(error),
    }
}

fn connect_to(path: &Path) -> Result<MessageSocket, SourceError> {
    let failed = |source| SourceError::Connect { path: path.to_owned(), source };
    Ok(MessageSocket::try_from(connect(path, SockType::Stream).map_err(failed)?)?)
}

/// A migration in progress.
struct Migration<'a> {
    machine: &'a Machine,
    request: &'a MigrationRequest,
    socket: MessageSocket,
    word: SharedWord,
    /// Our ends of the socket pairs that connect the back-ends of the local devices.
    ends: Vec<(usize, OwnedFd)>,
    phases: MigrationPhases,
    /// When the VM began to stop.
    stopped: Option<Instant>,
    began: Instant,
    /// When the last phase ended.
    lap: Instant,
}

impl<'a> Migration<'a> {
    fn new(
        machine: &'a Machine,
        request: &'a MigrationRequest,
        socket: MessageSocket,
    ) -> Result<Self, SourceError> {
        Ok(Self {
            machine,
            request,
            socket,
            word: SharedWord::create()?,
            ends: Vec::new(),
            phases: MigrationPhases::default(),
            stopped: None,
            began: Instant::now(),
            lap: Instant::now(),
        })
    }

    fn run(&mut self) -> MigrationReport {
        let hello = Hello {
            program: PROGRAM.to_owned(),
            dry_run: self.request.dry_run,
            local: self.request.local,
            machine: self.machine.source_facts(self.request.local),
        };
        let (mut state, mut actions) = Source::begin(hello, self.began.elapsed());
        loop {
            let mut event = None;
            for action in actions {
                // The event makes the remaining actions obsolete.
                event = self.carry_out(action);
                if event.is_some() {
                    break;
                }
            }
            if event.is_none() && state.is_over() {
                return self.report(state);
            }
            let (event, now) = match event {
                Some(event) => (event, self.began.elapsed()),
                None => self.receive(state.deadline()),
            };
            tracing::debug!(?state, "migration: {}", name_of(&event));
            (state, actions) = state.step(event, now);
        }
    }

    /// Waits for the target's next message or the deadline. Returns the event and its time.
    fn receive(&mut self, deadline: Option<Duration>) -> (Event, Duration) {
        let deadline = deadline.unwrap_or_default();
        let patience = baton_faults::patience(deadline.saturating_sub(self.began.elapsed()));
        let event = match self.socket.receive(patience) {
            Ok(packet) => match reached(&packet.message) {
                Ok(()) => Event::Message(packet.message),
                Err(error) => Event::Failed(error.to_string()),
            },
            // Tests shorten the wait, so the time is that of the deadline.
            Err(ChannelError::Timeout) => return (Event::Time, deadline),
            Err(error) => {
                tracing::debug!("migration: {error}");
                Event::Closed
            }
        };
        (event, self.began.elapsed())
    }

    /// Carries out an action. Returns the event that it leads to, if any.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let done = match action {
            Action::Send(message) => self.send(&message, &[]).inspect(|()| {
                if matches!(message, Message::Commit(_)) {
                    baton_faults::pass(Point::SourceVmmCommitSent);
                }
            }),
            Action::Prepare => self.prepare(),
            Action::Stop => match self.stop() {
                Ok(()) => return Some(Event::Stopped),
                Err(error) => Err(error),
            },
            Action::Offer(word) => self.commit(word),
            Action::Withdraw { from, to } => {
                let outcome = self.word.swap(from, to);
                match outcome {
                    SwapOutcome::Won => tracing::info!("migration: withdrew the offer of the VM"),
                    SwapOutcome::Lost(now) if now.owner.is_target() => {
                        tracing::info!("migration: the target owns the VM");
                    }
                    SwapOutcome::Lost(_) | SwapOutcome::Meaningless => {
                        tracing::warn!("migration: unexpected ownership word; keeping the VM");
                    }
                }
                return Some(Event::Swapped(outcome));
            }
            Action::Resume => {
                self.resume();
                Ok(())
            }
        };
        done.err().map(|error| Event::Failed(error_chain(&error)))
    }

    fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), SourceError> {
        match self.socket.send(message, fds, SEND_TIMEOUT) {
            // `receive` reports a closed connection, after the target's last message.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends guest memory, the ownership word, and one end of a socket pair for each local device.
    fn prepare(&mut self) -> Result<(), SourceError> {
        let memory = self.machine.memory();
        let net = self.machine.outlines()?;
        let mut named = Vec::new();
        let mut ram = Vec::new();
        for (number, region) in memory.iter().enumerate() {
            let file = region.file_offset().ok_or(SourceError::Memory)?.file();
            named.push((ram_fd(number), file.as_fd().try_clone_to_owned()?));
            ram.push(RamRegion { start: region.start_addr().raw_value(), length: region.len() });
        }
        named.push((OWNERSHIP_FD.to_owned(), self.word.as_fd().try_clone_to_owned()?));
        for (device, facts) in self.machine.source_net_facts(self.request.local).iter().enumerate() {
            if facts.local {
                let (ours, theirs) = MessageSocket::pair()?;
                // A back-end of an earlier version does not send credentials, so the kernel must add them.
                theirs.enable_credentials()?;
                self.ends.push((device, ours.into()));
                named.push((device_fd(device), theirs.into()));
            }
        }
        let (fds, descriptors) = named.into_iter().collect::<NamedFds<OwnedFd>>().unzip();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.send(&Message::Prepare(Prepare { ram, fds, net }), &borrowed)
    }

    /// Stops the VM, tells the back-ends of the local devices to offer their TAPs, and sends the VM's state.
    fn stop(&mut self) -> Result<(), SourceError> {
        self.phases.prepare_us = self.lap();
        self.stopped = Some(self.lap);
        self.machine.pause_vcpus()?;
        baton_faults::point(Point::SourceVmmVcpusStopped)?;
        self.phases.stop_vcpus_us = self.lap();
        self.machine.suspend_devices()?;
        baton_faults::point(Point::SourceVmmRingsStopped)?;
        self.phases.stop_rings_us = self.lap();
        for (device, end) in std::mem::take(&mut self.ends) {
            let net = self.machine.device(device)?;
            net.call(|worker| {
                Ok(worker.connection()?.begin_transfer(VhostTransferStateDirection::SAVE, end)?)
            })?;
            net.call(|worker| Ok(worker.connection()?.finish_transfer()?))?;
            tracing::info!(device, "migration: the back-end offers its TAP");
        }
        self.phases.device_state_us = self.lap();
        baton_faults::point(Point::SourceVmmDevicesOffered)?;
        let vm = self.machine.save()?;
        self.phases.save_us = self.lap();
        baton_faults::point(Point::SourceVmmSaved)?;
        self.send(&Message::State(State { running: self.request.running, vm }), &[])?;
        Ok(baton_faults::point(Point::SourceVmmStateSent)?)
    }

    /// **The commit point.** From here on the VM belongs to the first VMM that swaps the word.
    fn commit(&mut self, offered: Word) -> Result<(), SourceError> {
        self.phases.restore_us = self.lap();
        self.word.swap(Word::INITIAL, offered).must_win()?;
        baton_faults::point(Point::SourceVmmOffered)?;
        tracing::info!("migration: offered the VM to the target");
        Ok(())
    }

    /// Resumes the VM, if it ran before.
    fn resume(&self) {
        if self.request.running {
            self.machine.resume();
        }
    }

    fn report(&mut self, state: Source) -> MigrationReport {
        match state {
            Source::Completed => {
                baton_faults::pass(Point::SourceVmmCompleted);
                self.phases.start_us = self.lap();
                let pause = self.stopped.map_or(0, |stopped| microseconds(self.lap - stopped));
                MigrationReport::Completed { pause_us: pause, phases: self.phases }
            }
            Source::Ended { reason: EndReason::Refused(reasons), .. } if self.request.dry_run => {
                MigrationReport::Refused { reasons: reasons.0 }
            }
            Source::Ended { phase, reason } => {
                MigrationReport::RolledBack { phase: phase.name().to_owned(), reason: reason.to_string() }
            }
            _ => MigrationReport::Possible,
        }
    }

    /// Returns the microseconds since the last call.
    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        microseconds(now - std::mem::replace(&mut self.lap, now))
    }
}

/// Passes the fault point that a message from the target leads to.
fn reached(message: &Message) -> std::io::Result<()> {
    match message {
        Message::Welcome(_) => baton_faults::point(Point::SourceVmmGreeted),
        Message::Prepared(_) => baton_faults::point(Point::SourceVmmPrepared),
        Message::Ready(_) => baton_faults::point(Point::SourceVmmReady),
        _ => Ok(()),
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn name_of(event: &Event) -> &'static str {
    match event {
        Event::Message(message) => message.name(),
        Event::Closed => "closed",
        Event::Time => "timeout",
        Event::Stopped => "stopped",
        Event::Failed(_) => "failed",
        Event::Swapped(_) => "swapped",
    }
}
