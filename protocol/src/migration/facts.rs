//! The properties that the source and the target compare before a VM moves. Plain, untrusted data.

use serde::{Deserialize, Serialize};

/// The properties of a VM, or of the empty VM at the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// The number of vCPUs.
    pub cpus: u8,
    /// Guest memory, in bytes.
    pub memory: u64,
    /// Whether KVM can migrate the time stamp counter.
    pub moves_tsc: bool,
    /// Whether the guest uses hardware virtualisation (SVM or VMX), as it does for nested VMs.
    #[serde(default)]
    pub nested: bool,
    /// The network devices, in the order of the command line.
    pub net: Vec<NetFacts>,
}

/// The properties of a network device, or of its counterpart at the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetFacts {
    /// The number of queue pairs.
    pub queue_pairs: u16,
    /// Whether the TAP moves with the device. At the source, only in a local migration.
    pub local: bool,
    /// Whether the back-end can save or load device state.
    pub device_state: bool,
    /// Whether the back-end is connected.
    pub connected: bool,
    /// Source: the features that the driver has acknowledged. Target: the features that the back-end offers.
    pub features: u64,
    /// Source: the guest's MAC address. Target: the configured MAC address (`mac=`), if any.
    pub mac: Option<[u8; 6]>,
}
