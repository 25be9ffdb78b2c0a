//! Traffic that goes on until it is told to end, whatever becomes of the guest meanwhile: each check in a thread of its
//! own, at the asking end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, anyhow, ensure};

use super::flows::{self, Outcome, Plan};
use super::{Direction, PATIENCE, bulk};

/// How often is looked at what a thread has done.
const TICK: Duration = Duration::from_millis(5);

/// A check under way.
#[derive(Debug)]
pub struct Endless<T> {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<T>>,
}

#[derive(Debug, Default)]
struct Shared {
    ended: AtomicBool,
    done: AtomicU64,
}

impl Shared {
    /// Notes how much was done; says whether to go on.
    fn go_on(&self, done: u64) -> bool {
        self.done.store(done, Ordering::Relaxed);
        !self.ended.load(Ordering::Relaxed)
    }
}

impl<T: Send + 'static> Endless<T> {
    fn start(check: impl FnOnce(&Shared) -> Result<T> + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        Self { shared, thread: thread::spawn(move || check(&of_thread)) }
    }

    /// How much has passed this end: bytes of a stream, datagrams of flows.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Waits until so much has passed.
    ///
    /// # Errors
    /// If it does not, because the check has failed or for long.
    pub fn wait_until(&self, until: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.done() < until {
            ensure!(!self.thread.is_finished(), "the traffic has ended by itself");
            ensure!(Instant::now() < deadline, "the traffic stands still");
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Ends the traffic, and returns what it came to.
    ///
    /// # Errors
    /// If it has failed.
    pub fn end(self) -> Result<T> {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the traffic's thread panicked"))?
    }
}

/// A TCP stream of at most `rate` bytes a second; it ends with the number of bytes, whose sums have been found equal at
/// both ends.
pub fn bulk(server: SocketAddr, direction: Direction, seed: u64, rate: u64) -> Endless<u64> {
    Endless::start(move |shared| {
        let (mut since, mut before) = (Instant::now(), 0);
        bulk::check_until(server, direction, seed, |bytes| {
            let due = Duration::from_micros((bytes - before) * 1_000_000 / rate);
            thread::sleep(due.saturating_sub(since.elapsed()));
            (since, before) = (Instant::now(), bytes);
            shared.go_on(bytes)
        })
    })
}

/// Numbered datagrams, however many the plan says; they end with what was received, and when they were sent.
pub fn flows(server: SocketAddr, direction: Direction, plan: Plan) -> Endless<(Outcome, Diary)> {
    let plan = Plan { count: flows::ENDLESS, ..plan };
    Endless::start(move |shared| {
        let mut diary = Diary { flows: u32::from(plan.flows), entries: Vec::new() };
        let outcome = flows::check_until(server, direction, plan, |datagrams| {
            diary.entries.push((SystemTime::now(), datagrams));
            shared.go_on(datagrams.into())
        })?;
        Ok((outcome, diary))
    })
}

/// When numbered datagrams have passed this end.
#[derive(Clone, Debug)]
pub struct Diary {
    flows: u32,
    /// How many had passed by then.
    entries: Vec<(SystemTime, u32)>,
}

impl Diary {
    /// A time when this flow's datagram `number` had not passed yet.
    pub fn before(&self, flow: u32, number: u32) -> SystemTime {
        let earlier = &self.entries[..self.split(flow, number)];
        earlier.last().map_or(SystemTime::UNIX_EPOCH, |(time, _)| *time)
    }

    /// A time when this flow's datagram `number` had passed, if it has.
    pub fn after(&self, flow: u32, number: u32) -> Option<SystemTime> {
        self.entries.get(self.split(flow, number)).map(|(time, _)| *time)
    }

    /// The first entry that counts the datagram.
    fn split(&self, flow: u32, number: u32) -> usize {
        // Flows take turns.
        let index = number * self.flows + flow;
        self.entries.partition_point(|(_, count)| *count <= index)
    }
}
