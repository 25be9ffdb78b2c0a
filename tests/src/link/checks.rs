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

/// The largest frame that is no more than one segment.
const ETHERNET_FRAME: u64 = 1518;

impl Link {
    /// Pings both ways, none may be lost.
    ///
    /// # Errors
    /// If one is.
    pub fn check_pings(&self, guest: &mut Guest, count: u16) -> Result<()> {
        ping::check(GUEST, count)?;
        guest.check_pings(HOST, count)
    }

    /// So many bytes over TCP each way in each of so many streams, their sums compared.
    ///
    /// # Errors
    /// If they differ, or a stream breaks.
    pub fn check_bulk(&self, guest: &mut Guest, bytes: u64, streams: u16) -> Result<()> {
        for direction in ["up", "down"] {
            guest.check(&format!(
                "traffic bulk {HOST}:{PORT} --direction={direction} --bytes={bytes} --streams={streams}"
            ))?;
        }
        Ok(())
    }

    /// Numbered datagrams each way: none lost, doubled or overtaken in its flow.
    ///
    /// # Errors
    /// If one is.
    pub fn check_flows(&self, guest: &mut Guest, count: u32, flows: u16, rate: u32) -> Result<()> {
        for direction in ["up", "down"] {
            let text = guest.check(&format!(
                "traffic flows {HOST}:{PORT} --direction={direction} --count={count} --flows={flows} --rate={rate}"
            ))?;
            let outcome: Value = serde_json::from_str(text.trim()).context("what traffic wrote")?;
            if outcome["received"] != count {
                bail!("of {count} datagrams {direction}: {outcome}");
            }
        }
        Ok(())
    }

    /// Kills the back-end several times while TCP and numbered datagrams go both ways, and has another one take its
    /// place. TCP does not notice. Of the datagrams, those that a back-end had in hand are lost on their way to the
    /// guest, or come twice from it; none is damaged, or overtaken in its queue. Afterwards every receive buffer is in
    /// use.
    ///
    /// # Errors
    /// If not so.
    pub fn check_killed_under_load(&mut self, guest: &mut Guest) -> Result<()> {
        for _ in 0..3 {
            self.kill_under_load(guest)?;
        }
        self.check_every_buffer(guest)
    }

    fn kill_under_load(&mut self, guest: &mut Guest) -> Result<()> {
        /// Frames each way that show that there is load.
        const LOAD: u64 = 300;
        /// What a back-end has in hand of a queue at most.
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
        // A line each.
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
            // As the TAP's queues come and go, the kernel moves flows from one to another.
            let may_change_queue = self.queue_pairs > 1;
            let good = |flow: &Flow| flow.received > 0 && (flow.reordered == 0 || may_change_queue);
            let all_good = outcome.flows.iter().all(good);
            ensure!(all_good && outcome.damaged == 0 && duplicated <= twice, "{name}: {outcome:?}");
        }
        Ok(())
    }

    /// That the guest receives more frames on each queue pair than this has buffers.
    fn check_every_buffer(&mut self, guest: &mut Guest) -> Result<()> {
        let size = self.status()?.vrings.iter().map(|vring| vring.size).max().unwrap_or_default();
        let frames = |guest: &mut Guest| -> Result<Vec<u64>> {
            Ok(guest.queue_pairs("eth0")?.iter().map(|pair| pair.rx.frames).collect())
        };
        let before = frames(guest)?;
        // So many flows that the kernel chooses each queue for some of them. A slow machine may lose some.
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
        ensure!(enough, "frames received were {before:?}, are {after:?}, with {size} buffers each");
        Ok(())
    }

    /// Waits until so many frames more have gone each way.
    fn wait_load(&mut self, frames: u64) -> Result<()> {
        let before = netns::counters(TAP)?;
        self.backend.wait_until("there was any load", |_| {
            let now = netns::counters(TAP)?;
            let enough = |before: u64, now: u64| now - before > frames;
            let both = enough(before.rx_packets, now.rx_packets) && enough(before.tx_packets, now.tx_packets);
            Ok(both.then_some(()))
        })
    }

    /// A frame of every size from 60 bytes to the MTU there and back.
    ///
    /// # Errors
    /// If one is lost or damaged.
    pub fn check_sizes(&self, guest: &mut Guest) -> Result<()> {
        guest.check(&format!("traffic sizes {HOST}:{PORT}"))?;
        Ok(())
    }

    /// After bulk traffic: that every queue pair has carried frames both ways, and frames of many segments both ways.
    ///
    /// # Errors
    /// If not so.
    pub fn check_counters(&mut self, guest: &mut Guest) -> Result<()> {
        let seen = guest.queue_pairs("eth0")?;
        let used = seen.iter().filter(|pair| pair.rx.frames > 0 && pair.tx.frames > 0).count();
        ensure!(used == usize::from(self.queue_pairs), "only {used} pairs were used: {seen:?}");
        let counted = self.stats()?.queue_pairs;
        let to_guest: Vec<_> =
            seen.iter().zip(&counted).map(|(seen, counted)| (seen.rx, counted.rx)).collect();
        let from_guest: Vec<_> =
            seen.iter().zip(&counted).map(|(seen, counted)| (seen.tx, counted.tx)).collect();
        self.check_way(&to_guest).context("to the guest")?;
        self.check_way(&from_guest).context("from the guest")
    }

    /// The same one way: what the guest and what the back-end has counted, for each queue pair.
    fn check_way(&self, pairs: &[(Carried, DirectionStats)]) -> Result<()> {
        let (frames, bytes) = pairs
            .iter()
            .fold((0, 0), |(frames, bytes), (seen, _)| (frames + seen.frames, bytes + seen.bytes));
        ensure!(bytes / frames > ETHERNET_FRAME, "no frames of many segments: {pairs:?}");
        let used = pairs.iter().filter(|(_, counted)| counted.frames > Some(0)).count();
        let largest = pairs.iter().filter_map(|(_, counted)| counted.largest_frame).max();
        let expected = match self.datapath {
            Datapath::Userspace => used == pairs.len() && largest > Some(ETHERNET_FRAME),
            // Nobody has counted what the kernel moved.
            Datapath::VhostNet => used == 0 && largest.is_none(),
        };
        ensure!(expected, "the back-end has counted {pairs:?}");
        Ok(())
    }
}
