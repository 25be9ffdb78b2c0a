//! Why a TAP cannot be used.

use std::io;
use std::os::fd::RawFd;

/// Why a TAP is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name does not fit `IFNAMSIZ`.
    #[error("\"{0}\" is no interface name: use 1 to 15 bytes, without '/' and white space")]
    Name(String),
    /// `/dev/net/tun` cannot be opened.
    #[error("cannot open /dev/net/tun: load the tun module, and run with access to it")]
    Open(#[source] io::Error),
    /// `TUNSETIFF` failed.
    #[error("cannot attach to TAP {name}{hint}")]
    Attach {
        /// The interface.
        name: String,
        /// What is likely the matter.
        hint: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Not an open descriptor.
    #[error("--tap-fds: descriptor {0} is not open, or was given twice")]
    NotOpen(RawFd),
    /// Not a TUN/TAP file.
    #[error("--tap-fds: descriptor {0} is not a TAP that is attached to an interface")]
    NotTap(RawFd),
    /// A TUN.
    #[error("--tap-fds: descriptor {fd} ({name}) is a TUN (IP packets); a TAP (Ethernet frames) is needed")]
    Tun {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
    },
    /// Opened without `IFF_VNET_HDR`.
    #[error("--tap-fds: TAP descriptor {fd} ({name}) was opened without IFF_VNET_HDR; open it with vnet_hdr")]
    NoVnetHdr {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
    },
    /// Opened without `IFF_NO_PI`.
    #[error("--tap-fds: TAP descriptor {fd} ({name}) was opened without IFF_NO_PI")]
    PacketInfo {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
    },
    /// Descriptors of different interfaces.
    #[error("--tap-fds: descriptor {fd} belongs to {name}, the first one to {first}")]
    Mixed {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
        /// The first descriptor's interface.
        first: String,
    },
    /// A queue did not take the header size.
    #[error("TAP {name}: queue {pair} has headers of {is} bytes, not of {wanted}")]
    HeaderSize {
        /// The interface.
        name: String,
        /// Its queue pair.
        pair: usize,
        /// The size that the kernel uses.
        is: i32,
        /// The size that was set.
        wanted: i32,
    },
    /// The kernel would never tell of room in it.
    #[error(
        "TAP {name}: queue {pair} has a send buffer of {bytes} bytes, which stays full for good: give --sndbuf"
    )]
    Sndbuf {
        /// The interface.
        name: String,
        /// Its queue pair.
        pair: usize,
        /// Its size.
        bytes: i32,
    },
    /// A queue given twice.
    #[error("--tap-fds: descriptors {first} and {fd} are the same queue; open one queue for each pair")]
    SameQueue {
        /// The descriptor.
        fd: RawFd,
        /// The one that it duplicates.
        first: RawFd,
    },
    /// Another ioctl failed.
    #[error("TAP {name}: {operation} failed")]
    Ioctl {
        /// The interface.
        name: String,
        /// Which ioctl.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// Whether another process has the TAP, or has a TAP of that name and of the other kind, which may go with it.
    pub(super) fn is_in_use(&self) -> bool {
        let Self::Attach { source, .. } = self else { return false };
        matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL))
    }
}
