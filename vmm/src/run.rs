//! One VM from the command line to its end.
//!
//! The main thread builds everything, starts the vCPUs and then waits: for the guest's end, for a signal, for
//! `quit` on the control socket, and for input to the serial console. It takes everything down in the opposite
//! order.

use std::io::stdin;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError};
use crate::config::{Config, SerialTarget};
use crate::control::{self, ControlError, Controlled};
use crate::event;
use crate::memory::{self, MemoryError};
use crate::mmio_bus::Bus;
use crate::platform::{
    MAX_VIRTIO_DEVICES, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, VIRTIO_MMIO_SIZE, VirtioSlot, virtio_slots,
};
use crate::power::{
    ACPI_PORT, ACPI_PORTS, AcpiRegisters, Crash, EndSignal, GuestEnd, I8042, I8042_PORT, I8042_PORTS,
};
use crate::serial::{SerialError, SharedConsole};
use crate::terminal::RawTerminal;
use crate::vcpu::{Buses, VcpuError, Vcpus};
use crate::virtio::mmio_transport::{MmioTransport, QUEUE_NOTIFY};
use crate::virtio::net::NetShared;
use crate::virtio::net_worker::{NetError, NetThread};
use crate::vm::{Vm, VmError};

/// The signals that end the VMM as if it had been told to quit.
const QUIT_SIGNALS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
const INPUT_BUFFER: usize = 64;

