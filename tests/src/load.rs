//! Numbered frames both ways between the network and a fake front-end's device, at a rate, while something else happens:
//! none may be lost, doubled or overtaken within its flow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

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
/// The first UDP port of the flows from the network.
const DOWN: u16 = 20_000;
/// The first UDP port of the flows from the guest, one a queue pair. The kernel steers what comes back by what went out.
const UP: u16 = 30_000;

/// A flow's frame, whose number changes.
#[derive(Debug)]
struct Flow {
    frame: Segment,
    sent: u32,
    received: u32,
}

impl Flow {
    fn new(port: u16, length: usize) -> Self {
        let mut frame = segment(Network::V4, Transport::Udp, &vec![0x5a; length]);
        let place = frame.transport_offset;
        frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
        Self { frame, sent: 0, received: 0 }
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

    /// Counts a frame that arrived.
    fn receive(&mut self, frame: &[u8]) -> Result<()> {
        let (transport, payload) = (self.flows[0].frame.transport_offset, self.flows[0].frame.payload_offset);
        let port = frame.get(transport..transport + 2).context("a short frame")?;
        let port = u16::from_be_bytes(port.try_into()?);
        let index = usize::from(port.wrapping_sub(self.port));
        let flow = self.flows.get_mut(index).with_context(|| format!("a frame of port {port}"))?;
        let number = frame.get(payload..payload + 4).context("a short frame")?;
        let number = u32::from_be_bytes(number.try_into()?);
        ensure!(
            number == flow.received,
            "frame {number} of port {port} came instead of {}: {}",
            flow.received,
            if number > flow.received { "lost or overtaken" } else { "doubled or late" }
        );
        ensure!(
            frame.len() == flow.frame.bytes.len() && frame[payload + 4..].iter().all(|byte| *byte == 0x5a)
        );
        flow.received += 1;
        Ok(())
    }
}

/// What a load came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames that went from the network to the guest, all of them in order.
    pub down: u64,
    /// And from the guest to the network.
    pub up: u64,
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
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(device, network, rate, &over));
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

fn traffic(device: &mut Device, network: &mut PacketSocket, rate: u32, over: &AtomicBool) -> Result<Outcome> {
    let pairs = device.pairs.len();
    let (mut down, mut up) = (Direction::new(DOWN, FLOWS), Direction::new(UP, pairs));
    let mut frame = Vec::new();
    let (mut before, mut due) = (Instant::now(), 0.0);
    let mut progress = Instant::now();
    loop {
        let ending = over.load(Ordering::Relaxed);
        let now = Instant::now();
        due += now.duration_since(before).as_secs_f64() * f64::from(rate);
        before = now;
        let mut worked = false;
        if !ending {
            // Who could not run for a while must not make up for it at once: queues are short.
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            let most = (down.sent() + BURST) as f64;
            due = due.min(most);
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            while (down.sent() as f64) < due {
                let turn = down.turn;
                network.send(down.flows[turn].next())?;
                down.turn = (turn + 1) % FLOWS;
                let turn = up.turn;
                device.send(turn, &NetHeader::default(), up.flows[turn].next())?;
                up.turn = (turn + 1) % pairs;
                worked = true;
            }
        }
        for pair in 0..pairs {
            while device.try_receive(pair, &mut frame)?.is_some() {
                down.receive(&frame).context("in the guest")?;
                worked = true;
            }
        }
        while let Some((_, frame)) = network.try_receive()? {
            up.receive(frame).context("on the network")?;
            worked = true;
        }
        if worked {
            progress = Instant::now();
        }
        if ending && down.outstanding() + up.outstanding() == 0 {
            return Ok(Outcome { down: down.sent(), up: up.sent() });
        }
        if progress.elapsed() > PATIENCE {
            bail!("{} frames to the guest and {} from it did not come", down.outstanding(), up.outstanding());
        }
        if !worked {
            thread::sleep(REST);
        }
    }
}
