//! Traffic across a guest's moves: TCP streams and numbered datagrams, both ways.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use super::{Kind, SERVER, Switch};
use crate::guest::Accelerator;
use crate::traffic::Direction;
use crate::traffic::endless::{self, Diary, Endless};
use crate::traffic::flows::{Outcome, Plan};

/// The plan of the datagrams; [`Pace`] sets the rate. The silence that ends a flow is as long as
/// [`crate::traffic::PATIENCE`], because on a busy machine a guest may be stopped for half a minute while it moves.
const PLAN: Plan = Plan { count: 0, flows: 4, rate: 0, size: 200, silence: 120 };

/// The rate of the traffic: bytes a second on each stream, and datagrams a second each way. Low enough to leave time
/// for a concurrent migration, and to keep every queue from overflowing while the guest is stopped.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes: u64,
    datagrams: u32,
}

impl Pace {
    fn of(accelerator: Accelerator) -> Self {
        match accelerator {
            Accelerator::Tcg => Self { bytes: 8 << 20, datagrams: 400 },
            // In the lab both the guest and its machine are emulated. If the streams overload them, one of the streams
            // may get nothing for half a minute.
            Accelerator::Kvm => Self { bytes: 64 << 10, datagrams: 40 },
        }
    }
}

/// The running traffic.
#[derive(Debug)]
pub struct Load {
    pace: Pace,
    streams: Vec<Endless<u64>>,
    to_guest: Endless<(Outcome, Diary)>,
    from_guest: Endless<(Outcome, Diary)>,
}

/// The result of the traffic.
#[derive(Clone, Debug)]
pub struct Balance {
    /// Bytes of all TCP streams, whose checksums matched.
    pub bytes: u64,
    /// Datagrams received in the guest, and from the guest.
    pub datagrams: [u32; 2],
    /// How many datagrams to the guest were lost in each switch.
    pub lost: Vec<u32>,
}

impl Load {
    /// Starts a stream each way for each queue pair, and flows of datagrams each way.
    pub fn start(kind: Kind) -> Self {
        let pace = Pace::of(kind.accelerator);
        let stream = |seed| {
            let both = [Direction::Up, Direction::Down];
            both.map(|direction| endless::bulk(SERVER, direction, seed, pace.bytes))
        };
        let plan = Plan { rate: pace.datagrams, ..PLAN };
        Self {
            pace,
            streams: (1..=kind.queue_pairs.into()).flat_map(stream).collect(),
            to_guest: endless::flows(SERVER, Direction::Up, plan),
            from_guest: endless::flows(SERVER, Direction::Down, plan),
        }
    }

    /// Waits until every stream has carried as many further bytes as it does in a second, and more datagrams have
    /// arrived from the guest.
    ///
    /// # Errors
    /// Returns an error if a stream or the datagrams make no progress.
    pub fn wait_flowing(&self) -> Result<()> {
        self.wait_share(1)
    }

    /// Waits until every stream has carried some further bytes, and another datagram has arrived from the guest.
    ///
    /// # Errors
    /// Returns an error if a stream or the datagrams make no progress.
    pub fn wait_moving(&self) -> Result<()> {
        self.wait_share(64)
    }

    fn wait_share(&self, share: u32) -> Result<()> {
        // Takes all marks first: the streams progress concurrently.
        let more = self.pace.bytes / u64::from(share);
        let until: Vec<_> = self.streams.iter().map(|stream| stream.done() + more).collect();
        let datagrams = self.from_guest.done() + u64::from(self.pace.datagrams / 4 / share).max(1);
        for (number, (stream, until)) in self.streams.iter().zip(until).enumerate() {
            stream.wait_until(until).with_context(|| format!("TCP stream {number}"))?;
        }
        self.from_guest.wait_until(datagrams).context("datagrams from the guest")
    }

    /// Ends the traffic and checks it: no byte or datagram may be damaged, and no datagram duplicated or reordered.
    /// Datagrams to the guest may be lost, but only in these switches.
    ///
    /// # Errors
    /// Returns an error if the traffic was not as required.
    pub fn end(self, switches: &[Switch]) -> Result<Balance> {
        let mut bytes = 0;
        for stream in self.streams {
            bytes += stream.end().context("a TCP stream")?;
        }
        let (from_guest, _) = self.from_guest.end().context("datagrams from the guest")?;
        let (to_guest, diary) = self.to_guest.end().context("datagrams to the guest")?;
        // Frames that the guest has sent wait in its ring; the next back-end sends them.
        ensure!(from_guest.is_perfect(), "datagrams from the guest: {from_guest:?}");
        ensure!(to_guest.is_sound(), "datagrams to the guest: {to_guest:?}");
        let lost = losses(&to_guest, &diary, switches)?;
        Ok(Balance { bytes, datagrams: [to_guest.received, from_guest.received], lost })
    }
}

/// Returns how many datagrams were lost in each switch.
///
/// A datagram sent before the guest was stopped is lost only if it was still queued in the TAP that the guest left. All
/// later ones in that TAP are lost, too, so a gap that begins before the stop must extend to it.
fn losses(outcome: &Outcome, diary: &Diary, switches: &[Switch]) -> Result<Vec<u32>> {
    let mut lost = vec![0; switches.len()];
    for (flow, counts) in (0..).zip(&outcome.flows) {
        for gap in &counts.gaps {
            let begin = diary.before(flow, gap.start);
            // The first datagram that arrived after the gap.
            let end = diary.after(flow, gap.end).context("the last datagrams were lost")?;
            let switch = switches.iter().position(|switch| begin <= switch.running && switch.stopped <= end);
            let switch = switch.with_context(|| {
                let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH);
                format!(
                    "datagrams {gap:?} of flow {flow} were lost outside the switches, from {:?} to {:?}: {switches:?}",
                    since(begin),
                    since(end)
                )
            })?;
            lost[switch] += gap.end - gap.start;
        }
    }
    Ok(lost)
}
