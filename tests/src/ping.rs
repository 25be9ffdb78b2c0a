//! Sends pings, and waits for every reply. The program `ping` waits for the last replies only twice the usual time,
//! which is too short on an emulated machine.

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

/// The timeout for replies. Long enough that only a lost ping reaches it.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for other replies once the last one has arrived. Replies on one queue arrive in order, those on
/// another queue may be later.
const LINGER: Duration = Duration::from_secs(20);
/// The time between two requests, unless a reply arrives earlier.
const INTERVAL: Duration = Duration::from_millis(10);
/// The size of the receive buffer, in bytes.
const RECEIVE_BUFFER: usize = 16 << 20;
/// The payload of a ping, in bytes: its number, and a pattern.
const PAYLOAD: usize = 56;

/// How many further replies [`Endless::wait_answered`] waits for.
const SOME: usize = 10;
/// How often it checks.
const TICK: Duration = Duration::from_millis(1);

/// When the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// Every 10 ms.
    Steady,
    /// When the reply to the last request has arrived, or 10 ms after the request (`ping -f`).
    Flood,
}

/// Sends `count` ICMP echo requests, one every 10 ms, and waits for the reply to each.
///
/// # Errors
/// Returns an error if a reply is missing. Otherwise same as [`lost`].
pub fn check(to: Ipv4Addr, count: u16) -> Result<()> {
    let lost = lost(to, count)?;
    ensure!(lost.is_empty(), "of {count} pings to {to}, these were lost: {lost:?}");
    Ok(())
}

/// Sends `count` pings, one every 10 ms, and returns the numbers of those without a reply.
///
/// # Errors
/// Returns an error if a reply is duplicated or differs from its request, or if this process lacks the privilege to
/// send pings (`CAP_NET_RAW`).
pub fn lost(to: Ipv4Addr, count: u16) -> Result<Vec<u16>> {
    lost_within(to, count, PATIENCE)
}

/// Sends pings, one every 10 ms, until one is answered.
///
/// # Errors
/// Returns an error if none is answered in time.
pub fn wait_answered(to: Ipv4Addr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let is_answered = |sent: &[Sent]| sent.iter().any(|ping| ping.replies > 0);
    let go_on = |sent: &[Sent]| !is_answered(sent) && Instant::now() < deadline;
    // Does not wait for the other replies.
    let sent = send_while(to, Pace::Steady, Duration::ZERO, go_on)?;
    ensure!(is_answered(&sent), "none of {} pings to {to} was answered", sent.len());
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

/// A flood of pings that continues until [`Endless::end`].
#[derive(Debug)]
pub struct Endless {
    ended: Arc<AtomicBool>,
    /// How many pings were answered before the next one was sent.
    answered: Arc<AtomicUsize>,
    thread: JoinHandle<Result<Vec<Sent>>>,
}

impl Endless {
    /// Starts the flood.
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

    /// Waits until ten further pings are answered.
    ///
    /// # Errors
    /// Returns an error if that does not happen in time, or if the flood has failed.
    pub fn wait_answered(&self) -> Result<()> {
        let (deadline, before) = (Instant::now() + PATIENCE, self.answered.load(Ordering::Relaxed));
        while self.answered.load(Ordering::Relaxed) < before + SOME {
            ensure!(!self.thread.is_finished(), "the flood of pings has failed");
            ensure!(Instant::now() < deadline, "timed out before {SOME} pings were answered");
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Ends the flood. Returns how many pings were sent, and when each ping without a reply was sent.
    ///
    /// # Errors
    /// Same as [`lost`].
    pub fn end(self) -> Result<(usize, Vec<Instant>)> {
        self.ended.store(true, Ordering::Relaxed);
        let sent = self.thread.join().map_err(|_| anyhow!("the thread of the pings panicked"))??;
        let lost = sent.iter().filter(|ping| ping.replies == 0).map(|ping| ping.time).collect();
        Ok((sent.len(), lost))
    }
}

/// Sends pings as long as `go_on` returns true for those sent so far, then waits for the missing replies.
fn send_while(
    to: Ipv4Addr,
    pace: Pace,
    patience: Duration,
    go_on: impl Fn(&[Sent]) -> bool,
) -> Result<Vec<Sent>> {
    /// Distinguishes the senders of this process.
    static SENDERS: AtomicU16 = AtomicU16::new(0);
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)
        .context("cannot create a socket for pings; run this as root")?;
    // Holds all replies that a guest sends at once after it was stopped.
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
    ensure!(doubled.is_none(), "the reply to ping {doubled:?} to {to} was duplicated");
    Ok(sent)
}

/// Counts the replies that arrive before `until`. If `until_last`, returns as soon as the last request is answered.
fn hear(socket: &OwnedFd, id: u16, sent: &mut [Sent], until: Instant, until_last: bool) -> Result<()> {
    while !until_last || sent.last().is_some_and(|last| last.replies == 0) {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            break;
        }
        let mut packet = [0; 2048];
        let length = recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT)?;
        // The packet begins with an IPv4 header, whose length is given in words.
        let header = usize::from(packet[0] & 0xf) * 4;
        let Some(message) = packet[..length].get(header..) else { bail!("truncated packet: {length} bytes") };
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

/// Returns an echo request (RFC 792).
fn request(id: u16, number: u32) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(id.to_be_bytes());
    // The sequence number holds only the lower half of the number.
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
    fn pings_without_a_reply_are_reported_as_lost() {
        let _netns = Netns::enter().unwrap();
        link::ip(&["link", "set", "lo", "up"]).unwrap();
        wait_answered(Ipv4Addr::LOCALHOST).unwrap();
        check(Ipv4Addr::LOCALHOST, 20).unwrap();
        // The kernel no longer answers.
        std::fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", "1").unwrap();
        assert_eq!(lost_within(Ipv4Addr::LOCALHOST, 3, INTERVAL).unwrap(), [0, 1, 2]);
    }
}
