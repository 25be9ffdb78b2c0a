//! Interrupts a thread that is blocked in a system call.
//!
//! Flags such as `O_NONBLOCK` belong to the open file, so a peer that shares it can make any read, write or accept
//! block. The signal is `SIGNAL`. Its handler does nothing, but since it is installed without `SA_RESTART`, the signal
//! ends a blocking call with `EINTR` (signal(7)).
#![expect(unsafe_code, reason = "installs a signal handler, and signals a thread")]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;

/// The signal. Its default action is to ignore it, so it is harmless in child processes.
const SIGNAL: Signal = Signal::SIGURG;

/// How long a call that should not block may block. The timer repeats: the first signal may arrive before the call.
const INTERVAL: Duration = Duration::from_millis(10);

extern "C" fn on_signal(_: libc::c_int) {}

/// Installs the handler, once per process.
///
/// # Errors
/// Returns the error of `sigaction(2)`.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(SIGNAL, &action) }.map(drop)
    });
    Ok((*installed)?)
}

/// Unblocks the signal for the calling thread, which may have inherited a mask that blocks it.
pub fn allow() {
    let mut set = SigSet::empty();
    set.add(SIGNAL);
    // Cannot fail for a set of valid signals.
    let _ = set.thread_unblock();
}

/// Ends the system call that `thread` is blocked in. Does not affect a call that the thread is about to make, so the
/// caller must repeat this.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that has not been joined has a valid id, even if it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL as libc::c_int) };
}

/// Runs `call`, which should not block, and interrupts it every few milliseconds if it does.
///
/// # Errors
/// Returns an error if the timer cannot be created, or the error of `call`: `EINTR` if it blocked.
pub fn bounded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    install()?;
    allow();
    let to = SigevNotify::SigevThreadId { signal: SIGNAL, thread_id: gettid().as_raw(), si_value: 0 };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(to))?;
    timer.set(Expiration::Interval(INTERVAL.into()), TimerSetTimeFlags::empty())?;
    call()
}
