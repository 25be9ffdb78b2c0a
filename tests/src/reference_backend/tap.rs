//! The reference back-end's TAP. Its frames have virtio-net headers.
#![expect(unsafe_code, reason = "a TAP is configured by ioctl")]

use std::ffi::{c_int, c_uint, c_ulong};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use crate::netns::open_tun;

/// The length of the header with `VIRTIO_F_VERSION_1`.
const HEADER: usize = 12;
/// The offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// The longest frame, with its header: 64 KiB of IP behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = HEADER + 18 + 65_535;

/// A TAP with one queue.
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the TAP of this name, or creates it.
    pub fn open(name: &str) -> Result<Self> {
        let tap = open_tun(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
        fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("O_NONBLOCK")?;
        let length = c_int::try_from(HEADER)?;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
        Errno::result(result).context("TUNSETVNETHDRSZ")?;
        Ok(Self { file: tap.into() })
    }

    /// Sets the offloads that a guest with these virtio features accepts.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let offloads = [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        let accepted = offloads.into_iter().filter(|(feature, _)| features & (1 << feature) != 0);
        let offloads: c_uint = accepted.fold(0, |all, (_, offload)| all | offload);
        // SAFETY: TUNSETOFFLOAD takes a number.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(offloads)) };
        Errno::result(result)?;
        Ok(())
    }

    /// Reads a frame and sets `num_buffers` in its header to one. Returns its length, or `None` if the TAP is empty.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(frame) {
            Ok(length) => {
                // The kernel does not write this field.
                frame[NUM_BUFFERS..HEADER].copy_from_slice(&1_u16.to_le_bytes());
                Ok(Some(length))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a frame with its header. Drops a frame that the kernel refuses.
    pub fn write(&self, frame: &[u8]) {
        let _ = (&self.file).write(frame);
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
