//! Traffic that continues until it is stopped, for example while the guest migrates. Each check runs in its own thread
//! at the client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, anyhow, ensure};

use super::flows::{self, Outcome, Plan};
use super::{Direction, PATIENCE, bulk};

/// How often to check the progress of a thread.
const TICK: Duration = Duration::from_millis(5);

/// A running check.
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
    /// Records the progress. Returns whether to continue.
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

    /// Returns how much was sent or received at this end: bytes of a stream, datagrams of flows.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Waits until [`Self::done`] reaches `until`.
    ///
    /// # Errors
    /// Returns an error if the check fails, or if that does not happen in time.
    pub fn wait_until(&self, until: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.done() < until {
            ensure!(!self.thread.is_finished(), "the traffic has failed");
            ensure!(Instant::now() < deadline, "timed out at {} of {until}", self.done());
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Stops the traffic, and returns its result.
    ///
    /// # Errors
    /// Returns an error if the check failed.
    pub fn end(self) -> Result<T> {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread of the traffic panicked"))?
    }
}

/// Starts a TCP stream of at most `rate` bytes a second. Its result is the number of bytes, once the checksums are
/// equal at both ends.
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

/// Starts numbered datagrams, ignoring the count in `plan`. The result is what was received, and the times at which the
/// datagrams were sent or received at this end.
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

/// The times at which numbered datagrams were sent or received at this end.
#[derive(Clone, Debug)]
pub struct Diary {
    flows: u32,
    /// Times, and the number of datagrams up to each.
    entries: Vec<(SystemTime, u32)>,
}

impl Diary {
    /// Returns a time before datagram `number` of a flow was sent or received.
    pub fn before(&self, flow: u32, number: u32) -> SystemTime {
        let earlier = &self.entries[..self.split(flow, number)];
        earlier.last().map_or(SystemTime::UNIX_EPOCH, |(time, _)| *time)
    }

    /// Returns a time after datagram `number` of a flow was sent or received, or `None` if it was not.
    pub fn after(&self, flow: u32, number: u32) -> Option<SystemTime> {
        self.entries.get(self.split(flow, number)).map(|(time, _)| *time)
    }

    /// Returns the index of the first entry that counts the datagram.
    fn split(&self, flow: u32, number: u32) -> usize {
        // The flows alternate.
        let index = number * self.flows + flow;
        self.entries.partition_point(|(_, count)| *count <= index)
    }
}
