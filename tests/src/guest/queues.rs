//! The per-queue counters of the guest's network driver, which are available with either datapath.

use anyhow::{Context, Result};

/// The counters of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Frames.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The counters of a queue pair, with directions as the guest names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePair {
    /// To the guest.
    pub rx: Carried,
    /// From the guest.
    pub tx: Carried,
}

/// Parses the output of `ethtool -S` for a virtio-net interface: a line such as `rx_queue_0_packets: 12` for each
/// counter. Returns the queue pairs in use, in order.
pub(super) fn parse(text: &str) -> Result<Vec<QueuePair>> {
    let mut pairs: Vec<QueuePair> = Vec::new();
    for line in text.lines() {
        let Some((name, number)) = line.trim().split_once(": ") else { continue };
        let Some((direction, name)) = name.split_once("_queue_") else { continue };
        let Some((queue, what)) = name.split_once('_') else { continue };
        let queue: usize = queue.parse().with_context(|| format!("invalid queue number: {line}"))?;
        if pairs.len() <= queue {
            pairs.resize(queue + 1, QueuePair::default());
        }
        let carried = if direction == "rx" { &mut pairs[queue].rx } else { &mut pairs[queue].tx };
        let counter = match what {
            "packets" => &mut carried.frames,
            "bytes" => &mut carried.bytes,
            _ => continue,
        };
        *counter = number.parse().with_context(|| format!("invalid number: {line}"))?;
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_parsed_by_name() {
        let text = "NIC statistics:\n     rx_queue_0_packets: 1\n     rx_queue_0_bytes: 2\n     rx_queue_0_drops: 3\n     \
                    rx_queue_1_packets: 4\n     rx_queue_1_bytes: 5\n     tx_queue_0_packets: 6\n     \
                    tx_queue_0_bytes: 7\n     tx_queue_1_packets: 8\n     tx_queue_1_bytes: 9\n";
        let pair = |rx: (u64, u64), tx: (u64, u64)| QueuePair {
            rx: Carried { frames: rx.0, bytes: rx.1 },
            tx: Carried { frames: tx.0, bytes: tx.1 },
        };
        assert_eq!(parse(text).unwrap(), [pair((1, 2), (6, 7)), pair((4, 5), (8, 9))]);
        assert_eq!(parse("no stats available\n").unwrap(), []);
    }
}
