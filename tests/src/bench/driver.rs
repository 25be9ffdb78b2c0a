//! The load generator: front-end, guest and network of one back-end in a single thread. Unless it is restful the thread
//! never sleeps, so its wake-up latency does not add to the measured times. A second thread receives the orders; the
//! traffic thread polls for them between frames.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::cell::take_processor;
use super::message::{Count, Line, Order, Worst};
use super::timing::Timing;
use crate::fake_frontend::net::{NetHeader, features};
use crate::fake_frontend::{Device, Options};
use crate::numbered_frames::Flows;
use crate::packet_socket::PacketSocket;

/// The UDP port of the first flow; each queue pair has one flow. Both directions use the same ports, because the kernel
/// steers a flow to the queue on which its other direction went out.
const PORT: u16 = 20_000;
/// The most frames of one direction that are sent at once. After a longer stall the driver does not catch up.
const BURST: u64 = 64;
/// How long a restful driver sleeps when no frame has arrived.
const REST: Duration = Duration::from_micros(50);
/// How long to wait without progress before the outstanding frames count as lost.
const SETTLED: Duration = Duration::from_millis(500);

/// The back-end to drive, and the load.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// vhost-user socket of the back-end
    #[arg(long)]
    pub socket: PathBuf,
    /// TAP of the back-end
    #[arg(long)]
    pub tap: String,
    /// Number of queue pairs
    #[arg(long)]
    pub pairs: u16,
    /// Number of queue pairs that carry frames
    #[arg(long)]
    pub busy: u16,
    /// Guest memory in bytes
    #[arg(long)]
    pub memory: u64,
    /// Frames a second each way, over all queue pairs
    #[arg(long)]
    pub rate: u32,
    /// Sleep when there is nothing to do, and share the processor
    #[arg(long)]
    pub restful: bool,
}

/// An answer to an order.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    Worst(Worst),
    Count(Count),
}

/// Connects to the back-end and runs the load until the other end of `line` is closed.
///
/// # Errors
/// Returns an error if the back-end or the TAP cannot be used, or if a malformed frame or order arrives.
pub fn run(arguments: &Arguments, line: OwnedFd) -> Result<()> {
    if !arguments.restful {
        take_processor()?;
    }
    let mq = if arguments.pairs > 1 { features::MQ } else { 0 };
    let options = Options {
        queue_pairs: arguments.pairs,
        features: Options::default().features | mq,
        canaries: false,
        memory: arguments.memory,
        ..Options::default()
    };
    let network = PacketSocket::open(&arguments.tap)?;
    let mut device = Device::connect(&arguments.socket, options)?;
    for pair in &mut device.pairs {
        pair.receive.queue.disable_calls();
        pair.transmit.queue.disable_calls();
    }
    let (orders, orders_end) = channel();
    let (answers_end, answers) = channel();
    let traffic = Traffic {
        network,
        down: Flows::new(PORT, arguments.busy),
        up: Flows::new(PORT, arguments.busy),
        down_times: Timing::default(),
        up_times: Timing::default(),
        device,
        began: Instant::now(),
        interval: interval(arguments.rate),
        due: 0,
        counted: 0,
        restful: arguments.restful,
    };
    thread::scope(|scope| {
        let traffic = scope.spawn(move || traffic.run(&orders_end, &answers_end));
        let heard = hear(line.into(), &orders, &answers);
        drop(orders);
        let drove = traffic.join().map_err(|_| anyhow!("the load panicked"))?;
        drove.and(heard)
    })
}

fn hear(mut line: Line, orders: &Sender<Order>, answers: &Receiver<Answer>) -> Result<()> {
    while let Some(order) = line.hear::<Order>()? {
        // If the receiver is gone, the traffic thread has failed and returns the error itself.
        if orders.send(order).is_err() {
            break;
        }
        let Ok(answer) = answers.recv() else { break };
        line.say(&answer)?;
    }
    Ok(())
}

/// The time between two frames of one direction, in nanoseconds.
fn interval(rate: u32) -> u64 {
    1_000_000_000 / u64::from(rate.max(1))
}

struct Traffic {
    device: Device,
    network: PacketSocket,
    down: Flows,
    up: Flows,
    down_times: Timing,
    up_times: Timing,
    began: Instant,
    interval: u64,
    /// When the next frame each way is due.
    due: u64,
    /// When the current count began.
    counted: u64,
    restful: bool,
}

