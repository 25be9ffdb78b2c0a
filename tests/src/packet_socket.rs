//! The network's side of a TAP: puts frames in front of its owner, and sees what its owner sends — with the
//! virtio-net header, so that large frames and partial checksums go through as such.
#![expect(
    unsafe_code,
    reason = "packet sockets are bound and configured by structures that nix does not have"
)]

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

/// The length of the header on packet sockets.
const HEADER_LENGTH: usize = 10;

/// How long a frame may take. Only catches one that does not come.
const PATIENCE: Duration = Duration::from_secs(120);

/// A packet socket on one interface, which sees nothing of what it sends itself.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// Opens a socket on an interface in this thread's namespace. It receives from now on.
    ///
    /// # Errors
    /// Where there is no such interface, or no privilege.
    pub fn open(interface: &str) -> Result<Self> {
        let socket = Self::open_queued_now(interface)?;
        // Straight to the driver: no queueing discipline that waits for the carrier, or drops.
        set_option(&socket.socket, libc::PACKET_QDISC_BYPASS, 1)?;
        Ok(socket)
    }

    /// Opens a socket whose frames pass the interface's queueing discipline, as everybody's do: only there are large
    /// ones cut into segments by the kernel. Waits until that works, which takes the TAP's owner to be there.
    ///
    /// # Errors
    /// Those of [`Self::open`], and if the interface has nobody who reads it.
    pub fn open_queued(interface: &str) -> Result<Self> {
        wait_running(interface)?;
        Self::open_queued_now(interface)
    }

    fn open_queued_now(interface: &str) -> Result<Self> {
        let index = interface_index(interface)?;
        let protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0: nothing is received before the socket is bound to the one interface.
        // SAFETY: takes numbers only.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) }).context("packet socket")?;
        // SAFETY: the descriptor was just created and belongs to nobody else.
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
        // SAFETY: the address is of the length given, and lives through the call.
        let result =
            unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast::<libc::sockaddr>(), length) };
        Errno::result(result).with_context(|| format!("bind a packet socket to {interface}"))?;
        Ok(Self { socket, buffer: vec![0; 70_000] })
    }

    /// Sends a frame to the interface: a TAP's owner will read it. Header fields say whether it is to be segmented, and
    /// where its checksum is missing.
    ///
    /// # Errors
    /// The system's: `ENOBUFS` where the interface has dropped it.
    pub fn send_with(&self, header: &NetHeader, frame: &[u8]) -> Result<()> {
        let header = header.encode();
        let parts = [IoSlice::new(&header[..HEADER_LENGTH]), IoSlice::new(frame)];
        let sent = writev(&self.socket, &parts).with_context(|| format!("send {} bytes", frame.len()))?;
        ensure!(sent == HEADER_LENGTH + frame.len(), "only {sent} bytes were sent");
        Ok(())
    }

    /// Sends a plain frame.
    ///
    /// # Errors
    /// Those of [`Self::send_with`].
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_with(&NetHeader::default(), frame)
    }

    /// Sends a plain frame; returns whether the interface took it. A full TAP drops it.
    ///
    /// # Errors
    /// Those of [`Self::send_with`], but for `ENOBUFS`.
    pub fn try_send(&self, frame: &[u8]) -> Result<bool> {
        match self.send(frame) {
            Err(error) if error.downcast_ref() == Some(&Errno::ENOBUFS) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Takes the next frame that came from the interface, if there is one.
    ///
    /// # Errors
    /// The system's.
    pub fn try_receive(&mut self) -> Result<Option<(NetHeader, &[u8])>> {
        let length = match self.read() {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno).context("receive from the interface"),
        };
        ensure!(length >= HEADER_LENGTH, "a packet of {length} bytes");
        let header = NetHeader::decode(&self.buffer[..HEADER_LENGTH]);
        Ok(Some((header, &self.buffer[HEADER_LENGTH..length])))
    }

    /// Waits for a frame from the interface.
    ///
    /// # Errors
    /// If none comes.
    pub fn receive(&mut self) -> Result<(NetHeader, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((header, frame)) = self.try_receive()? {
                return Ok((header, frame.to_vec()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no frame came from the interface");
            poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], PollTimeout::try_from(left)?)?;
        }
    }

    /// Takes everything that has come by now, and says how much that was.
    ///
    /// # Errors
    /// The system's.
    pub fn drain(&mut self) -> Result<usize> {
        let mut count = 0;
        loop {
            match self.read() {
                // EINVAL: a frame whose offloads a packet socket cannot describe; it is gone now.
                Ok(_) | Err(Errno::EINVAL) => count += 1,
                Err(Errno::EAGAIN) => return Ok(count),
                Err(errno) => return Err(errno).context("receive from the interface"),
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
    // SAFETY: all options used here take an int of the length given, which lives through the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const value).cast(), length)
    };
    Errno::result(result).with_context(|| format!("packet socket option {option}"))?;
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
        assert_eq!(network.drain().unwrap(), 0, "it sees its own frames");
    }
}
