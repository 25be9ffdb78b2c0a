//! Numbered datagrams in several flows, each from its own port. None may be lost, duplicated or reordered within its
//! flow.
//!
//! The receiver reports its progress over the connection, and the sender keeps at most `WINDOW` datagrams in flight,
//! which fit into all queues and buffers. So a missing datagram was lost by a fault, even on a slow machine.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Connection, Direction, Request};

/// How long a receiver that has everything waits for duplicates.
const LINGER: Duration = Duration::from_millis(300);

/// The most datagrams that a sender sends at once.
const BURST: u32 = 100;

/// The most datagrams in flight: fewer than any queue or buffer on the way holds.
const WINDOW: u32 = 128;

/// How long a sender with a full window waits for progress. It then sends one more datagram, because the others may be
/// lost.
const PROBE: Duration = Duration::from_millis(200);

/// How often a sender checks how many datagrams are due.
const TICK: Duration = Duration::from_millis(2);

/// How often a receiver that does not know the total reports its progress and checks for the total.
const LOOK: Duration = Duration::from_millis(50);

/// The count of a plan whose sender continues until it is stopped.
pub(super) const ENDLESS: u32 = u32::MAX;

/// The length of the flow and number at the start of a datagram.
const HEADER: usize = 8;

/// The datagrams to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Datagrams over all flows.
    pub count: u32,
    /// Flows, which alternate.
    pub flows: u16,
    /// Datagrams a second over all flows.
    pub rate: u32,
    /// UDP payload of each, in bytes, at least 8.
    pub size: u16,
    /// Seconds without a datagram after which the receiver considers the rest lost.
    pub silence: u16,
}

impl Plan {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.silence.into())
    }
}

/// A receiver's counters of one flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Datagrams that arrived, without duplicates.
    pub received: u32,
    /// Datagrams that did not arrive.
    pub lost: u32,
    /// Datagrams that arrived again.
    pub duplicated: u32,
    /// Datagrams that arrived after one with a higher number.
    pub reordered: u32,
    /// The numbers of the lost datagrams, in order.
    pub gaps: Vec<Range<u32>>,
    /// The highest number that arrived, plus one.
    pub next: u32,
}

impl Flow {
    fn count(&mut self, number: u32) {
        if number >= self.next {
            if number > self.next {
                self.gaps.push(self.next..number);
            }
            self.next = number + 1;
        } else if let Some(place) = self.gaps.iter().position(|gap| gap.contains(&number)) {
            let gap = self.gaps[place].clone();
            let left = [gap.start..number, number + 1..gap.end];
            self.gaps.splice(place..=place, left.into_iter().filter(|gap| !gap.is_empty()));
            self.reordered += 1;
        } else {
            self.duplicated += 1;
            return;
        }
        self.received += 1;
    }

    /// Counts the lost datagrams of `sent`.
    fn end(&mut self, sent: u32) {
        if self.next < sent {
            self.gaps.push(self.next..sent);
        }
        self.lost = sent - self.received;
    }
}

/// A receiver's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Datagrams over all flows, without duplicates.
    pub received: u32,
    /// Datagrams with unexpected contents.
    pub damaged: u32,
    /// The counters of each flow.
    pub flows: Vec<Flow>,
}

impl Outcome {
    /// Returns whether no datagram was duplicated, reordered or damaged.
    pub fn is_sound(&self) -> bool {
        self.damaged == 0 && self.flows.iter().all(|flow| flow.duplicated == 0 && flow.reordered == 0)
    }

    /// Returns whether every datagram arrived exactly once, in order and undamaged.
    pub fn is_perfect(&self) -> bool {
        self.is_sound() && self.flows.iter().all(|flow| flow.lost == 0)
    }
}

/// A message from the receiver to the sender.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// The number of datagrams that have arrived or were overtaken by a later one.
    Progress(u32),
    /// The sender must stop.
    Stop,
    /// The final counters.
    Outcome(Outcome),
}

/// Sends the datagrams of a plan in a direction, and returns the receiver's counters.
pub fn check(server: SocketAddr, direction: Direction, plan: Plan) -> Result<Outcome> {
    check_until(server, direction, plan, |_| true)
}

