//! Checks of the traffic between a guest and the network.

use anyhow::{Context, Result, bail, ensure};
use baton_protocol::control::DirectionStats;
use serde_json::Value;

use super::{GUEST, HOST, Link, PORT, TAP};
use crate::datapath::Datapath;
use crate::guest::{Carried, Guest};
use crate::netns;
use crate::ping;
use crate::traffic::flows::{Flow, Outcome};

/// The largest frame of one segment.
const ETHERNET_FRAME: u64 = 1518;

impl Link {
    /// Sends pings both ways.
    ///
    /// # Errors
    /// Returns an error if one is lost.
    pub fn check_pings(&self, guest: &mut Guest, count: u16) -> Result<()> {
        ping::check(GUEST, count)?;
        guest.check_pings(HOST, count)
    }

    /// Sends so many bytes over TCP each way in each of so many streams, and compares their checksums.
    ///
    /// # Errors
    /// Returns an error if the checksums differ or a stream breaks.
    pub fn check_bulk(&self, guest: &mut Guest, bytes: u64, streams: u16) -> Result<()> {
        for direction in ["up", "down"] {
            guest.check(&format!(
                "traffic bulk {HOST}:{PORT} --direction={direction} --bytes={bytes} --streams={streams}"
            ))?;
        }
        Ok(())
    }

    /// Sends numbered datagrams each way.
    ///
    /// # Errors
    /// Returns an error if one is lost, or doubled or overtaken in its flow.
    pub fn check_flows(&self, guest: &mut Guest, count: u32, flows: u16, rate: u32) -> Result<()> {
        for direction in ["up", "down"] {
            let text = guest.check(&format!(
                "traffic flows {HOST}:{PORT} --direction={direction} --count={count} --flows={flows} --rate={rate}"
            ))?;
            let outcome: Value = serde_json::from_str(text.trim()).context("invalid output of traffic")?;
            if outcome["received"] != count {
                bail!("{count} datagrams were sent {direction}: {outcome}");
            }
        }
        Ok(())
    }

    /// Kills the back-end several times while TCP and numbered datagrams go both ways, and starts another one in its
    /// place. Checks that no TCP stream breaks, and that no datagram is damaged or overtaken in its queue. Datagrams
    /// may be lost. Those to the guest must not come twice. Of those from it, at most a batch of each queue pair may.
    /// Checks afterwards that every receive buffer is in use.
    ///
    /// # Errors
    /// Returns an error if one of the checks fails.
    pub fn check_killed_under_load(&mut self, guest: &mut Guest) -> Result<()> {
        for _ in 0..3 {
            self.kill_under_load(guest)?;
        }
        self.check_every_buffer(guest)
    }

    fn kill_under_load(&mut self, guest: &mut Guest) -> Result<()> {
        /// Number of frames each way that shows that the load runs.
        const LOAD: u64 = 300;
        /// The most frames of a queue that a back-end has in hand.
        const BATCH: u64 = 64;
        const BYTES: u64 = 4 << 20;
        let server = format!("{HOST}:{PORT}");
        let one = |direction: &str| {
            format!(
                "traffic bulk {server} --direction={direction} --bytes={BYTES} >/bulk.{direction} 2>&1 & \
                 traffic flows {server} --direction={direction} --count=4000 --flows=8 --rate=2000 \
                 --silence=60 >/flows.{direction} 2>&1 &"
            )
        };
        let command = format!("( {} {} wait )", one("up"), one("down"));
        guest.start_command(&command)?;
        self.wait_load(LOAD)?;
        self.restart_backend()?;
        let finished = guest.finish(&command)?;
        ensure!(finished.status == 0, "{finished:?}");
        // Each program wrote one line.
        let text = guest.check("cat /bulk.up /bulk.down /flows.up /flows.down")?;
        let outcomes: Vec<Value> = serde_json::Deserializer::from_str(&text)
            .into_iter()
            .collect::<Result<_, _>>()
            .with_context(|| text.clone())?;
        let Ok([up, down, flows_up, flows_down]) = <[Value; 4]>::try_from(outcomes) else { bail!("{text}") };
        ensure!([&up, &down].iter().all(|bulk| bulk["bytes"] == BYTES), "{up}, {down}");
        let twice = BATCH * u64::from(self.queue_pairs);
        for (name, outcome, twice) in [("up", flows_up, twice), ("down", flows_down, 0)] {
            let outcome: Outcome = serde_json::from_value(outcome)?;
            let duplicated: u64 = outcome.flows.iter().map(|flow| u64::from(flow.duplicated)).sum();
            // As the queues of the TAP come and go, the kernel moves flows between them.
            let may_change_queue = self.queue_pairs > 1;
            let good = |flow: &Flow| flow.received > 0 && (flow.reordered == 0 || may_change_queue);
            let all_good = outcome.flows.iter().all(good);
            ensure!(all_good && outcome.damaged == 0 && duplicated <= twice, "{name}: {outcome:?}");
        }
        Ok(())
    }

