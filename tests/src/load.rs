//! Numbered frames both ways between the network and a fake front-end's device, at a rate, while something else happens:
//! none may be lost, doubled or overtaken within its flow, but for what a [`Demand`] allows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;

use crate::fake_frontend::Device;
use crate::fake_frontend::net::NetHeader;
use crate::frames::{Network, Segment, Transport, segment};
use crate::packet_socket::PacketSocket;
use crate::process::PATIENCE;

/// Flows from the network: enough that each queue gets some.
const FLOWS: usize = 16;
/// The most frames of one direction that are sent at once.
const BURST: u64 = 50;
/// How long to rest where there is nothing to do.
const REST: Duration = Duration::from_micros(100);
/// When to end a load anew whose end has not come.
const AGAIN: Duration = Duration::from_millis(50);
/// The first UDP port of the flows from the network.
const DOWN: u16 = 20_000;
/// The first UDP port of the flows from the guest, one a queue pair. The kernel steers what comes back by what went out.
const UP: u16 = 30_000;

/// What is sent, and what of it must arrive.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Frames a second each way.
    pub rate: u32,
    /// The most frames that are on their way at once to the guest, and to the network: where nobody serves for a while,
    /// no queue overflows.
    pub under_way: [u64; 2],
    /// So many frames may be lost on the way to the guest; none is on the way to the network.
    pub may_lose: u64,
    /// So many may come to the network twice: again from one that has come before on, and in their order. None comes to
    /// the guest twice.
    pub may_double: u64,
}

impl Demand {
    /// Everything, once, in its order.
    pub fn whole(rate: u32) -> Self {
        Self { rate, under_way: [u64::MAX; 2], may_lose: 0, may_double: 0 }
    }
}

/// A flow's frame, whose number changes.
#[derive(Debug)]
struct Flow {
    frame: Segment,
    sent: u32,
    received: u32,
    /// The number of the frame that would be next.
    expected: u32,
    lost: u64,
    doubled: u64,
}

impl Flow {
    fn new(port: u16, length: usize) -> Self {
        let mut frame = segment(Network::V4, Transport::Udp, &vec![0x5a; length]);
        let place = frame.transport_offset;
        frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
        Self { frame, sent: 0, received: 0, expected: 0, lost: 0, doubled: 0 }
    }

    /// The next frame to send.
    fn next(&mut self) -> &[u8] {
        let place = self.frame.payload_offset;
        self.frame.bytes[place..place + 4].copy_from_slice(&self.sent.to_be_bytes());
        self.sent += 1;
        &self.frame.bytes
    }
}

/// All flows of a direction.
#[derive(Debug)]
struct Direction {
    flows: Vec<Flow>,
    port: u16,
    turn: usize,
}

impl Direction {
    fn new(port: u16, flows: usize) -> Self {
        let ports = (port..).take(flows);
        Self { flows: ports.map(|port| Flow::new(port, 80)).collect(), port, turn: 0 }
    }

    fn sent(&self) -> u64 {
        self.flows.iter().map(|flow| u64::from(flow.sent)).sum()
    }

    fn outstanding(&self) -> u64 {
        self.flows.iter().map(|flow| u64::from(flow.sent - flow.received)).sum()
    }

    fn lost(&self) -> u64 {
        self.flows.iter().map(|flow| flow.lost).sum()
    }

    fn doubled(&self) -> u64 {
        self.flows.iter().map(|flow| flow.doubled).sum()
    }

    /// Counts a frame that arrived.
    fn receive(&mut self, frame: &[u8], may_lose: u64, may_double: u64) -> Result<()> {
        let (transport, payload) = (self.flows[0].frame.transport_offset, self.flows[0].frame.payload_offset);
        let port = frame.get(transport..transport + 2).context("a short frame")?;
        let port = u16::from_be_bytes(port.try_into()?);
        let index = usize::from(port.wrapping_sub(self.port));
        let flow = self.flows.get_mut(index).with_context(|| format!("a frame of port {port}"))?;
        let number = frame.get(payload..payload + 4).context("a short frame")?;
        let number = u32::from_be_bytes(number.try_into()?);
        ensure!(
            frame.len() == flow.frame.bytes.len() && frame[payload + 4..].iter().all(|byte| *byte == 0x5a)
        );
        ensure!(number < flow.sent, "frame {number} of port {port} came, and was never sent");
        // Those that come again do so from one of them on, and without a gap.
        let (expected, in_order) = (flow.expected, number <= flow.expected || flow.expected == flow.received);
        flow.lost += u64::from(number.saturating_sub(flow.received));
        flow.doubled += u64::from(number < flow.received);
        flow.expected = number + 1;
        flow.received = flow.received.max(number + 1);
        ensure!(
            in_order && self.lost() <= may_lose && self.doubled() <= may_double,
            "frame {number} of port {port} came instead of {expected}: {}",
            if number > expected { "lost or overtaken" } else { "doubled or late" }
        );
        Ok(())
    }
}

