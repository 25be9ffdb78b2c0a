//! The load: front-end, guest and network of one back-end, in one thread that never waits, so that what it sees of a
//! frame's time is the frame's.
//!
//! A second thread hears the orders. The traffic's thread looks for them between frames.

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

/// The first UDP port of the flows, one a queue pair: the same both ways, since the kernel steers what comes back to where
/// it went out.
const PORT: u16 = 20_000;
/// The most frames of one direction that are sent at once: who could not run for a while does not make up for it.
const BURST: u64 = 64;
/// How long a driver that lets others have its processor does so.
const REST: Duration = Duration::from_micros(50);
/// How long a frame may take that is not lost.
const SETTLED: Duration = Duration::from_millis(500);

/// What to drive.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The back-end's socket.
    #[arg(long)]
    pub socket: PathBuf,
    /// Its TAP.
    #[arg(long)]
    pub tap: String,
    /// Queue pairs.
    #[arg(long)]
    pub pairs: u16,
    /// How many of them have frames
    #[arg(long)]
    pub busy: u16,
    /// The guest's memory, in bytes.
    #[arg(long)]
    pub memory: u64,
    /// Frames a second each way.
    #[arg(long)]
    pub rate: u32,
    /// Let others have the processor now and then.
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

/// Connects, and drives until nobody gives orders any more.
///
/// # Errors
/// If the back-end does what it must not.
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
        // Without the other end it has failed, and says so itself.
        if orders.send(order).is_err() {
            break;
        }
        let Ok(answer) = answers.recv() else { break };
        line.say(&answer)?;
    }
    Ok(())
}

/// Nanoseconds between two frames.
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
    /// When the count began.
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
            // Who asked may be gone.
            let _ = answers.send(answer);
        }
    }

    /// Sends a frame of each flow out before any comes in: a flow that the kernel learns of later is steered elsewhere
    /// from then on, and overtakes itself.
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

    /// How many frames have not arrived.
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

    /// Sends what is due.
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
            // A guest waits where its queue is full.
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

    /// Takes what has come. Gives whether anything had.
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
