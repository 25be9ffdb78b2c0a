//! Pings whose every reply is waited for: `ping` gives up on the last ones after twice the usual time, which on an
//! emulated machine is too soon.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, connect, recv, send, setsockopt,
    socket, sockopt,
};

/// How long to wait for a reply at most. Only catches what is lost.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for others once the last one's reply has come: on one queue they come in order, on another later.
const LINGER: Duration = Duration::from_secs(20);
/// Time between two requests, if no reply comes before.
const INTERVAL: Duration = Duration::from_millis(10);
/// Room for the replies, in bytes.
const RECEIVE_BUFFER: usize = 16 << 20;
/// Payload of each, in bytes: its number, and a pattern.
const PAYLOAD: usize = 56;

/// How many more show that they are answered, and how often is looked.
const SOME: usize = 10;
const TICK: Duration = Duration::from_millis(1);

/// When the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// Every 10 ms.
    Steady,
    /// When the reply to the last one has come, or 10 ms after it (`ping -f`).
    Flood,
}

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

/// Sends pings, one every 10 ms, until one is answered.
///
/// # Errors
/// If none is.
pub fn wait_answered(to: Ipv4Addr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let is_answered = |sent: &[Sent]| sent.iter().any(|ping| ping.replies > 0);
    let go_on = |sent: &[Sent]| !is_answered(sent) && Instant::now() < deadline;
    // The others' replies are not waited for.
    let sent = send_while(to, Pace::Steady, Duration::ZERO, go_on)?;
    ensure!(is_answered(&sent), "of {} pings to {to} none was answered", sent.len());
    Ok(())
}

fn lost_within(to: Ipv4Addr, count: u16, patience: Duration) -> Result<Vec<u16>> {
    let sent = send_while(to, Pace::Steady, patience, |sent| sent.len() < usize::from(count))?;
    Ok((0..count).zip(&sent).filter(|(_, ping)| ping.replies == 0).map(|(number, _)| number).collect())
}

/// A ping that was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    time: Instant,
    replies: u32,
}

/// A flood of pings that goes on until it is told to end.
#[derive(Debug)]
pub struct Endless {
    ended: Arc<AtomicBool>,
    /// How many have been answered.
    answered: Arc<AtomicUsize>,
    thread: JoinHandle<Result<Vec<Sent>>>,
}

impl Endless {
    /// Starts it.
    pub fn start(to: Ipv4Addr) -> Self {
        let (ended, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let of_thread = (Arc::clone(&ended), Arc::clone(&answered));
        let go_on = move |sent: &[Sent]| {
            let (ended, answered) = &of_thread;
            let is_answered = sent.last().is_some_and(|ping| ping.replies > 0);
            answered.fetch_add(usize::from(is_answered), Ordering::Relaxed);
            !ended.load(Ordering::Relaxed)
        };
        let thread = thread::spawn(move || send_while(to, Pace::Flood, PATIENCE, go_on));
        Self { ended, answered, thread }
    }

    /// Waits until some more were answered in time.
    ///
    /// # Errors
    /// If none is, or the pings have ended by themselves.
    pub fn wait_answered(&self) -> Result<()> {
        let (deadline, before) = (Instant::now() + PATIENCE, self.answered.load(Ordering::Relaxed));
        while self.answered.load(Ordering::Relaxed) < before + SOME {
            ensure!(!self.thread.is_finished(), "the pings have ended by themselves");
            ensure!(Instant::now() < deadline, "no ping is answered");
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Ends it, and gives how many were sent, and when those to which no reply came.
    ///
    /// # Errors
    /// As [`lost`].
    pub fn end(self) -> Result<(usize, Vec<Instant>)> {
        self.ended.store(true, Ordering::Relaxed);
        let sent = self.thread.join().map_err(|_| anyhow!("the pings' thread panicked"))??;
        let lost = sent.iter().filter(|ping| ping.replies == 0).map(|ping| ping.time).collect();
        Ok((sent.len(), lost))
    }
}

/// Sends pings as long as `go_on` after those sent so far, and waits for the replies.
fn send_while(
    to: Ipv4Addr,
    pace: Pace,
    patience: Duration,
    go_on: impl Fn(&[Sent]) -> bool,
) -> Result<Vec<Sent>> {
    /// Tells those of one process apart.
    static SENDERS: AtomicU16 = AtomicU16::new(0);
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)
        .context("a socket for pings (this must run as root)")?;
    // All replies that a machine which stood still sends at once.
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    let [a, b, c, d] = to.octets();
    connect(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))?;
    let process = u16::try_from(std::process::id() & 0xffff)?;
    let id = process.wrapping_add(SENDERS.fetch_add(1, Ordering::Relaxed));
    let mut sent: Vec<Sent> = Vec::new();
    for number in 0.. {
        if let Some(last) = sent.last() {
            let next = last.time + INTERVAL;
            hear(&socket, id, &mut sent, next, pace == Pace::Flood)?;
        }
        if !go_on(&sent) {
            break;
        }
        send(socket.as_raw_fd(), &request(id, number), MsgFlags::empty()).context("cannot send a ping")?;
        sent.push(Sent { time: Instant::now(), replies: 0 });
    }
    let mut deadline = Instant::now() + patience;
    while sent.iter().any(|ping| ping.replies == 0) && Instant::now() < deadline {
        hear(&socket, id, &mut sent, (Instant::now() + INTERVAL).min(deadline), false)?;
        if sent.last().is_some_and(|last| last.replies > 0) {
            deadline = deadline.min(Instant::now() + LINGER);
        }
    }
    let doubled = sent.iter().position(|ping| ping.replies > 1);
    ensure!(doubled.is_none(), "the reply to ping {doubled:?} to {to} was doubled");
    Ok(sent)
}

/// Counts the replies that come until then, or until the last request's has come.
fn hear(socket: &OwnedFd, id: u16, sent: &mut [Sent], until: Instant, until_last: bool) -> Result<()> {
    while !until_last || sent.last().is_some_and(|last| last.replies == 0) {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            break;
        }
        let mut packet = [0; 2048];
        let length = recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT)?;
        // An IPv4 header, whose length is in words, comes first.
        let header = usize::from(packet[0] & 0xf) * 4;
        let Some(message) = packet[..length].get(header..) else { bail!("a packet of {length} bytes") };
        let [0, _, _, _, id1, id2, _, _, payload @ ..] = message else { continue };
        if [*id1, *id2] == id.to_be_bytes()
            && let Some((number, _)) = payload.split_first_chunk()
            && let number = u32::from_be_bytes(*number)
            && let Some(ping) = sent.get_mut(usize::try_from(number)?)
        {
            ensure!(message[4..] == request(id, number)[4..], "a reply differs from its request");
            ping.replies += 1;
        }
    }
    Ok(())
}

/// An echo request (RFC 792).
fn request(id: u16, number: u32) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(id.to_be_bytes());
    // The sequence number has the lower half only.
    let bytes = number.to_be_bytes();
    message.extend(&bytes[2..]);
    message.extend(bytes);
    message.extend((0u8..).take(PAYLOAD - bytes.len()));
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
        wait_answered(Ipv4Addr::LOCALHOST).unwrap();
        check(Ipv4Addr::LOCALHOST, 20).unwrap();
        // With nobody to answer.
        std::fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", "1").unwrap();
        assert_eq!(lost_within(Ipv4Addr::LOCALHOST, 3, INTERVAL).unwrap(), [0, 1, 2]);
    }
}