/// What a load came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames that went from the network to the guest.
    pub down: u64,
    /// And from the guest to the network.
    pub up: u64,
    /// Those that were lost on the way to the guest, and to the network.
    pub lost: [u64; 2],
    /// Likewise those that came twice.
    pub doubled: [u64; 2],
}

/// Sends `rate` frames a second each way while `during` goes on, and until all have arrived.
///
/// # Errors
/// If any does not arrive, or out of its order; those of `during`.
pub fn run<T>(
    device: &mut Device,
    network: &mut PacketSocket,
    rate: u32,
    during: impl FnOnce() -> Result<T>,
) -> Result<(T, Outcome)> {
    run_with(device, network, Demand::whole(rate), during)
}

/// Likewise, with a demand of its own.
///
/// # Errors
/// If more is lost or doubled than is allowed, or anything comes out of its order; those of `during`.
pub fn run_with<T>(
    device: &mut Device,
    network: &mut PacketSocket,
    demand: Demand,
    during: impl FnOnce() -> Result<T>,
) -> Result<(T, Outcome)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(device, network, &demand, &over));
        let result = during();
        over.store(true, Ordering::Relaxed);
        let outcome = traffic.join().map_err(|_| anyhow!("the load panicked"))?;
        // What happened to the frames says more than what the other end made of it.
        match (result, outcome) {
            (Ok(result), Ok(outcome)) => Ok((result, outcome)),
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => Err(error),
            (Err(result), Err(outcome)) => Err(result.context(format!("with the load: {outcome:#}"))),
        }
    })
}

/// Sends a flow's next frame to the guest. What the TAP has no room for is lost.
fn send_down(network: &PacketSocket, flow: &mut Flow, demand: &Demand) -> Result<()> {
    match network.send(flow.next()) {
        Err(error) if demand.may_lose > 0 && error.downcast_ref::<Errno>() == Some(&Errno::ENOBUFS) => Ok(()),
        result => result,
    }
}

fn traffic(
    device: &mut Device,
    network: &mut PacketSocket,
    demand: &Demand,
    over: &AtomicBool,
) -> Result<Outcome> {
    let pairs = device.pairs.len();
    let (mut down, mut up) = (Direction::new(DOWN, FLOWS), Direction::new(UP, pairs));
    let mut frame = Vec::new();
    let (mut before, mut due) = (Instant::now(), 0.0);
    let mut progress = Instant::now();
    let mut closed: Option<Instant> = None;
    loop {
        let ending = over.load(Ordering::Relaxed);
        let now = Instant::now();
        due += now.duration_since(before).as_secs_f64() * f64::from(demand.rate);
        before = now;
        let mut worked = false;
        if !ending {
            // Who could not run for a while must not make up for it at once: queues are short.
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            let most = (down.sent() + BURST) as f64;
            due = due.min(most);
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            while (down.sent() as f64) < due && down.outstanding() < demand.under_way[0] {
                let turn = down.turn;
                send_down(network, &mut down.flows[turn], demand)?;
                down.turn = (turn + 1) % FLOWS;
                if up.outstanding() < demand.under_way[1] {
                    let turn = up.turn;
                    device.send(turn, &NetHeader::default(), up.flows[turn].next())?;
                    up.turn = (turn + 1) % pairs;
                }
                worked = true;
            }
        }
        for pair in 0..pairs {
            while device.try_receive(pair, &mut frame)?.is_some() {
                down.receive(&frame, demand.may_lose, 0).context("in the guest")?;
                worked = true;
            }
        }
        while let Some((_, frame)) = network.try_receive()? {
            up.receive(frame, 0, demand.may_double).context("on the network")?;
            worked = true;
        }
        if worked {
            progress = Instant::now();
        }
        let forgiving = demand.may_lose > 0 || demand.may_double > 0;
        if ending && (closed.is_some() || !forgiving) && down.outstanding() + up.outstanding() == 0 {
            return Ok(Outcome {
                down: down.sent(),
                up: up.sent(),
                lost: [down.lost(), up.lost()],
                doubled: [down.doubled(), up.doubled()],
            });
        }
        if ending && !worked && forgiving && closed.is_none_or(|closed| closed.elapsed() > AGAIN) {
            // Once these are here, what is not will not come, nor come again. They may be lost themselves.
            for flow in &mut down.flows {
                send_down(network, flow, demand)?;
            }
            for (pair, flow) in up.flows.iter_mut().enumerate() {
                device.send(pair, &NetHeader::default(), flow.next())?;
            }
            closed = Some(Instant::now());
        }
        if progress.elapsed() > PATIENCE {
            bail!("{} frames to the guest and {} from it did not come", down.outstanding(), up.outstanding());
        }
        if !worked {
            thread::sleep(REST);
        }
    }
}