/// Why the VMM failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// More devices than interrupts.
    #[error("{0} network devices are too many: a VM can have {MAX_VIRTIO_DEVICES}")]
    TooManyDevices(usize),
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] Errno),
    /// The terminal cannot be made raw.
    #[error("cannot make the terminal raw")]
    Terminal(#[source] Errno),
    /// An event cannot be made or waited for.
    #[error("cannot wait for events")]
    Events(#[source] std::io::Error),
    /// The guest came to a bad end.
    #[error(transparent)]
    Crash(#[from] Crash),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// No VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// No vCPUs.
    #[error(transparent)]
    Vcpus(#[from] VcpuError),
    /// No console.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// No back-end.
    #[error("back-end at {}", socket.display())]
    Net {
        /// The device's socket.
        socket: PathBuf,
        /// What is wrong with it.
        #[source]
        source: NetError,
    },
    /// No control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Runs a VM until its guest ends or somebody asks for its end.
pub fn run(config: &Config) -> Result<(), RunError> {
    let slots: Vec<_> = virtio_slots(config.net.len()).collect();
    if slots.len() < config.net.len() {
        return Err(RunError::TooManyDevices(config.net.len()));
    }
    let signals = receive_signals().map_err(RunError::Signals)?;
    let end = EndSignal::new().map_err(RunError::Events)?;
    let control_socket = config.control_socket.as_deref().map(control::bind).transpose()?;

    let ram = memory::ranges(config.memory.0);
    let vm = Vm::new(memory::allocate(config.memory.0)?)?;
    let entry = boot::load(config, vm.memory(), &ram)?;
    acpi::write(vm.memory(), config.cpus, &slots)?;

    let console = SharedConsole::new(&config.serial)?;
    vm.connect_interrupt(&console.interrupt, SERIAL_GSI)?;
    let mut ports = Bus::default();
    ports.insert(u64::from(SERIAL_PORT), u64::from(SERIAL_PORTS), console.device.clone());
    ports.insert(u64::from(ACPI_PORT), ACPI_PORTS, Arc::new(Mutex::new(AcpiRegisters(end.clone()))));
    ports.insert(u64::from(I8042_PORT), I8042_PORTS, Arc::new(Mutex::new(I8042(end.clone()))));
    let mut memory = Bus::default();
    let mut devices = Vec::new();
    for (index, (net, slot)) in config.net.iter().zip(&slots).enumerate() {
        let (thread, device) = NetThread::start(format!("net{index}"), net, vm.memory().clone())
            .map_err(|source| RunError::Net { socket: net.socket.clone(), source })?;
        connect_device(&vm, &thread.shared, *slot)?;
        memory.insert(slot.address, VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(MmioTransport::new(device))));
        devices.push(thread);
    }

    let vcpus = vm.create_vcpus(config.cpus, entry)?;
    let vcpus = Arc::new(Vcpus::start(vcpus, &Arc::new(Buses { ports, memory }), &end)?);
    let interactive = config.serial == SerialTarget::Stdio;
    let terminal = if interactive { RawTerminal::enter().map_err(RunError::Terminal)? } else { None };
    let quit = event::new().map_err(RunError::Events)?;
    let control_server = match control_socket {
        Some(socket) => {
            let quit = quit.try_clone().map_err(RunError::Events)?;
            let net = devices.iter().map(|device| Arc::clone(&device.shared)).collect();
            let controlled =
                Controlled { vcpus: vcpus.clone(), memory: config.memory.0, cpus: config.cpus, net, quit };
            Some(control::serve(socket, controlled)?)
        }
        None => None,
    };
    vcpus.resume();
    let waker = Wakers { signals: &signals, end: &end, quit: &quit };
    let ended = waker.wait_for_end(interactive.then_some(&console));
    // First the devices' connections, so that a vCPU that waits for a back-end can end.
    devices.into_iter().for_each(NetThread::stop);
    vcpus.stop();
    drop(control_server);
    drop(terminal);
    match ended? {
        Some(GuestEnd::Crash(crash)) => Err(crash.into()),
        Some(GuestEnd::PowerOff) => {
            tracing::info!("the guest switched itself off");
            Ok(())
        }
        Some(GuestEnd::Reset) => {
            tracing::info!("the guest reset itself");
            Ok(())
        }
        None => Ok(()),
    }
}

/// Connects a device's doorbells and interrupts to the guest, without the VMM in between.
fn connect_device(vm: &Vm, shared: &NetShared, slot: VirtioSlot) -> Result<(), VmError> {
    let doorbell = slot.address + QUEUE_NOTIFY;
    for (queue, kick) in (0u32..).zip(&shared.kicks) {
        vm.connect_doorbell(kick, doorbell, queue)?;
    }
    for interrupt in shared.calls.iter().chain([shared.events.interrupt()]) {
        vm.connect_interrupt(interrupt, slot.gsi)?;
    }
    Ok(())
}

/// Blocks the signals that end the VMM, in every thread that is started from now on, so that only the main
/// thread sees them.
fn receive_signals() -> nix::Result<SignalFd> {
    let signals = QUIT_SIGNALS.into_iter().collect::<SigSet>();
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// What the main thread waits for, besides input.
struct Wakers<'a> {
    signals: &'a SignalFd,
    end: &'a EndSignal,
    quit: &'a EventFd,
}

impl Wakers<'_> {
    /// Feeds the console until the guest has ended (how it did) or the VMM is to quit (`None`).
    fn wait_for_end(&self, mut input: Option<&SharedConsole>) -> Result<Option<GuestEnd>, RunError> {
        let stdin = stdin();
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        loop {
            let has_room = input.is_some_and(|console| console.capacity() > 0);
            let mut events = vec![
                readable(self.signals.as_fd()),
                readable(event::descriptor(self.end.event())),
                readable(event::descriptor(self.quit)),
            ];
            if let Some(console) = input {
                let room = event::descriptor(&console.room);
                events.push(readable(if has_room { stdin.as_fd() } else { room }));
            }
            match poll(&mut events, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(RunError::Events(error.into())),
            }
            let ready: Vec<bool> = events.iter().map(|event| event.any().unwrap_or(true)).collect();
            if ready[1] {
                return Ok(self.end.take());
            }
            if ready[2] {
                return Ok(None);
            }
            if ready[0]
                && let Ok(Some(signal)) = self.signals.read_signal()
            {
                tracing::info!("quitting on signal {}", signal.ssi_signo);
                return Ok(None);
            }
            if let (Some(console), Some(true)) = (input, ready.get(3)) {
                if has_room {
                    input = feed(console, stdin.as_fd()).then_some(console);
                } else {
                    // Only a wake-up: the capacity is looked at above.
                    event::take(&console.room);
                }
            }
        }
    }
}

/// Moves input to the console; false at its end.
fn feed(console: &SharedConsole, stdin: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; INPUT_BUFFER];
    let room = console.capacity().min(buffer.len());
    match nix::unistd::read(stdin, &mut buffer[..room]) {
        Ok(0) => false,
        Ok(length) => {
            console.input(&buffer[..length]);
            true
        }
        Err(error) => matches!(error, Errno::EINTR | Errno::EAGAIN),
    }
}
