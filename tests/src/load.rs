//! Sends [`numbered_frames`](crate::numbered_frames) both ways between the network and a fake front-end's device, at a
//! rate, while something else happens. No frame may be lost, doubled or overtaken within its flow, except as a
//! [`Demand`] allows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::fake_frontend::Device;
use crate::fake_frontend::net::NetHeader;
use crate::numbered_frames::{Arrival, Flows, Tally};
use crate::packet_socket::PacketSocket;
use crate::process::PATIENCE;

/// The number of flows from the network: enough for each queue to get some.
const FLOWS: u16 = 16;
/// The most frames of one direction that are sent at once.
const BURST: u64 = 50;
/// How long to sleep when there is nothing to do.
const REST: Duration = Duration::from_micros(100);
/// When to send the last frames again, if none of them has arrived.
const AGAIN: Duration = Duration::from_millis(50);
/// The first UDP port of the flows from the network.
const DOWN: u16 = 20_000;
/// The first UDP port of the flows from the guest, one per queue pair. Distinct from those of [`DOWN`], because the
/// kernel steers a flow that also goes out to the queue on which it does.
const UP: u16 = 30_000;

/// The load, and the losses and duplicates that it tolerates.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Frames a second each way.
    pub rate: u32,
    /// The most frames in flight to the guest, and to the network. A small number keeps queues from overflowing while
    /// no back-end serves.
    pub in_flight: [u64; 2],
    /// How many frames may be lost on the way to the guest. None may be lost on the way to the network.
    pub may_lose: u64,
    /// How many frames may arrive twice at the network: from one of them on, all that follow it, in order. None may
    /// arrive twice at the guest.
    pub may_double: u64,
}

impl Demand {
    /// A load of which every frame must arrive once and in order.
    pub fn whole(rate: u32) -> Self {
        Self { rate, in_flight: [u64::MAX; 2], may_lose: 0, may_double: 0 }
    }
}

/// The result of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Frames sent from the network to the guest.
    pub down: u64,
    /// Frames sent from the guest to the network.
    pub up: u64,
    /// Frames lost on the way to the guest, and to the network.
    pub lost: [u64; 2],
    /// Frames that arrived twice at the guest, and at the network.
    pub doubled: [u64; 2],
}

/// Sends `rate` frames a second each way while `during` runs, then waits until all have arrived.
///
/// # Errors
/// Returns an error if a frame does not arrive once and in order, and the errors of `during`.
pub fn run<T>(
    device: &mut Device,
    network: &mut PacketSocket,
    rate: u32,
    during: impl FnOnce() -> Result<T>,
) -> Result<(T, Outcome)> {
    run_with(device, network, Demand::whole(rate), during)
}

/// As [`run`], with a demand.
///
/// # Errors
/// Returns an error if frames do not arrive as the demand requires, and the errors of `during`.
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
        // The error of the load often explains that of `during`.
        match (result, outcome) {
            (Ok(result), Ok(outcome)) => Ok((result, outcome)),
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => Err(error),
            (Err(result), Err(outcome)) => Err(result.context(format!("with the load: {outcome:#}"))),
        }
    })
}

/// Sends the next frame to the guest. The TAP may drop it if frames may be lost.
fn send_down(network: &PacketSocket, down: &mut Flows, demand: &Demand) -> Result<()> {
    let sent = network.try_send(down.next(0).1)?;
    ensure!(sent || demand.may_lose > 0, "the TAP dropped a frame");
    down.sent();
    Ok(())
}

/// Sends the next frame to the network, on the queue pair of its flow.
fn send_up(device: &mut Device, up: &mut Flows) -> Result<()> {
    let (pair, frame) = up.next(0);
    device.send(pair, &NetHeader::default(), frame)?;
    up.sent();
    Ok(())
}

/// Counts a frame that arrived, and checks the order and the counts.
fn receive(flows: &mut Flows, frame: &[u8], may_lose: u64, may_double: u64) -> Result<()> {
    let Arrival { port, number, expected, in_order, .. } = flows.receive(frame)?;
    let Tally { lost, doubled, reordered, .. } = flows.tally();
    ensure!(
        in_order && reordered == 0 && lost <= may_lose && doubled <= may_double,
        "frame {number} of port {port} arrived instead of {expected}: {}",
        if number > expected { "lost or overtaken" } else { "doubled or late" }
    );
    Ok(())
}

fn traffic(
    device: &mut Device,
    network: &mut PacketSocket,
    demand: &Demand,
    over: &AtomicBool,
) -> Result<Outcome> {
    let pairs = device.pairs.len();
    let (mut down, mut up) = (Flows::new(DOWN, FLOWS), Flows::new(UP, u16::try_from(pairs)?));
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
            // After a stall, do not send all overdue frames at once: queues are short.
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            let most = (down.tally().sent + BURST) as f64;
            due = due.min(most);
            #[expect(clippy::cast_precision_loss, reason = "counts of a test")]
            while (down.tally().sent as f64) < due && down.in_flight() < demand.in_flight[0] {
                send_down(network, &mut down, demand)?;
                if up.in_flight() < demand.in_flight[1] {
                    send_up(device, &mut up)?;
                }
                worked = true;
            }
        }
        for pair in 0..pairs {
            while device.try_receive(pair, &mut frame)?.is_some() {
                receive(&mut down, &frame, demand.may_lose, 0).context("in the guest")?;
                worked = true;
            }
        }
        while let Some((_, frame)) = network.try_receive()? {
            receive(&mut up, frame, 0, demand.may_double).context("on the network")?;
            worked = true;
        }
        if worked {
            progress = Instant::now();
        }
        let forgiving = demand.may_lose > 0 || demand.may_double > 0;
        if ending && (closed.is_some() || !forgiving) && down.in_flight() + up.in_flight() == 0 {
            let (down, up) = (down.tally(), up.tally());
            return Ok(Outcome {
                down: down.sent,
                up: up.sent,
                lost: [down.lost, up.lost],
                doubled: [down.doubled, up.doubled],
            });
        }
        if ending && !worked && forgiving && closed.is_none_or(|closed| closed.elapsed() > AGAIN) {
            // When one more frame of each flow has arrived, no earlier frame can arrive any more. That frame may be
            // lost, too.
            (0..down.count()).try_for_each(|_| send_down(network, &mut down, demand))?;
            (0..up.count()).try_for_each(|_| send_up(device, &mut up))?;
            closed = Some(Instant::now());
        }
        if progress.elapsed() > PATIENCE {
            bail!("{} frames to the guest and {} from it did not arrive", down.in_flight(), up.in_flight());
        }
        if !worked {
            thread::sleep(REST);
        }
    }
}
