//! The network: sends frames to the TAP's owner, many with one system call.
#![expect(unsafe_code, reason = "sendmmsg takes structures that point to each other")]

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use crate::fake_frontend::NetHeader;
use crate::fake_frontend::net::{GSO_TCPV4, NEEDS_CSUM};

/// The length of a virtio-net header on packet sockets.
const HEADER: usize = 10;
/// An Ethernet type for local experiments: no protocol of the kernel takes it.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Offset of a frame's time stamp.
pub const STAMP: usize = 14;

/// Returns a frame of `length` bytes and its virtio-net header, which asks to cut a large frame into TCP segments.
pub fn frame(length: usize) -> (NetHeader, Vec<u8>) {
    let mut bytes = vec![0; length];
    // The addresses of two other hosts, not the TAP's.
    bytes[..12].copy_from_slice(&[2, 0xba, 0x70, 0, 0, 2, 2, 0xba, 0x70, 0, 0, 3]);
    if length <= 1514 {
        bytes[12..14].copy_from_slice(&EXPERIMENT);
        return (NetHeader::default(), bytes);
    }
    bytes[12..14].copy_from_slice(&[0x08, 0x00]);
    let total = u16::try_from(length - 14).unwrap_or(u16::MAX).to_be_bytes();
    bytes[14..34].copy_from_slice(&[
        0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ]);
    let sum: u32 =
        bytes[14..34].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap_or_default();
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    // TCP: ports, sequence, acknowledgement, length 20, ACK.
    bytes[34..54].copy_from_slice(&[4, 0, 4, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    let header = NetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    (header, bytes)
}

/// Frames that are sent together.
#[derive(Debug)]
pub struct Burst {
    frames: Vec<Vec<u8>>,
}

impl Burst {
    /// Creates `count` frames of `length` bytes. Their source addresses differ, so that the kernel spreads them over
    /// the queues.
    pub fn new(count: usize, length: usize) -> Self {
        let (header, bytes) = frame(length);
        let frames = (0..count)
            .map(|nth| {
                let mut frame = [&header.encode()[..HEADER], &bytes].concat();
                frame[HEADER + 11] = u8::try_from(nth % 251).unwrap_or_default();
                frame
            })
            .collect();
        Self { frames }
    }

    /// Puts `stamp` into frame `nth`.
    pub fn stamp(&mut self, nth: usize, stamp: u64) {
        self.frames[nth][HEADER + STAMP..][..8].copy_from_slice(&stamp.to_le_bytes());
    }

    /// Sends the first `count` frames on a packet socket. The interface may drop some without an error.
    ///
    /// # Errors
    /// Returns an error if a system call fails, except because the interface is full.
    pub fn send(&mut self, socket: BorrowedFd<'_>, count: usize) -> Result<()> {
        let mut vectors: Vec<libc::iovec> = self.frames[..count]
            .iter_mut()
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
            .collect();
        let mut headers: Vec<libc::mmsghdr> = vectors
            .iter_mut()
            .map(|vector| {
                // SAFETY: `mmsghdr` is plain data, for which all zeroes is a value.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_iov = vector;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        let mut sent = 0;
        while sent < headers.len() {
            let rest = &mut headers[sent..];
            let left = libc::c_uint::try_from(rest.len())?;
            // SAFETY: the headers point to vectors, and these to frames, all of which live through the call.
            let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), left, 0) };
            match Errno::result(result) {
                Ok(0) => bail!("sendmmsg sent nothing"),
                Ok(count) => sent += usize::try_from(count)?,
                // The interface dropped this frame.
                Err(Errno::ENOBUFS) => sent += 1,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno).context("sendmmsg"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_frame_has_a_valid_ip_header_checksum() {
        let (_, bytes) = frame(super::super::scenario::LARGE);
        let sum: u32 =
            bytes[14..34].chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
