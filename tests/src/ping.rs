//! Pings whose every reply is waited for: `ping` gives up on the last ones after twice the usual time, which on an
//! emulated machine is too soon.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, connect, recv, send, socket,
};

/// How long to wait for a reply at most. Only catches what is lost.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two requests.
const INTERVAL: Duration = Duration::from_millis(10);
/// Payload of each, in bytes.
const PAYLOAD: usize = 56;

/// Sends `count` ICMP echo requests, one every 10 ms, and waits for the reply to each.
///
/// # Errors
/// If one stays away, and as [`lost`].
pub fn check(to: Ipv4Addr, count: u16) -> Result<()> {
    let lost = lost(to, count)?;
    ensure!(lost.is_empty(), "of {count} pings to {to} these were lost: {lost:?}");
    Ok(())
}

/// Does so, and gives the numbers of those to which no reply came.
///
/// # Errors
/// If a reply comes twice, or is not what was sent; without the privilege to send pings (`CAP_NET_RAW`).
pub fn lost(to: Ipv4Addr, count: u16) -> Result<Vec<u16>> {
    lost_within(to, count, PATIENCE)
}

fn lost_within(to: Ipv4Addr, count: u16, patience: Duration) -> Result<Vec<u16>> {
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)
        .context("a socket for pings (this must run as root)")?;
    let [a, b, c, d] = to.octets();
    connect(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))?;
    let id = u16::try_from(std::process::id() & 0xffff)?;
    let mut replies = vec![0u32; usize::from(count)];
    let mut next = Instant::now();
    for number in 0..count {
        hear(&socket, id, &mut replies, next)?;
        send(socket.as_raw_fd(), &request(id, number), MsgFlags::empty()).context("cannot send a ping")?;
        next = Instant::now() + INTERVAL;
    }
    let deadline = Instant::now() + patience;
    while replies.contains(&0) && Instant::now() < deadline {
        hear(&socket, id, &mut replies, (Instant::now() + INTERVAL).min(deadline))?;
    }
    let lost = (0..count).filter(|number| replies[usize::from(*number)] == 0).collect();
    ensure!(replies.iter().all(|replies| *replies <= 1), "replies from {to} were doubled: {replies:?}");
    Ok(lost)
}

/// Counts the replies that come until then.
fn hear(socket: &OwnedFd, id: u16, replies: &mut [u32], until: Instant) -> Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            return Ok(());
        }
        let mut packet = [0; 2048];
        let length = recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT)?;
        // An IPv4 header, whose length is in words, comes first.
        let header = usize::from(packet[0] & 0xf) * 4;
        let Some(message) = packet[..length].get(header..) else { bail!("a packet of {length} bytes") };
        let [0, _, _, _, id1, id2, number1, number2, payload @ ..] = message else { continue };
        if [*id1, *id2] == id.to_be_bytes()
            && let Some(replies) = replies.get_mut(usize::from(u16::from_be_bytes([*number1, *number2])))
        {
            ensure!(payload.iter().copied().eq(self::payload()), "a reply differs from its request");
            *replies += 1;
        }
    }
}

fn payload() -> impl Iterator<Item = u8> {
    (0u8..).take(PAYLOAD)
}

/// An echo request (RFC 792).
fn request(id: u16, number: u16) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend(payload());
    let sum: u32 = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap_or_default();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{link, netns::Netns};

    #[test]
    fn a_reply_that_does_not_come_is_missed() {
        let _netns = Netns::enter().unwrap();
        link::ip(&["link", "set", "lo", "up"]).unwrap();
        check(Ipv4Addr::LOCALHOST, 20).unwrap();
        // With nobody to answer.
        std::fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", "1").unwrap();
        assert_eq!(lost_within(Ipv4Addr::LOCALHOST, 3, INTERVAL).unwrap(), [0, 1, 2]);
    }
}