impl Traffic {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn run(mut self, orders: &Receiver<Order>, answers: &Sender<Answer>) -> Result<()> {
        let mut frame = Vec::new();
        self.introduce(&mut frame)?;
        loop {
            let answer = match orders.try_recv() {
                Ok(Order::Mark) => Answer::Worst(self.mark()),
                Ok(Order::Rate(rate)) => {
                    self.interval = interval(rate);
                    Answer::Worst(self.mark())
                }
                Ok(Order::Settle) => Answer::Count(self.settle(&mut frame)?),
                Err(std::sync::mpsc::TryRecvError::Empty) => {
                    self.send()?;
                    if !self.receive(&mut frame)? && self.restful {
                        thread::sleep(REST);
                    }
                    continue;
                }
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
            };
            // The receiver may be gone; the next iteration then ends the loop.
            let _ = answers.send(answer);
        }
    }

    /// Sends one frame of each flow to the network before any arrives from it. If the kernel learned of a flow later,
    /// it would steer the flow to another queue from then on, and frames could overtake each other.
    fn introduce(&mut self, frame: &mut Vec<u8>) -> Result<()> {
        for _ in 0..self.up.count() {
            let now = self.now();
            let (pair, bytes) = self.up.next(now);
            self.device.send(pair, &NetHeader::default(), bytes)?;
            self.up.sent();
        }
        self.settle(frame).map(drop)
    }

    fn mark(&mut self) -> Worst {
        self.down_times.take_worst().or(self.up_times.take_worst())
    }

    /// How many frames have not arrived yet.
    fn outstanding(&self) -> u64 {
        let of = |flows: &Flows| flows.in_flight() + flows.tally().lost;
        of(&self.down) + of(&self.up)
    }

    fn settle(&mut self, frame: &mut Vec<u8>) -> Result<Count> {
        let over = self.now();
        let mut progress = Instant::now();
        while self.outstanding() > 0 && progress.elapsed() < SETTLED {
            if self.receive(frame)? {
                progress = Instant::now();
            }
        }
        let (down, up) = (self.down.take_tally(), self.up.take_tally());
        self.down_times.restart();
        self.up_times.restart();
        let quiet = self.device.connection.check_quiet().is_ok();
        let time = u128::from(over - self.counted).max(1);
        let rate = u128::from(down.sent + up.sent) * 500_000_000 / time;
        self.counted = self.now();
        self.due = self.counted;
        self.mark();
        Ok(Count {
            rate: u32::try_from(rate).unwrap_or(u32::MAX),
            sent: down.sent + up.sent,
            lost: down.lost + up.lost,
            doubled: down.doubled + up.doubled,
            reordered: down.reordered + up.reordered,
            quiet,
        })
    }

    /// Sends the frames that are due.
    fn send(&mut self) -> Result<()> {
        let now = self.now();
        self.due = self.due.max(now.saturating_sub(BURST * self.interval));
        let mut pairs = 0u128;
        while self.due <= now {
            self.due += self.interval;
            let now = self.now();
            let (_, frame) = self.down.next(now);
            // A frame that the TAP drops counts as lost.
            self.network.try_send(frame)?;
            self.down.sent();
            let (pair, frame) = self.up.next(now);
            // If the transmit queue is full, the guest keeps the frame for the next turn.
            if self.device.enqueue(pair, &NetHeader::default(), frame)? {
                self.up.sent();
                pairs |= 1 << pair;
            }
        }
        while pairs != 0 {
            let pair = pairs.trailing_zeros();
            pairs &= pairs - 1;
            self.device.flush(usize::try_from(pair)?)?;
        }
        Ok(())
    }

    /// Receives all frames that have arrived. Returns whether there were any.
    fn receive(&mut self, frame: &mut Vec<u8>) -> Result<bool> {
        let mut any = false;
        for pair in 0..self.device.pairs.len() {
            while self.device.try_receive(pair, frame)?.is_some() {
                let stamp = self.down.receive(frame).context("in the guest")?.stamp;
                self.down_times.arrive(stamp, self.now());
                any = true;
            }
        }
        while let Some((_, frame)) = self.network.try_receive()? {
            let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let stamp = self.up.receive(frame).context("on the network")?.stamp;
            self.up_times.arrive(stamp, now);
            any = true;
        }
        Ok(any)
    }
}
