//! Errors of opening and configuring a TAP.

use std::io;
use std::os::fd::RawFd;

/// Why a TAP cannot be opened or configured.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is not a valid interface name.
    #[error("invalid interface name \"{0}\": use 1 to 15 bytes, without '/', ':' and white space")]
    Name(String),
    /// `/dev/net/tun` cannot be opened.
    #[error("cannot open /dev/net/tun: load the module tun, and run as a user with access to the device")]
    Open(#[source] io::Error),
    /// `TUNSETIFF` failed.
    #[error("cannot attach to TAP {name}{hint}")]
    Attach {
        /// The interface.
        name: String,
        /// The likely reason, and what to do.
        hint: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// An empty list of descriptors.
    #[error("--tap-fds: no descriptor given")]
    NoDescriptor,
    /// Not a TUN/TAP file.
    #[error("--tap-fds: descriptor {0} is not a TAP that is attached to an interface")]
    NotTap(RawFd),
    /// A TUN.
    #[error("--tap-fds: descriptor {fd} ({name}) is a TUN (IP packets); pass a TAP (Ethernet frames)")]
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
    #[error("--tap-fds: TAP descriptor {fd} ({name}) was opened without IFF_NO_PI; open it with this flag")]
    PacketInfo {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
    },
    /// Descriptors of different interfaces.
    #[error("--tap-fds: descriptor {fd} belongs to {name}, but the first one to {first}")]
    Mixed {
        /// The descriptor.
        fd: RawFd,
        /// Its interface.
        name: String,
        /// The first descriptor's interface.
        first: String,
    },
    /// A queue has another header size than the one that was set.
    #[error("TAP {name}: queue {pair} has headers of {is} bytes, not {wanted}")]
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
    /// The send buffer is so small that the kernel never reports room in it.
    #[error(
        "TAP {name}: queue {pair} has a send buffer of {bytes} bytes: once full, it stays full; use --sndbuf"
    )]
    Sndbuf {
        /// The interface.
        name: String,
        /// Its queue pair.
        pair: usize,
        /// The size of the send buffer.
        bytes: i32,
    },
    /// Two descriptors of one queue.
    #[error("--tap-fds: descriptors {first} and {fd} are the same queue; open one queue for each pair")]
    SameQueue {
        /// The descriptor.
        fd: RawFd,
        /// The descriptor that it duplicates.
        first: RawFd,
    },
    /// Another ioctl failed.
    #[error("TAP {name}: {operation} failed")]
    Ioctl {
        /// The interface.
        name: String,
        /// The ioctl.
        operation: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// Returns whether another process may be using the TAP, or a non-persistent TAP of the same name and another kind,
    /// which disappears with that process.
    pub(super) fn is_in_use(&self) -> bool {
        let Self::Attach { source, .. } = self else { return false };
        matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL))
    }
}
