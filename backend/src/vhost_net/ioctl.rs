//! The kernel's vhost-net interface (`linux/vhost.h`): the `vhost` crate's, and what that lacks.
//!
//! The crate opens the device itself, checks rings against its own type of guest memory (and refuses a ring that ends
//! where a region does), and does not accept −1 as a descriptor. So descriptors and ring addresses are set here, with
//! addresses of this process.
#![expect(unsafe_code, reason = "vhost ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use vhost::Error as VhostError;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST, VHOST_NET_SET_BACKEND, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR,
    VHOST_SET_VRING_KICK, vhost_vring_addr, vhost_vring_file, vhost_vring_state,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(VHOST_SET_VRING_BUSYLOOP_TIMEOUT, VHOST, 0x23, vhost_vring_state);

/// An open `/dev/vhost-net`.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    /// Empty: the crate's address checks are not used.
    no_memory: Arc<GuestMemoryMmap<()>>,
}

impl From<File> for Kernel {
    fn from(file: File) -> Self {
        Self { file, no_memory: Arc::default() }
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Implements the crate's `VhostBackend` for [`Kernel`].
impl VhostKernBackend for Kernel {
    type AS = Arc<GuestMemoryMmap<()>>;

    fn mem(&self) -> &Self::AS {
        &self.no_memory
    }
}

/// An eventfd of a ring.
#[derive(Clone, Copy, Debug)]
pub enum Wire {
    /// Notifications from the driver.
    Kick,
    /// Notifications to the driver.
    Call,
    /// Signalled when the driver wrote invalid values to the ring.
    Error,
}

impl Kernel {
    /// Connects an eventfd to a ring, or disconnects it (`VHOST_SET_VRING_KICK`, `…_CALL`, `…_ERR`).
    ///
    /// # Errors
    /// Returns the error of the ioctl.
    pub fn connect(&self, ring: u32, wire: Wire, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = vhost_vring_file { index: ring, fd: number(eventfd) };
        let request = match wire {
            Wire::Kick => VHOST_SET_VRING_KICK(),
            Wire::Call => VHOST_SET_VRING_CALL(),
            Wire::Error => VHOST_SET_VRING_ERR(),
        };
        // SAFETY: the requests read a vhost_vring_file.
        checked(unsafe { ioctl_with_ref(&self.file, request, &file) })
    }

    /// Sets the addresses of a ring in this process (`VHOST_SET_VRING_ADDR`).
    ///
    /// # Errors
    /// Returns the error of the ioctl.
    pub fn set_addresses(&self, addresses: &vhost_vring_addr) -> io::Result<()> {
        // SAFETY: the request reads a vhost_vring_addr.
        checked(unsafe { ioctl_with_ref(&self.file, VHOST_SET_VRING_ADDR(), addresses) })
    }

    /// Sets how many microseconds to busy-poll before sleeping (`VHOST_SET_VRING_BUSYLOOP_TIMEOUT`).
    ///
    /// # Errors
    /// Returns the error of the ioctl.
    pub fn set_busy_loop(&self, ring: u32, microseconds: u32) -> io::Result<()> {
        let state = vhost_vring_state { index: ring, num: microseconds };
        // SAFETY: the request reads a vhost_vring_state.
        checked(unsafe { ioctl_with_ref(&self.file, VHOST_SET_VRING_BUSYLOOP_TIMEOUT(), &state) })
    }

    /// Connects a ring to a TAP's queue, which starts the ring, or disconnects it: then the kernel completes the chains
    /// that it has taken and does not touch the ring any more (`VHOST_NET_SET_BACKEND`).
    ///
    /// # Errors
    /// Returns the error of the ioctl.
    pub fn set_backend(&self, ring: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = vhost_vring_file { index: ring, fd: number(tap) };
        // SAFETY: the request reads a vhost_vring_file.
        checked(unsafe { ioctl_with_ref(&self.file, VHOST_NET_SET_BACKEND(), &file) })
    }
}

/// Extracts the kernel's error from an error of the crate.
pub fn io_error(error: VhostError) -> io::Error {
    match error {
        VhostError::IoctlError(error) | VhostError::IOError(error) | VhostError::VhostOpen(error) => error,
        other => io::Error::other(other),
    }
}

fn number(fd: Option<BorrowedFd<'_>>) -> RawFd {
    fd.map_or(-1, |fd| fd.as_raw_fd())
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
