//! The vCPU threads. Each owns its vCPU and runs the guest on it until a pause or a stop is requested.
//!
//! ```text
//!            pause                       stop
//! Running ──────────▶ Paused   Running, Paused ──────▶ Stopped
//!         ◀──────────
//!            resume
//! ```
//! [`Vcpus::pause`] and [`Vcpus::stop`] change the gate's state first, and then signal every thread. The signal handler
//! sets `immediate_exit` in the vCPU's shared page. A thread clears it only *before* it reads the gate, so no request
//! is lost. A paused vCPU has completed its last port or memory-mapped access: its registers are consistent. Its thread
//! has unlocked it, so that its state can be saved and restored.
#![expect(unsafe_code, reason = "the signal handler writes to the vCPU's shared page")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_protocol::migration::state::VcpuState;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::siginfo_t;
use thiserror::Error;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::mmio_bus::Bus;
use crate::power::{Crash, EndSignal, GuestEnd};
use crate::vcpu_state::{self, VcpuStateError};

/// Why the vCPU threads cannot be started.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// The handler of the signal that interrupts a vCPU cannot be installed.
    #[error("cannot install the vCPUs' signal handler")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// A thread cannot be started.
    #[error("cannot start a vCPU's thread")]
    Thread(#[source] std::io::Error),
}

/// The requested state of the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Run the guest.
    Running,
    /// Wait, and be ready to resume.
    Paused,
    /// End.
    Stopped,
}

#[derive(Debug)]
struct GateState {
    wanted: Wanted,
    /// Threads that have not ended.
    alive: usize,
    /// Threads that wait in [`Gate::park`].
    parked: usize,
}

/// Where the vCPU threads wait while they are paused.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<F>(&self, state: MutexGuard<'_, GateState>, condition: F)
    where
        F: FnMut(&mut GateState) -> bool,
    {
        drop(self.changed.wait_while(state, condition).unwrap_or_else(PoisonError::into_inner));
    }

    fn wanted(&self) -> Wanted {
        self.lock().wanted
    }

    fn want(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// Waits until the vCPUs are resumed or stopped.
    fn park(&self) {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |state| state.wanted == Wanted::Paused)
            .unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
    }

    /// Waits until all threads that have not ended are parked, or the vCPUs are no longer to be paused.
    fn wait_for_parked(&self) {
        self.wait_while(self.lock(), |state| state.wanted == Wanted::Paused && state.parked < state.alive);
    }

    fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }
}

/// The buses that the vCPUs access.
#[derive(Debug)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub memory: Bus,
}

