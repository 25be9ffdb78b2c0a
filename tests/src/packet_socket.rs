//! The network side of a TAP: sends frames to the owner of the TAP, and receives the frames that the owner sends. A
//! frame has a virtio-net header, so large frames and partial checksums pass unchanged.
#![expect(unsafe_code, reason = "nix lacks the structures that bind and configure packet sockets")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{readv, writev};

use crate::fake_frontend::NetHeader;
use crate::netns::{interface_index, wait_running};

/// The length of the virtio-net header on packet sockets.
const HEADER_LENGTH: usize = 10;

/// The timeout for a frame. Only catches frames that are lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// A packet socket on one interface. It does not receive the frames that it sends.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// Opens a socket on an interface in this thread's namespace. The socket receives frames from now on.
    ///
    /// # Errors
    /// Returns an error if the interface does not exist, or if this process lacks the privilege.
    pub fn open(interface: &str) -> Result<Self> {
        let socket = Self::open_queued_now(interface)?;
        // Sends directly to the driver. The queueing discipline waits for the carrier, or drops frames.
        set_option(&socket.socket, libc::PACKET_QDISC_BYPASS, 1)?;
        Ok(socket)
    }

    /// Opens a socket whose frames pass the interface's queueing discipline, like those of other programs: only there
    /// does the kernel segment large frames. Waits until the interface has a carrier, which needs an owner of the TAP.
    ///
    /// # Errors
    /// Same as [`Self::open`]. Also returns an error if the TAP gets no owner in time.
    pub fn open_queued(interface: &str) -> Result<Self> {
        wait_running(interface)?;
        Self::open_queued_now(interface)
    }

    fn open_queued_now(interface: &str) -> Result<Self> {
        let index = interface_index(interface)?;
        let protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0: the socket receives nothing before it is bound to its interface.
        // SAFETY: takes only numbers.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })
            .context("cannot create a packet socket")?;
        // SAFETY: the descriptor was just created, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        set_option(&socket, libc::PACKET_VNET_HDR, 1)?;
        set_option(&socket, libc::PACKET_IGNORE_OUTGOING, 1)?;
        let size: libc::c_int = 8 << 20;
        nix::sys::socket::setsockopt(
            &socket,
            nix::sys::socket::sockopt::RcvBufForce,
            &usize::try_from(size)?,
        )?;

        // SAFETY: `sockaddr_ll` is plain data, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        let length = u32::try_from(size_of::<libc::sockaddr_ll>())?;
        // SAFETY: the address has the given length, and outlives the call.
        let result =
            unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast::<libc::sockaddr>(), length) };
        Errno::result(result).with_context(|| format!("cannot bind a packet socket to {interface}"))?;
        Ok(Self { socket, buffer: vec![0; 70_000] })
    }

    /// Sends a frame to the interface, where the owner of a TAP reads it. The header says how to segment the frame, and
    /// where to fill in its checksum.
    ///
    /// # Errors
    /// Returns the error of `writev(2)`: `ENOBUFS` if the interface dropped the frame.
    pub fn send_with(&self, header: &NetHeader, frame: &[u8]) -> Result<()> {
        let header = header.encode();
        let parts = [IoSlice::new(&header[..HEADER_LENGTH]), IoSlice::new(frame)];
        let sent =
            writev(&self.socket, &parts).with_context(|| format!("cannot send {} bytes", frame.len()))?;
        ensure!(sent == HEADER_LENGTH + frame.len(), "only {sent} bytes were sent");
        Ok(())
    }

    /// Sends a frame without offloads.
    ///
    /// # Errors
    /// Same as [`Self::send_with`].
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_with(&NetHeader::default(), frame)
    }

    /// Sends a frame without offloads. Returns whether the interface accepted it: a full TAP drops frames.
    ///
    /// # Errors
    /// Same as [`Self::send_with`], except for `ENOBUFS`.
    pub fn try_send(&self, frame: &[u8]) -> Result<bool> {
        match self.send(frame) {
            Err(error) if error.downcast_ref() == Some(&Errno::ENOBUFS) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Returns the next frame from the interface, or `None` if none has arrived.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn try_receive(&mut self) -> Result<Option<(NetHeader, &[u8])>> {
        let length = match self.read() {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno).context("cannot receive from the interface"),
        };
        ensure!(length >= HEADER_LENGTH, "a packet has only {length} bytes");
        let header = NetHeader::decode(&self.buffer[..HEADER_LENGTH]);
        Ok(Some((header, &self.buffer[HEADER_LENGTH..length])))
    }

    /// Waits for a frame from the interface.
    ///
    /// # Errors
    /// Returns an error if none arrives in time.
    pub fn receive(&mut self) -> Result<(NetHeader, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((header, frame)) = self.try_receive()? {
                return Ok((header, frame.to_vec()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "timed out before a frame arrived from the interface");
            poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], PollTimeout::try_from(left)?)?;
        }
    }

    /// Discards all frames that have arrived, and returns their number.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn drain(&mut self) -> Result<usize> {
        let mut count = 0;
        loop {
            match self.read() {
                // EINVAL: the packet socket cannot describe the offloads of a frame, and has dropped it.
                Ok(_) | Err(Errno::EINVAL) => count += 1,
                Err(Errno::EAGAIN) => return Ok(count),
                Err(errno) => return Err(errno).context("cannot receive from the interface"),
            }
        }
    }

    fn read(&mut self) -> nix::Result<usize> {
        readv(&self.socket, &mut [IoSliceMut::new(&mut self.buffer)])
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set_option(socket: &OwnedFd, option: libc::c_int, value: libc::c_int) -> Result<()> {
    let length = u32::try_from(size_of::<libc::c_int>())?;
    // SAFETY: all options used here take an int, which has the given length and outlives the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const value).cast(), length)
    };
    Errno::result(result).with_context(|| format!("cannot set packet socket option {option}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::unistd::{read, write};

    use super::*;
    use crate::netns::Netns;

    #[test]
    fn frames_cross_the_tap_both_ways() {
        let netns = Netns::enter().unwrap();
        let taps = netns.create_tap("tap0", 1).unwrap();
        let mut network = PacketSocket::open("tap0").unwrap();
        let frame = [&[2; 12][..], &[8, 0], &[7; 46]].concat();

        network.send(&frame).unwrap();
        let mut bytes = [0; 100];
        let length = read(&taps[0], &mut bytes).unwrap();
        assert_eq!(bytes[10..length], frame);

        write(&taps[0], &[&[0; 10][..], &frame].concat()).unwrap();
        let (header, received) = network.receive().unwrap();
        assert_eq!(received, frame);
        assert_eq!(header.gso_type, 0);
        assert_eq!(network.drain().unwrap(), 0, "the socket received its own frames");
    }
}