/// Like [`check`], until `go_on` returns false. It is called repeatedly with the number of datagrams sent or received
/// at this end.
pub(super) fn check_until(
    server: SocketAddr,
    direction: Direction,
    plan: Plan,
    mut go_on: impl FnMut(u32) -> bool,
) -> Result<Outcome> {
    if plan.flows == 0 || plan.rate == 0 || usize::from(plan.size) < HEADER {
        bail!("invalid plan: needs at least one flow, a rate above 0, and {HEADER} bytes in a datagram");
    }
    // Bound to any address, because the request to the server names the port and the local address is not known yet.
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20));
    let port = socket.local_addr()?.port();
    let mut connection = Connection::open(server, &Request::Flows { direction, plan, port })?;
    match direction {
        Direction::Down => {
            let mut stopped = false;
            receive(&socket, &plan, |received, progress| {
                connection.say(&Report::Progress(progress))?;
                if !stopped && !go_on(received) {
                    stopped = true;
                    connection.say(&Report::Stop)?;
                }
                connection.hear_if_said()
            })
        }
        Direction::Up => {
            let port: u16 = connection.hear()?;
            let to = SocketAddr::new(server.ip(), port);
            send(&mut connection, &plan, to, go_on)?;
            // If a datagram is lost, the other end first waits until its timeout.
            connection.be_patient(plan.patience())?;
            loop {
                match connection.hear()? {
                    Report::Progress(_) => {}
                    Report::Outcome(outcome) => return Ok(outcome),
                    Report::Stop => bail!("the receiver stopped the traffic unexpectedly"),
                }
            }
        }
    }
}

/// Serves a client that sends: reports the port to send to, then progress, then the counters.
pub(super) fn serve_receive(connection: &mut Connection, plan: &Plan) -> Result<()> {
    let socket = connection.datagram_socket()?;
    connection.say(&socket.local_addr()?.port())?;
    let outcome = receive(&socket, plan, |_, progress| {
        connection.say(&Report::Progress(progress))?;
        connection.hear_if_said()
    })?;
    connection.say(&Report::Outcome(outcome))
}

/// Serves a client that receives.
pub(super) fn serve_send(connection: &mut Connection, plan: &Plan, to: SocketAddr) -> Result<()> {
    send(connection, plan, to, |_| true)?;
    // The receiver reports its progress until it knows the total, and disconnects at the end.
    connection.be_patient(plan.patience())?;
    while connection.hear::<Report>().is_ok() {}
    Ok(())
}

/// Sends the datagrams at the plan's rate, as far as the window permits, then tells the receiver the total. Calls
/// `go_on` repeatedly with the number sent so far, and stops when it returns false.
fn send(
    connection: &mut Connection,
    plan: &Plan,
    to: SocketAddr,
    mut go_on: impl FnMut(u32) -> bool,
) -> Result<()> {
    let sockets: Vec<UdpSocket> =
        (0..plan.flows).map(|_| connection.datagram_socket()).collect::<Result<_>>()?;
    for socket in &sockets {
        // A connected socket keeps its transmit queue. Otherwise, Linux would choose the queue by processor, and
        // datagrams could be reordered when the process moves to another processor.
        socket.connect(to).with_context(|| format!("cannot send to {to}"))?;
    }
    let mut datagram = vec![0; usize::from(plan.size)];
    let mut last = Instant::now();
    let mut due = 0.0;
    let mut numbers = (0..plan.count).map(|index| {
        let flows = u32::from(plan.flows);
        (index % flows, index / flows)
    });
    let (mut sent, mut window, mut moved) = (0, WINDOW, last);
    'sending: while sent < plan.count && go_on(sent) {
        let now = Instant::now();
        while let Some(report) = connection.hear_if_said()? {
            let Report::Progress(progress) = report else { break 'sending };
            if progress + WINDOW > window {
                (window, moved) = (progress + WINDOW, now);
            }
        }
        if sent >= window && now.duration_since(moved) >= PROBE {
            (window, moved) = (sent + 1, now);
        }
        due += now.duration_since(last).as_secs_f64() * f64::from(plan.rate);
        last = now;
        // A sender that did not run for a while must not catch up at once.
        due = due.min(f64::from(sent + BURST));
        while sent < window
            && f64::from(sent) < due
            && let Some((flow, number)) = numbers.next()
        {
            fill(&mut datagram, flow, number);
            let socket = &sockets[flow as usize];
            socket.send(&datagram).with_context(|| format!("cannot send to {to}"))?;
            sent += 1;
        }
        thread::sleep(TICK);
    }
    connection.say(&sent)
}