/// All vCPUs of a VM.
#[derive(Debug)]
pub struct Vcpus {
    gate: Arc<Gate>,
    /// Each vCPU is locked by its thread, unless it is paused.
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Vcpus {
    /// Starts one thread for each vCPU, paused.
    pub fn start(vcpus: Vec<VcpuFd>, buses: &Arc<Buses>, end: &EndSignal) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), leave_guest).map_err(VcpuError::Signal)?;
        let state = GateState { wanted: Wanted::Paused, alive: vcpus.len(), parked: 0 };
        let gate = Arc::new(Gate { state: Mutex::new(state), changed: Condvar::new() });
        let fds: Vec<_> = vcpus.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        // If a thread cannot be started, dropping `vcpus` ends the others.
        let vcpus = Self { gate, fds, threads: Mutex::default() };
        for (id, fd) in (0u8..).zip(&vcpus.fds) {
            let (gate, buses, end) = (Arc::clone(&vcpus.gate), Arc::clone(buses), end.clone());
            let vcpu = Vcpu { id, fd: Arc::clone(fd), gate, buses, end };
            let thread = Builder::new().name(format!("vcpu{id}")).spawn(move || vcpu.run());
            vcpus.threads().push(thread.map_err(VcpuError::Thread)?);
        }
        Ok(vcpus)
    }

    /// Returns whether no vCPU has ended.
    pub fn all_alive(&self) -> bool {
        self.gate.lock().alive == self.fds.len()
    }

    /// Returns the state of each vCPU, with the model-specific registers `msrs`. The vCPUs must be paused.
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<VcpuState>, VcpuStateError> {
        self.fds.iter().map(|fd| vcpu_state::save(&locked(fd), msrs)).collect()
    }

    /// Returns whether the guest uses hardware virtualisation on any vCPU. Pauses the vCPUs briefly.
    pub fn any_nested(&self) -> bool {
        let running = self.gate.wanted() == Wanted::Running;
        self.pause();
        // A vCPU that cannot be queried fails again when its state is saved.
        let nested = self.fds.iter().any(|fd| vcpu_state::is_nested(&locked(fd)).unwrap_or(false));
        if running {
            self.resume();
        }
        nested
    }

    /// Restores the state of each vCPU. The vCPUs must never have run.
    pub fn restore(&self, states: &[VcpuState]) -> Result<(), VcpuStateError> {
        self.fds.iter().zip(states).try_for_each(|(fd, state)| vcpu_state::restore(&locked(fd), state))
    }

    /// Tells the guest that it was paused, so that its watchdogs do not fire. The vCPUs must be paused.
    pub fn notify_paused(&self) {
        self.fds.iter().for_each(|fd| vcpu_state::notify_paused(&locked(fd)));
    }

    /// Resumes the vCPUs, unless they are stopped.
    pub fn resume(&self) {
        let _order = self.threads();
        if self.gate.wanted() == Wanted::Paused {
            self.gate.want(Wanted::Running);
        }
    }

    /// Pauses the vCPUs, and returns when all are paused.
    pub fn pause(&self) {
        let threads = self.threads();
        if self.gate.wanted() == Wanted::Running {
            self.gate.want(Wanted::Paused);
            interrupt(&threads);
        }
        // Wait without the lock: a vCPU that is stuck in a device must not prevent a stop.
        drop(threads);
        self.gate.wait_for_parked();
    }

    /// Stops the vCPUs, and returns when their threads have ended.
    pub fn stop(&self) {
        let mut threads = self.threads();
        self.gate.want(Wanted::Stopped);
        interrupt(&threads);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU's thread panicked");
            }
        }
    }

    /// Locks the threads. Only the holder of this lock may change the requested state.
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn locked(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

fn interrupt(threads: &[JoinHandle<()>]) {
    for thread in threads {
        // A thread that has ended by itself needs no interruption.
        if let Err(error) = thread.kill(SIGRTMIN()) {
            tracing::debug!("cannot signal a vCPU's thread: {error}");
        }
    }
}

thread_local! {
    /// The shared page of the vCPU that this thread runs; null in every other thread.
    static SHARED_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn leave_guest(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let page = SHARED_PAGE.get();
    if page.is_null() {
        return;
    }
    // SAFETY: a thread sets the pointer to its own vCPU's mapping and clears it before that is unmapped; the
    // handler runs in that thread.
    let flag = unsafe { &raw mut (*page).immediate_exit };
    // SAFETY: as above; the byte is only ever accessed by this thread and the kernel.
    unsafe { flag.write_volatile(1) };
}

/// A vCPU's thread.
struct Vcpu {
    id: u8,
    fd: Arc<Mutex<VcpuFd>>,
    gate: Arc<Gate>,
    buses: Arc<Buses>,
    end: EndSignal,
}

/// What the thread does after an exit from the guest.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Enter the guest again.
    Enter,
    /// Read the gate: the kernel has nothing left to complete.
    Look,
    /// End: the guest cannot go on.
    End,
}

impl Vcpu {
    fn run(&self) {
        // The mapping lives as long as the vCPU, which this thread holds.
        SHARED_PAGE.set(ptr::from_mut(locked(&self.fd).get_kvm_run()));
        let guard = Leaving { gate: Arc::clone(&self.gate), end: self.end.clone(), id: self.id };
        while self.run_guest(&mut locked(&self.fd)) {
            self.gate.park();
        }
        SHARED_PAGE.set(ptr::null_mut());
        drop(guard);
    }

    /// Runs the guest until a pause is requested. Returns false if a stop is requested or the guest cannot go on.
    fn run_guest(&self, fd: &mut VcpuFd) -> bool {
        loop {
            fd.set_kvm_immediate_exit(0);
            match self.gate.wanted() {
                Wanted::Stopped => return false,
                Wanted::Running => {
                    if self.enter(fd) == Next::End {
                        return false;
                    }
                }
                Wanted::Paused => return self.complete(fd),
            }
        }
    }

    /// Lets the kernel complete the last access without running the guest. Returns false if the guest cannot go on.
    fn complete(&self, fd: &mut VcpuFd) -> bool {
        loop {
            fd.set_kvm_immediate_exit(1);
            match self.enter(fd) {
                Next::Enter => {}
                Next::Look => return true,
                Next::End => return false,
            }
        }
    }

    /// Runs the guest until its next exit, and handles the exit.
    fn enter(&self, fd: &mut VcpuFd) -> Next {
        let crash = |reason: String| Crash::Kvm { vcpu: self.id, reason };
        let end = match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.buses.memory.read(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.buses.memory.write(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.buses.ports.read(u64::from(port), data);
                return Next::Enter;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.buses.ports.write(u64::from(port), data);
                return Next::Enter;
            }
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return Next::Enter,
            Ok(VcpuExit::Shutdown) => GuestEnd::Crash(Crash::TripleFault { vcpu: self.id }),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => GuestEnd::PowerOff,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => GuestEnd::Reset,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                GuestEnd::Crash(crash(format!("entry failed, hardware reason {reason:#x}")))
            }
            Ok(VcpuExit::InternalError) => {
                let rip = fd.get_regs().map_or(0, |registers| registers.rip);
                GuestEnd::Crash(crash(format!("internal error at instruction {rip:#x}")))
            }
            Ok(other) => GuestEnd::Crash(crash(format!("unexpected exit {other:?}"))),
            Err(error) if error.errno() == libc::EINTR => return Next::Look,
            Err(error) if error.errno() == libc::EAGAIN => return Next::Enter,
            Err(error) => GuestEnd::Crash(crash(error.to_string())),
        };
        self.end.report(end);
        Next::End
    }
}

/// Tells the gate that a thread ends, also by a panic.
struct Leaving {
    gate: Arc<Gate>,
    end: EndSignal,
    id: u8,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            SHARED_PAGE.set(ptr::null_mut());
            let reason = "its thread panicked".to_owned();
            self.end.report(GuestEnd::Crash(Crash::Kvm { vcpu: self.id, reason }));
        }
        self.gate.leave();
    }
}
