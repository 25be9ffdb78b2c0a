//! Survives a front-end that truncates a file after sharing it, which makes accesses beyond the new end raise `SIGBUS`.
//! The handler replaces the whole mapping with zeroed private memory, so that the access succeeds and the thread
//! continues, and notifies the event loop, which ends the session. Any other `SIGBUS` still ends the process.
//!
//! The table of watched ranges is static and lock-free, since the handler may run at any instruction.
#![expect(unsafe_code, reason = "installs a signal handler that replaces mappings")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// How many regions a front-end may share (`GET_MAX_MEM_SLOTS`): as many as with QEMU's back-end library.
pub const MAX_REGIONS: usize = 509;

/// While one session state replaces another, two whole tables, two logs and two inflight regions may be mapped.
const SLOTS: usize = 2 * (MAX_REGIONS + 3);

struct Slot {
    taken: AtomicBool,
    /// 0 while the slot is not watched.
    start: AtomicUsize,
    length: AtomicUsize,
}

static WATCHED: [Slot; SLOTS] = [const {
    Slot { taken: AtomicBool::new(false), start: AtomicUsize::new(0), length: AtomicUsize::new(0) }
}; SLOTS];
static STRUCK: AtomicBool = AtomicBool::new(false);
static ALARM: OnceLock<OwnedFd> = OnceLock::new();

/// A watched address range. While this value lives, the process survives a `SIGBUS` in the range.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
}

impl Watch {
    /// Watches `length` bytes at `start`, which must be a whole mapping. Returns `None` if no slot is left.
    pub fn new(start: usize, length: usize) -> Option<Self> {
        let slot = WATCHED.iter().position(|slot| !slot.taken.swap(true, Ordering::Acquire))?;
        WATCHED[slot].length.store(length, Ordering::Release);
        WATCHED[slot].start.store(start, Ordering::Release);
        Some(Self { slot })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED[self.slot].start.store(0, Ordering::Release);
        WATCHED[self.slot].taken.store(false, Ordering::Release);
    }
}

/// Installs the handler and returns the eventfd that becomes readable when the handler replaces a mapping.
///
/// # Errors
/// Returns the error of `eventfd(2)` or `sigaction(2)`.
pub fn install() -> io::Result<BorrowedFd<'static>> {
    let alarm = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let alarm = ALARM.get_or_init(|| OwnedFd::from(alarm));
    let action = SigAction::new(
        SigHandler::SigAction(on_sigbus),
        SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER | SaFlags::SA_ONSTACK,
        SigSet::empty(),
    );
    // SAFETY: the handler uses only atomics, mmap(2), write(2) and sigaction(2), and keeps errno.
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(std::os::fd::AsFd::as_fd(alarm))
}

/// Returns whether a mapping was replaced since the last call.
pub fn take_truncation() -> bool {
    if let Some(alarm) = ALARM.get() {
        let mut count = [0; 8];
        // Reset the counter. The eventfd is non-blocking, and its value does not matter.
        let _ = nix::unistd::read(alarm, &mut count);
    }
    STRUCK.swap(false, Ordering::AcqRel)
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let errno = nix::errno::Errno::last_raw();
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS carries an address.
    let address = unsafe { info.si_addr() } as usize;
    let range = WATCHED.iter().find_map(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        let length = slot.length.load(Ordering::Acquire);
        (start != 0 && address.wrapping_sub(start) < length).then_some((start, length))
    });
    if range.is_none_or(|(start, length)| !replace(start, length)) {
        die();
        return;
    }
    STRUCK.store(true, Ordering::Release);
    if let Some(alarm) = ALARM.get() {
        // SAFETY: write(2) on an open eventfd with 8 readable bytes.
        unsafe { libc::write(alarm.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) };
    }
    nix::errno::Errno::set_raw(errno);
}

/// Maps zeroed private memory over the range. Returns `false` if the kernel refuses.
fn replace(start: usize, length: usize) -> bool {
    // SAFETY: the range is exactly one of our own mappings of shared memory. Only raw pointers point into it, and they
    // stay valid.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Restores the default action, so that the faulting instruction runs again and ends the process with `SIGBUS`.
fn die() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: restoring the default action is async-signal-safe.
    let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
}

#[cfg(test)]
mod tests {
    use crate::memory::{GuestMemory, RegionLayout};

    #[test]
    fn access_beyond_a_truncated_file_is_survived_and_reported() {
        super::install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let layout = RegionLayout { guest_address: 0, size: 0x4000, user_address: 0, file_offset: 0 };
        let memory = GuestMemory::map([(layout, file.try_clone().unwrap())]).unwrap();
        let (pointer, _) = memory.resolve(0x2000, &mut 0).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: the pointer is into the mapping, which is replaced when this faults.
        let byte = unsafe { pointer.read_volatile() };
        assert_eq!(byte, 0);
        assert!(super::take_truncation());
        assert!(!super::take_truncation());
    }
}