/// Receives until no more datagrams can arrive. Calls `sent` repeatedly with the number of datagrams that have arrived,
/// and the number that have arrived or were overtaken. `sent` returns the total, once it is known.
fn receive(
    socket: &UdpSocket,
    plan: &Plan,
    mut sent: impl FnMut(u32, u32) -> Result<Option<u32>>,
) -> Result<Outcome> {
    let flows = u32::from(plan.flows);
    let share = |count: u32, flow: u32| count / flows + u32::from(flow < count % flows);
    let mut outcome = Outcome { flows: vec![Flow::default(); usize::from(plan.flows)], ..Outcome::default() };
    let mut bytes = vec![0; 65536];
    let mut expected = vec![0; usize::from(plan.size)];
    let (mut count, mut looked, mut heard) = (None, Instant::now(), Instant::now());
    let mut unreported = 0;
    let count = loop {
        if count.is_none() && (unreported >= WINDOW / 4 || looked.elapsed() >= LOOK) {
            (looked, unreported) = (Instant::now(), 0);
            count = sent(outcome.received, outcome.flows.iter().map(|flow| flow.next).sum())?;
        }
        let last_came =
            |count| (0..flows).zip(&outcome.flows).all(|(flow, seen)| seen.next == share(count, flow));
        let silence = if count.is_some_and(last_came) { LINGER } else { plan.patience() };
        socket.set_read_timeout(Some(if count.is_none() { LOOK } else { silence }))?;
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                match count {
                    Some(count) if heard.elapsed() >= silence => break count,
                    None if heard.elapsed() >= silence => bail!("timed out: the sender sends nothing"),
                    _ => continue,
                }
            }
            Err(error) => return Err(error).context("cannot receive"),
        };
        heard = Instant::now();
        unreported += 1;
        let Some((flow, number)) = header(&bytes[..length]) else {
            outcome.damaged += 1;
            continue;
        };
        fill(&mut expected, flow, number);
        if flow >= flows || number >= share(plan.count, flow) || expected != bytes[..length] {
            outcome.damaged += 1;
            continue;
        }
        outcome.flows[flow as usize].count(number);
        outcome.received = outcome.flows.iter().map(|flow| flow.received).sum();
    };
    for (flow, counts) in (0..flows).zip(&mut outcome.flows) {
        counts.end(share(count, flow));
    }
    Ok(outcome)
}

/// Fills a datagram with contents that depend only on its flow and number.
fn fill(datagram: &mut [u8], flow: u32, number: u32) {
    datagram[..4].copy_from_slice(&flow.to_be_bytes());
    datagram[4..HEADER].copy_from_slice(&number.to_be_bytes());
    for (byte, value) in datagram[HEADER..].iter_mut().zip((0..=u8::MAX).cycle()) {
        *byte = value.wrapping_add(number.to_le_bytes()[0]);
    }
}

fn header(datagram: &[u8]) -> Option<(u32, u32)> {
    let flow = datagram.get(..4)?.try_into().ok()?;
    let number = datagram.get(4..HEADER)?.try_into().ok()?;
    Some((u32::from_be_bytes(flow), u32::from_be_bytes(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_datagrams_close_gaps_and_duplicates_are_counted() {
        let mut flow = Flow::default();
        for number in [0, 1, 5, 3, 3, 1, 8] {
            flow.count(number);
        }
        flow.end(10);
        assert_eq!(flow.gaps, [2..3, 4..5, 6..8, 9..10]);
        let expected =
            Flow { received: 5, lost: 5, duplicated: 2, reordered: 1, next: 9, gaps: flow.gaps.clone() };
        assert_eq!(flow, expected);
    }
}
