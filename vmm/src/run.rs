//! Runs one VM, from the command line to its end.
//!
//! The main thread builds everything and starts the vCPUs. It then feeds input to the serial console until the guest
//! ends, a signal arrives, or a client requests `quit` on the control socket. At the end it stops the VM, then the
//! control server, and restores the terminal last.

use std::io::stdin;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{Config, SerialTarget};
use crate::control::{self, ControlError, ControlHandler};
use crate::event;
use crate::incoming::{Incoming, IncomingError, IncomingParts};
use crate::lifecycle::Lifecycle;
use crate::machine::{Machine, MachineError};
use crate::power::{Crash, EndSignal, GuestEnd};
use crate::serial::{SerialError, SharedConsole};
use crate::terminal::RawTerminal;

/// The signals that end the VMM, like a `quit` request.
const QUIT_SIGNALS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
const INPUT_BUFFER: usize = 64;

/// Why the VMM failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] Errno),
    /// The terminal cannot be set to raw mode.
    #[error("cannot set the terminal to raw mode")]
    Terminal(#[source] Errno),
    /// An eventfd cannot be created or waited for.
    #[error("cannot wait for events")]
    Events(#[source] std::io::Error),
    /// The guest crashed.
    #[error(transparent)]
    Crash(#[from] Crash),
    /// The VM cannot be created.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The serial console cannot be created.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The VMM cannot receive a VM.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// Neither `--kernel` nor `--incoming` is given, which [`Config::from_arguments`] rejects.
    #[error("nothing to run: give --kernel or --incoming")]
    Nothing,
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Runs a VM until its guest ends, a signal arrives, or a client requests `quit`.
pub fn run(config: &Config) -> Result<(), RunError> {
    let signals = receive_signals().map_err(RunError::Signals)?;
    let end = EndSignal::new().map_err(RunError::Events)?;
    let control_socket = config.control_socket.as_deref().map(control::bind).transpose()?;
    let console = Arc::new(SharedConsole::new(&config.serial)?);

    let quit = event::new().map_err(RunError::Events)?;
    let clone = |event: &EventFd| event.try_clone().map_err(RunError::Events);
    let lifecycle = Arc::new(Lifecycle::new(config));
    let incoming = match (&config.incoming, &config.kernel) {
        (Some(path), _) => {
            let parts = IncomingParts {
                config: config.clone(),
                console: Arc::clone(&console),
                end: end.clone(),
                lifecycle: Arc::clone(&lifecycle),
            };
            Some(Incoming::start(path, parts, clone(&quit)?)?)
        }
        (None, Some(kernel)) => {
            lifecycle.start(Machine::boot(config, kernel, Arc::clone(&console), &end)?);
            None
        }
        (None, None) => return Err(RunError::Nothing),
    };

    let mut running = Running { lifecycle: &lifecycle, incoming };

    let interactive = config.serial == SerialTarget::Stdio;
    let terminal = if interactive { RawTerminal::enter().map_err(RunError::Terminal)? } else { None };
    let control_server = match control_socket {
        Some(socket) => {
            let handler = ControlHandler { lifecycle: Arc::clone(&lifecycle), quit: clone(&quit)? };
            Some(control::serve(socket, handler)?)
        }
        None => None,
    };
    let waker = Wakers { signals: &signals, end: &end, quit: &quit };
    let ended = waker.wait_for_end(interactive.then_some(&*console));
    let received = running.end();
    drop(control_server);
    drop(terminal);
    let ended = ended?;
    received?;
    match ended {
        Some(GuestEnd::Crash(crash)) => Err(crash.into()),
        Some(GuestEnd::PowerOff) => {
            tracing::info!("the guest powered off");
            Ok(())
        }
        Some(GuestEnd::Reset) => {
            tracing::info!("the guest requested a reset");
            Ok(())
        }
        None => Ok(()),
    }
}

/// The VM, and the thread that waits for an incoming one. Dropping this stops both.
struct Running<'a> {
    lifecycle: &'a Lifecycle,
    incoming: Option<Incoming>,
}

impl Running<'_> {
    /// Returns why the thread that waits for a VM has failed, if it has.
    fn end(&mut self) -> Result<(), IncomingError> {
        self.lifecycle.stop();
        self.incoming.take().map_or(Ok(()), Incoming::stop)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Dropped after `end`, or because of another error, which is the one to report.
        let _ = self.end();
    }
}

/// Returns a descriptor that receives the signals that end the VMM. Blocks them in every thread started from now on,
/// so that only the main thread sees them.
fn receive_signals() -> nix::Result<SignalFd> {
    let signals = QUIT_SIGNALS.into_iter().collect::<SigSet>();
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// What the main thread waits for, besides console input.
struct Wakers<'a> {
    signals: &'a SignalFd,
    end: &'a EndSignal,
    quit: &'a EventFd,
}

impl Wakers<'_> {
    /// Feeds the console until the guest ends or the VMM must quit. Returns how the guest ended, or `None` to quit.
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
                    // Only a wake-up: the next iteration reads the capacity.
                    event::take(&console.room);
                }
            }
        }
    }
}

/// Moves input to the console. Returns false when there is no more.
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
