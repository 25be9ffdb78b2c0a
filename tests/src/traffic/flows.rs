//! Numbered datagrams in several flows, each from a port of its own: none may be lost, doubled or overtaken within
//! its flow.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Connection, Direction, Request};

/// How long a receiver that has everything waits for what should not come.
const LINGER: Duration = Duration::from_millis(300);

/// The most datagrams that a sender sends at once.
const BURST: u32 = 100;

/// How often a sender looks at the clock: it sends as many as are due.
const TICK: Duration = Duration::from_millis(2);

/// Flow and number at a datagram's start.
const HEADER: usize = 8;

/// What is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Datagrams over all flows.
    pub count: u32,
    /// Flows, which take turns.
    pub flows: u16,
    /// Datagrams a second over all flows.
    pub rate: u32,
    /// UDP payload of each, in bytes, at least 8.
    pub size: u16,
    /// Seconds without a datagram after which the receiver takes the rest for lost.
    pub silence: u16,
}

impl Plan {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.silence.into())
    }
}

/// What a receiver has counted of one flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Different datagrams.
    pub received: u32,
    /// That never came.
    pub lost: u32,
    /// That came again.
    pub duplicated: u32,
    /// That came after one with a higher number.
    pub reordered: u32,
}

/// What a receiver has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Different datagrams over all flows.
    pub received: u32,
    /// Those that are not what was sent.
    pub damaged: u32,
    /// Every flow.
    pub flows: Vec<Flow>,
}

impl Outcome {
    /// Whether all came once, in order and whole.
    pub fn is_perfect(&self) -> bool {
        let perfect = |flow: &Flow| flow.lost == 0 && flow.duplicated == 0 && flow.reordered == 0;
        self.damaged == 0 && self.flows.iter().all(perfect)
    }
}

/// Sends the plan's datagrams in a direction, and returns what was received there.
pub fn check(server: SocketAddr, direction: Direction, plan: Plan) -> Result<Outcome> {
    if plan.flows == 0 || plan.rate == 0 || usize::from(plan.size) < HEADER {
        bail!("there must be a flow, a rate, and {HEADER} bytes in a datagram");
    }
    // Bound before the server knows of it; its address is only known once connected.
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20));
    let port = socket.local_addr()?.port();
    let mut connection = Connection::open(server, &Request::Flows { direction, plan, port })?;
    match direction {
        Direction::Down => receive(&socket, &plan),
        Direction::Up => {
            let port: u16 = connection.hear()?;
            send(&connection, &plan, SocketAddr::new(server.ip(), port))?;
            // If any is lost, the other end waits for it in vain first.
            connection.be_patient(plan.patience())?;
            connection.hear()
        }
    }
}

/// The server's part when it receives: says where, and afterwards what came.
pub(super) fn serve_receive(connection: &mut Connection, plan: &Plan) -> Result<()> {
    let socket = connection.datagram_socket()?;
    connection.say(&socket.local_addr()?.port())?;
    let outcome = receive(&socket, plan)?;
    connection.say(&outcome)
}

/// Sends the datagrams at the plan's rate.
pub(super) fn send(connection: &Connection, plan: &Plan, to: SocketAddr) -> Result<()> {
    let sockets: Vec<UdpSocket> =
        (0..plan.flows).map(|_| connection.datagram_socket()).collect::<Result<_>>()?;
    for socket in &sockets {
        // A connected socket keeps its transmit queue. Else Linux would choose by processor, and a process that moves
        // from one to another would overtake itself.
        socket.connect(to).with_context(|| format!("cannot send to {to}"))?;
    }
    let mut datagram = vec![0; usize::from(plan.size)];
    let mut last = Instant::now();
    let mut due = 0.0;
    let mut numbers = (0..plan.count).map(|index| {
        let flows = u32::from(plan.flows);
        (index % flows, index / flows)
    });
    let mut sent = 0;
    while sent < plan.count {
        let now = Instant::now();
        due += now.duration_since(last).as_secs_f64() * f64::from(plan.rate);
        last = now;
        // Who could not run for a while must not make up for it at once: queues on the way are short.
        due = due.min(f64::from(sent + BURST));
        while f64::from(sent) < due
            && let Some((flow, number)) = numbers.next()
        {
            fill(&mut datagram, flow, number);
            let socket = &sockets[flow as usize];
            socket.send(&datagram).with_context(|| format!("cannot send to {to}"))?;
            sent += 1;
        }
        thread::sleep(TICK);
    }
    Ok(())
}

fn receive(socket: &UdpSocket, plan: &Plan) -> Result<Outcome> {
    let flows = u32::from(plan.flows);
    let planned = |flow: u32| plan.count / flows + u32::from(flow < plan.count % flows);
    let mut seen: Vec<Vec<bool>> = (0..flows).map(|flow| vec![false; planned(flow) as usize]).collect();
    let mut highest = vec![None; usize::from(plan.flows)];
    let mut outcome = Outcome { flows: vec![Flow::default(); usize::from(plan.flows)], ..Outcome::default() };
    let mut bytes = vec![0; 65536];
    let mut expected = vec![0; usize::from(plan.size)];
    loop {
        let silence = if outcome.received < plan.count { plan.patience() } else { LINGER };
        socket.set_read_timeout(Some(silence))?;
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => return Err(error).context("cannot receive"),
        };
        let Some((flow, number)) = header(&bytes[..length]) else {
            outcome.damaged += 1;
            continue;
        };
        let Some(seen) = seen.get_mut(flow as usize).and_then(|flow| flow.get_mut(number as usize)) else {
            outcome.damaged += 1;
            continue;
        };
        fill(&mut expected, flow, number);
        if expected != bytes[..length] {
            outcome.damaged += 1;
            continue;
        }
        let (counts, highest) = (&mut outcome.flows[flow as usize], &mut highest[flow as usize]);
        if *seen {
            counts.duplicated += 1;
            continue;
        }
        *seen = true;
        counts.received += 1;
        outcome.received += 1;
        counts.reordered += u32::from(*highest > Some(number));
        *highest = (*highest).max(Some(number));
    }
    for (flow, counts) in (0..flows).zip(&mut outcome.flows) {
        counts.lost = planned(flow) - counts.received;
    }
    Ok(outcome)
}

/// A datagram's contents follow from its flow and number.
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