    /// Checks that the guest receives more frames on each queue pair than the pair has buffers.
    fn check_every_buffer(&mut self, guest: &mut Guest) -> Result<()> {
        let size = self.status()?.vrings.iter().map(|vring| vring.size).max().unwrap_or_default();
        let frames = |guest: &mut Guest| -> Result<Vec<u64>> {
            Ok(guest.queue_pairs("eth0")?.iter().map(|pair| pair.rx.frames).collect())
        };
        let before = frames(guest)?;
        // With so many flows the kernel chooses every queue for some. A slow machine may lose datagrams.
        let count = 6 * u32::from(size) * u32::from(self.queue_pairs);
        let command = format!(
            "traffic flows {HOST}:{PORT} --direction=down --count={count} --flows=64 --rate=2000 --silence=60"
        );
        let text = guest.run(&command)?.output;
        let outcome: Outcome = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
        let whole = |flow: &Flow| flow.duplicated == 0 && flow.reordered == 0;
        ensure!(outcome.damaged == 0 && outcome.flows.iter().all(whole), "{outcome:?}");
        let after = frames(guest)?;
        let enough = before.iter().zip(&after).all(|(before, after)| after - before > u64::from(size));
        ensure!(enough, "received {before:?} frames before and {after:?} after, with {size} buffers each");
        Ok(())
    }

    /// Waits until so many more frames have gone each way.
    fn wait_load(&mut self, frames: u64) -> Result<()> {
        let before = netns::counters(TAP)?;
        self.backend.wait_until("the load ran", |_| {
            let now = netns::counters(TAP)?;
            let enough = |before: u64, now: u64| now - before > frames;
            let both = enough(before.rx_packets, now.rx_packets) && enough(before.tx_packets, now.tx_packets);
            Ok(both.then_some(()))
        })
    }

    /// Sends a frame of every size from 60 bytes to the MTU there and back.
    ///
    /// # Errors
    /// Returns an error if one is lost or damaged.
    pub fn check_sizes(&self, guest: &mut Guest) -> Result<()> {
        guest.check(&format!("traffic sizes {HOST}:{PORT}"))?;
        Ok(())
    }

    /// Checks, after bulk traffic, that every queue pair has carried frames both ways, some of many segments.
    ///
    /// # Errors
    /// Returns an error if one has not.
    pub fn check_counters(&mut self, guest: &mut Guest) -> Result<()> {
        let seen = guest.queue_pairs("eth0")?;
        let used = seen.iter().filter(|pair| pair.rx.frames > 0 && pair.tx.frames > 0).count();
        ensure!(used == usize::from(self.queue_pairs), "only {used} pairs carried frames: {seen:?}");
        let counted = self.stats()?.queue_pairs;
        let to_guest: Vec<_> =
            seen.iter().zip(&counted).map(|(seen, counted)| (seen.rx, counted.rx)).collect();
        let from_guest: Vec<_> =
            seen.iter().zip(&counted).map(|(seen, counted)| (seen.tx, counted.tx)).collect();
        self.check_way(&to_guest).context("to the guest")?;
        self.check_way(&from_guest).context("from the guest")
    }

    /// Checks one direction: what the guest and the back-end have counted for each queue pair.
    fn check_way(&self, pairs: &[(Carried, DirectionStats)]) -> Result<()> {
        let (frames, bytes) = pairs
            .iter()
            .fold((0, 0), |(frames, bytes), (seen, _)| (frames + seen.frames, bytes + seen.bytes));
        ensure!(bytes / frames > ETHERNET_FRAME, "no frame of many segments: {pairs:?}");
        let used = pairs.iter().filter(|(_, counted)| counted.frames > Some(0)).count();
        let largest = pairs.iter().filter_map(|(_, counted)| counted.largest_frame).max();
        let expected = match self.datapath {
            Datapath::Userspace => used == pairs.len() && largest > Some(ETHERNET_FRAME),
            // The frames that the kernel moved were not counted.
            Datapath::VhostNet => used == 0 && largest.is_none(),
        };
        ensure!(expected, "wrong counters of the back-end: {pairs:?}");
        Ok(())
    }
}
