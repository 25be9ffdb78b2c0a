//! What both sides must agree about before a VM moves. Plain and untrusted.

use serde::{Deserialize, Serialize};

/// A VM, or the place for one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// How many vCPUs.
    pub cpus: u8,
    /// Guest memory, in bytes.
    pub memory: u64,
    /// Whether the host's KVM lets time stamp counters move.
    pub moves_tsc: bool,
    /// Whether the guest uses the processor's virtualisation itself, as it does for guests of its own.
    #[serde(default)]
    pub nested: bool,
    /// The network devices, in the order of the command line.
    pub net: Vec<NetFacts>,
}

/// A network device, or the place for one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetFacts {
    /// How many queue pairs.
    pub queue_pairs: u16,
    /// Whether its TAP moves with it. At the source this is so only in a local migration.
    pub local: bool,
    /// Whether its back-end can give or take device state.
    pub device_state: bool,
    /// Whether its back-end is connected.
    pub connected: bool,
    /// The features that the driver has acknowledged, or that the back-end there offers.
    pub features: u64,
    /// The guest's MAC address, or the one that was asked for.
    pub mac: Option<[u8; 6]>,
}
