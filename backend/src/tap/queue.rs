//! One queue of a TAP. All reads and writes of frames are here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{empty_request, flags_word, ioctl, is_macvtap};

/// The result of sending a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The TAP has accepted the frame.
    Done,
    /// The kernel refused the frame, for example because the interface is down. The frame is lost, as on a wire.
    Refused,
    /// The kernel considers the frame or its header invalid.
    Invalid,
    /// The send buffer is full. Try again when the TAP is writable.
    Full,
    /// A signal interrupted the call. Try again.
    Interrupted,
}

/// The result of receiving a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame of so many bytes, header included.
    Frame(usize),
    /// The queue is empty.
    Empty,
    /// A signal interrupted the call. Try again.
    Interrupted,
    /// The guest's memory has disappeared, or the kernel is out of memory. The frame is lost.
    Failed,
    /// The interface was deleted.
    Gone,
}

/// One queue of a TAP.
#[derive(Debug)]
pub struct TapQueue {
    pub(super) file: File,
    gone: AtomicBool,
    /// Whether the kernel supports `RWF_NOWAIT` (Linux 6.4 and later). With it no call depends on `O_NONBLOCK`.
    nowait: AtomicBool,
    pub(super) macvtap: bool,
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl TapQueue {
    pub(crate) fn new(file: File) -> Self {
        let macvtap = is_macvtap(&file);
        Self { file, gone: AtomicBool::new(false), nowait: AtomicBool::new(true), macvtap }
    }

    /// Returns whether the queue belongs to a macvtap or an ipvtap rather than to a TAP.
    pub fn is_macvtap(&self) -> bool {
        self.macvtap
    }

    /// Returns whether the interface is known to have been deleted.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Asks the kernel whether the interface was deleted. This is for queues that the worker does not read or write.
    pub fn was_deleted(&self) -> bool {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF fills an ifreq.
        let result = unsafe { ioctl::get_iff(self.file.as_raw_fd(), &raw mut request) };
        // A TAP returns EBADFD, a macvtap ENOLINK.
        if matches!(result, Err(Errno::EBADFD | Errno::ENOLINK)) {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.is_gone()
    }

    /// Sends one frame, header first.
    ///
    /// # Safety
    /// Every vector must be readable memory, or memory that may fault (which causes an error, not a crash).
    #[inline]
    pub unsafe fn send(&self, frame: &[libc::iovec]) -> Sent {
        let fd = self.file.as_raw_fd();
        let result = if self.nowait.load(Ordering::Relaxed) {
            // SAFETY: the caller guarantees it; there are at most IOV_MAX vectors.
            unsafe { libc::pwritev2(fd, frame.as_ptr(), count(frame), -1, libc::RWF_NOWAIT) }
        } else {
            // SAFETY: as above.
            unsafe { libc::writev(fd, frame.as_ptr(), count(frame)) }
        };
        let error = if result < 0 { Errno::last_raw() } else { 0 };
        if error == libc::EOPNOTSUPP && self.do_without_nowait() {
            // SAFETY: the caller guarantees it.
            return unsafe { self.send(frame) };
        }
        self.sent(-error)
    }

    /// Returns what the result of a write means: a length, or a negative error number.
    #[inline]
    pub(super) fn sent(&self, result: i32) -> Sent {
        if result >= 0 {
            return Sent::Done;
        }
        match Errno::from_raw(-result) {
            Errno::EAGAIN => Sent::Full,
            Errno::EINTR => Sent::Interrupted,
            Errno::EINVAL => Sent::Invalid,
            Errno::EBADFD => {
                self.gone.store(true, Ordering::Relaxed);
                Sent::Refused
            }
            _ => Sent::Refused,
        }
    }

    /// Returns whether the send buffer is unlimited: no frame then waits for room in it.
    pub fn is_unlimited(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: TUNGETSNDBUF fills an int.
        let result = unsafe { ioctl::get_sndbuf(self.file.as_raw_fd(), &raw mut bytes) };
        result.is_ok() && bytes == libc::c_int::MAX
    }

    /// Returns whether no call depends on `O_NONBLOCK`, as far as is known.
    #[inline]
    pub fn has_nowait(&self) -> bool {
        self.nowait.load(Ordering::Relaxed)
    }

    /// Receives one frame, header first. The kernel truncates a frame that does not fit, so `room` must have space for
    /// [`MAX_FRAME`](super::MAX_FRAME).
    ///
    /// # Safety
    /// Every vector must be memory that only the guest reads or writes during the call.
    #[inline]
    pub unsafe fn receive(&self, room: &[libc::iovec]) -> Received {
        let fd = self.file.as_raw_fd();
        let result = if self.nowait.load(Ordering::Relaxed) {
            // SAFETY: the caller guarantees it; there are at most IOV_MAX vectors.
            unsafe { libc::preadv2(fd, room.as_ptr(), count(room), -1, libc::RWF_NOWAIT) }
        } else {
            // SAFETY: as above.
            unsafe { libc::readv(fd, room.as_ptr(), count(room)) }
        };
        if let Ok(length) = usize::try_from(result) {
            return Received::Frame(length);
        }
        match Errno::last() {
            Errno::EAGAIN => Received::Empty,
            Errno::EINTR => Received::Interrupted,
            // SAFETY: the caller guarantees it.
            Errno::EOPNOTSUPP if self.do_without_nowait() => unsafe { self.receive(room) },
            Errno::EBADFD | Errno::EIO => {
                self.gone.store(true, Ordering::Relaxed);
                Received::Gone
            }
            _ => Received::Failed,
        }
    }

    /// Notes that the kernel does not support `RWF_NOWAIT` for a TAP. Returns whether that was not known before.
    #[cold]
    pub(super) fn do_without_nowait(&self) -> bool {
        let news = self.nowait.swap(false, Ordering::Relaxed);
        if news {
            self.set_nonblocking();
        }
        news
    }

    /// Waits until there is room in the send buffer. Returns `false` if there is none by `deadline`.
    pub fn wait_writable(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    /// Makes the queue behave as on a kernel before 6.4.
    #[cfg(test)]
    pub fn without_nowait(self) -> Self {
        self.do_without_nowait();
        self
    }

    /// Sets `O_NONBLOCK`, which every holder of the open file can clear. Without `RWF_NOWAIT`, reads and writes depend
    /// on it, and the target of a hand-over refuses a queue without it.
    pub fn set_nonblocking(&self) {
        let Ok(flags) = fcntl(&self.file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain) else { return };
        if !flags.contains(OFlag::O_NONBLOCK) {
            // Cannot fail for a valid descriptor.
            let _ = fcntl(&self.file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
        }
    }

    /// Returns the descriptor for another process, with `O_NONBLOCK` set: the target refuses a blocking one.
    pub fn lend(&self) -> BorrowedFd<'_> {
        self.set_nonblocking();
        self.as_fd()
    }

    /// Asks the kernel whether the queue is attached. For a macvtap the answer is always yes.
    pub(super) fn is_attached(&self) -> nix::Result<bool> {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF fills an ifreq.
        unsafe { ioctl::get_iff(self.file.as_raw_fd(), &raw mut request) }?;
        // SAFETY: TUNGETIFF sets the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        Ok(flags & libc::IFF_DETACH_QUEUE == 0)
    }

    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = empty_request();
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags_word(flags);
        // SAFETY: TUNSETQUEUE reads an ifreq.
        match unsafe { ioctl::set_queue(self.file.as_raw_fd(), &raw const request) } {
            // A macvtap does not report the state of a queue, and refuses to set the state that it already has.
            Err(Errno::EINVAL) if self.macvtap => Ok(()),
            other => other.map(|_| ()).map_err(io::Error::from),
        }
    }

    pub(super) fn header_size(&self) -> nix::Result<libc::c_int> {
        let mut size: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ fills an int.
        unsafe { ioctl::get_vnet_hdr_size(self.file.as_raw_fd(), &raw mut size) }?;
        Ok(size)
    }
}

fn count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX)
}
