//! Traffic that lasts across a guest's moves: TCP streams and numbered datagrams, both ways.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use super::{Kind, SERVER, Switch};
use crate::guest::Accelerator;
use crate::traffic::Direction;
use crate::traffic::endless::{self, Diary, Endless};
use crate::traffic::flows::{Outcome, Plan};

/// Numbered datagrams, at a [`Pace`]. Their silence is the end after
/// [`crate::traffic::PATIENCE`]: on a busy machine a guest may stand still for half a minute while it moves.
const PLAN: Plan = Plan { count: 0, flows: 4, rate: 0, size: 200, silence: 120 };

/// How fast the traffic is: bytes a second on each stream, and datagrams a second each way. So slow that there is time
/// left for a migration beside it, and that no queue on the way overflows while a guest stands still.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes: u64,
    datagrams: u32,
}

impl Pace {
    fn of(accelerator: Accelerator) -> Self {
        match accelerator {
            Accelerator::Tcg => Self { bytes: 8 << 20, datagrams: 400 },
            // In the lab both guest and machine are emulated, and one of a few streams may get nothing for half a minute
            // where all want more than that can do.
            Accelerator::Kvm => Self { bytes: 64 << 10, datagrams: 40 },
        }
    }
}

/// The traffic under way.
#[derive(Debug)]
pub struct Load {
    pace: Pace,
    streams: Vec<Endless<u64>>,
    to_guest: Endless<(Outcome, Diary)>,
    from_guest: Endless<(Outcome, Diary)>,
}

/// What it came to.
#[derive(Clone, Debug)]
pub struct Balance {
    /// Bytes of all TCP streams, whose sums were equal.
    pub bytes: u64,
    /// Numbered datagrams to the guest and from it.
    pub datagrams: [u32; 2],
    /// How many of those to the guest were lost in each switch.
    pub lost: Vec<u32>,
}

impl Load {
    /// Starts a stream each way for each queue pair, and datagrams.
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

    /// Waits until as much more has passed on every stream as does in a second, and more datagrams have come.
    ///
    /// # Errors
    /// If something stands still.
    pub fn wait_flowing(&self) -> Result<()> {
        self.wait_share(1)
    }

    /// Waits until some more has passed on every stream, and another datagram has come.
    ///
    /// # Errors
    /// If something stands still.
    pub fn wait_moving(&self) -> Result<()> {
        self.wait_share(64)
    }

    fn wait_share(&self, share: u32) -> Result<()> {
        // All at once, not one after the other.
        let more = self.pace.bytes / u64::from(share);
        let until: Vec<_> = self.streams.iter().map(|stream| stream.done() + more).collect();
        let datagrams = self.from_guest.done() + u64::from(self.pace.datagrams / 4 / share).max(1);
        for (number, (stream, until)) in self.streams.iter().zip(until).enumerate() {
            stream.wait_until(until).with_context(|| format!("TCP stream {number}"))?;
        }
        self.from_guest.wait_until(datagrams).context("datagrams from the guest")
    }

    /// Ends it, and judges: no byte damaged, no datagram damaged, doubled or overtaken, none lost from the guest, and
    /// to the guest only in these switches.
    ///
    /// # Errors
    /// If not so.
    pub fn end(self, switches: &[Switch]) -> Result<Balance> {
        let mut bytes = 0;
        for stream in self.streams {
            bytes += stream.end().context("a TCP stream")?;
        }
        let (from_guest, _) = self.from_guest.end().context("datagrams from the guest")?;
        let (to_guest, diary) = self.to_guest.end().context("datagrams to the guest")?;
        // What the guest has sent waits in its ring, and is sent by the next back-end.
        ensure!(from_guest.is_perfect(), "datagrams from the guest: {from_guest:?}");
        ensure!(to_guest.is_sound(), "datagrams to the guest: {to_guest:?}");
        let lost = losses(&to_guest, &diary, switches)?;
        Ok(Balance { bytes, datagrams: [to_guest.received, from_guest.received], lost })
    }
}

/// How many datagrams were lost in each switch.
///
/// What was lost before the guest was stopped was waiting in the TAP that it left. So was all that came behind it,
/// and a gap that begins before the stop must reach it.
fn losses(outcome: &Outcome, diary: &Diary, switches: &[Switch]) -> Result<Vec<u32>> {
    let mut lost = vec![0; switches.len()];
    for (flow, counts) in (0..).zip(&outcome.flows) {
        for gap in &counts.gaps {
            let begin = diary.before(flow, gap.start);
            // The first one that came again.
            let end = diary.after(flow, gap.end).context("the last datagrams were lost")?;
            let switch = switches.iter().position(|switch| begin <= switch.running && switch.stopped <= end);
            let switch = switch.with_context(|| {
                let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH);
                format!(
                    "{gap:?} of flow {flow} were lost outside the switches, at {:?} to {:?}: {switches:?}",
                    since(begin),
                    since(end)
                )
            })?;
            lost[switch] += gap.end - gap.start;
        }
    }
    Ok(lost)
}
