//! Interrupts a thread that a system call holds up.
//!
//! Flags such as `O_NONBLOCK` belong to the open file, so a peer that holds it, too, can make any read, write or accept
//! block. The signal is `SIGNAL`, which does nothing by default; its handler does nothing either, but without
//! `SA_RESTART` it ends a blocking call with `EINTR` (signal(7)).
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

/// The signal. A program that ignores it loses nothing, and children start with its default, which is to ignore it.
const SIGNAL: Signal = Signal::SIGURG;

/// How long a call may block that should not. Repeated, for the first signal may come before the call.
const INTERVAL: Duration = Duration::from_millis(10);

extern "C" fn on_signal(_: libc::c_int) {}

/// Installs the handler, once in a process.
///
/// # Errors
/// What `sigaction(2)` fails with.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(SIGNAL, &action) }.map(drop)
    });
    Ok((*installed)?)
}

/// Lets the calling thread be interrupted, whatever it has inherited.
pub fn allow() {
    let mut set = SigSet::empty();
    set.add(SIGNAL);
    // Fails for no set of valid signals.
    let _ = set.thread_unblock();
}

/// Ends the blocking call that `thread` is in. One that it is about to make is not, so a caller repeats this.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that has not been joined has a valid id, even if it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL as libc::c_int) };
}

/// Makes a call in this thread that should not block, and interrupts it every few milliseconds where it does.
///
/// # Errors
/// What making a timer fails with, or the call itself: `EINTR` if it blocked.
pub fn bounded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    install()?;
    allow();
    let to = SigevNotify::SigevThreadId { signal: SIGNAL, thread_id: gettid().as_raw(), si_value: 0 };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(to))?;
    timer.set(Expiration::Interval(INTERVAL.into()), TimerSetTimeFlags::empty())?;
    call()
}
