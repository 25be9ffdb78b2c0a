//! One queue of a TAP: frames are read and written here, and nowhere else.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{empty_request, flags_word, ioctl, is_macvtap};

/// What became of a frame given to the TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The network has it.
    Done,
    /// The kernel refused it: a bad header, an interface that is down. It is lost, as on a wire.
    Refused,
    /// The kernel calls the frame or its header invalid.
    Invalid,
    /// The send buffer is full; try again when the TAP is writable.
    Full,
    /// A signal came first; try again.
    Interrupted,
}

/// What the TAP had to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame of so many bytes, header included.
    Frame(usize),
    /// Nothing now.
    Empty,
    /// A signal came first; try again.
    Interrupted,
    /// The guest's memory is not there any more, or the kernel is out of memory; the frame is lost.
    Failed,
    /// The interface is gone, and will not come back.
    Gone,
}

/// One queue of a TAP.
#[derive(Debug)]
pub struct TapQueue {
    pub(super) file: File,
    gone: AtomicBool,
    /// Whether the kernel takes `RWF_NOWAIT` (Linux 6.4 and later), with which no call depends on `O_NONBLOCK`.
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

    /// Whether it belongs to a macvtap, or the like, and not to a TAP.
    pub fn is_macvtap(&self) -> bool {
        self.macvtap
    }

    /// Whether the interface was deleted under the queue.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Looks whether the interface was deleted, where nobody reads the queue or writes to it.
    pub fn was_deleted(&self) -> bool {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF fills an ifreq.
        let result = unsafe { ioctl::get_iff(self.file.as_raw_fd(), &raw mut request) };
        // The second is a macvtap's word.
        if matches!(result, Err(Errno::EBADFD | Errno::ENOLINK)) {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.is_gone()
    }

    /// Gives the network one frame, its header first.
    ///
    /// # Safety
    /// Every vector must be readable memory, or memory that may fault (which is an error, not a crash).
    #[inline]
    pub unsafe fn send(&self, frame: &[libc::iovec]) -> Sent {
        let fd = self.file.as_raw_fd();
        let result = if self.nowait.load(Ordering::Relaxed) {
            // SAFETY: as the caller promises; there are at most IOV_MAX vectors.
            unsafe { libc::pwritev2(fd, frame.as_ptr(), count(frame), -1, libc::RWF_NOWAIT) }
        } else {
            // SAFETY: as above.
            unsafe { libc::writev(fd, frame.as_ptr(), count(frame)) }
        };
        if result >= 0 {
            return Sent::Done;
        }
        match Errno::last() {
            Errno::EAGAIN => Sent::Full,
            Errno::EINTR => Sent::Interrupted,
            // SAFETY: as the caller promises.
            Errno::EOPNOTSUPP if self.do_without_nowait() => unsafe { self.send(frame) },
            Errno::EINVAL => Sent::Invalid,
            Errno::EBADFD => {
                self.gone.store(true, Ordering::Relaxed);
                Sent::Refused
            }
            _ => Sent::Refused,
        }
    }

    /// Takes one frame, its header first. What does not fit is cut off, so give room for [`MAX_FRAME`](super::MAX_FRAME).
    ///
    /// # Safety
    /// Every vector must be memory that nobody but the guest reads or writes meanwhile.
    #[inline]
    pub unsafe fn receive(&self, room: &[libc::iovec]) -> Received {
        let fd = self.file.as_raw_fd();
        let result = if self.nowait.load(Ordering::Relaxed) {
            // SAFETY: as the caller promises; there are at most IOV_MAX vectors.
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
            // SAFETY: as the caller promises.
            Errno::EOPNOTSUPP if self.do_without_nowait() => unsafe { self.receive(room) },
            Errno::EBADFD | Errno::EIO => {
                self.gone.store(true, Ordering::Relaxed);
                Received::Gone
            }
            _ => Received::Failed,
        }
    }

    /// The kernel knows no `RWF_NOWAIT` for a TAP. Gives whether that is news.
    #[cold]
    fn do_without_nowait(&self) -> bool {
        let news = self.nowait.swap(false, Ordering::Relaxed);
        if news {
            self.set_nonblocking();
        }
        news
    }

    /// Waits until there is room in its send buffer. False if there is none by `deadline`.
    pub fn wait_writable(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    /// As on a kernel before 6.4.
    #[cfg(test)]
    pub fn without_nowait(self) -> Self {
        self.do_without_nowait();
        self
    }

    /// Sets `O_NONBLOCK`, which every holder of the open file can clear: older kernels read and write by it, and a
    /// target refuses a queue without it.
    pub fn set_nonblocking(&self) {
        let Ok(flags) = fcntl(&self.file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain) else { return };
        if !flags.contains(OFlag::O_NONBLOCK) {
            // Fails for no valid descriptor.
            let _ = fcntl(&self.file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
        }
    }

    /// Its descriptor for another process, which refuses one whose reads may block.
    pub fn lend(&self) -> BorrowedFd<'_> {
        self.set_nonblocking();
        self.as_fd()
    }

    /// As the kernel says. Of a macvtap it always says yes.
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
            // A macvtap does not tell how a queue stands, and refuses to do again what is done.
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
