//! Why a VM cannot move: reasons with names that stay, for scripts and for the operator's manual.

use thiserror::Error;

use crate::reasons::Reason;

/// One reason. The text says what to do where that is not plain.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The target's VM is not of the same size.
    #[error(
        "the VM has {source_cpus} vCPUs, the target {target}; start the target with --cpus={source_cpus}"
    )]
    Cpus {
        /// The source's.
        source_cpus: u8,
        /// The target's.
        target: u8,
    },
    /// The target's VM is not of the same size.
    #[error(
        "the VM has {source_bytes} bytes of memory, the target {target}; start the target with --memory={source_bytes}"
    )]
    Memory {
        /// The source's.
        source_bytes: u64,
        /// The target's.
        target: u64,
    },
    /// The target has other devices.
    #[error(
        "the VM has {source_devices} network devices, the target {target}; give the target the same --net options"
    )]
    Devices {
        /// The source's.
        source_devices: usize,
        /// The target's.
        target: usize,
    },
    /// A device of another kind.
    #[error(
        "network device {device} has {source_pairs} queue pairs, the target's {target}; give the target's queue-pairs={source_pairs}"
    )]
    QueuePairs {
        /// Which device.
        device: usize,
        /// The source's.
        source_pairs: u16,
        /// The target's.
        target: u16,
    },
    /// Whether the TAP moves along is not the same on both sides.
    #[error(
        "network device {device} has local-migration={}, the target's {}; give both the same", on_off(*source_local), on_off(!*source_local)
    )]
    LocalMigration {
        /// Which device.
        device: usize,
        /// The source's.
        source_local: bool,
    },
    /// A back-end that cannot give or take the TAP.
    #[error(
        "the {side}'s back-end of network device {device} does not offer device state (DEVICE_STATE); start baton-backend of this version there, or set local-migration=off"
    )]
    DeviceState {
        /// Which device.
        device: usize,
        /// Whose.
        side: &'static str,
    },
    /// A back-end is not there.
    #[error("the {side}'s back-end of network device {device} is not connected; start it first")]
    Backend {
        /// Which device.
        device: usize,
        /// Whose.
        side: &'static str,
    },
    /// The guest uses what the target's back-end cannot.
    #[error(
        "the guest uses the features {missing:#x} of network device {device}, which the target's back-end does not offer; start one with the same options and datapath"
    )]
    Features {
        /// Which device.
        device: usize,
        /// Which features.
        missing: u64,
    },
    /// The target was told another address.
    #[error("network device {device} has another MAC address than the target's; leave the target's mac= out")]
    Mac {
        /// Which device.
        device: usize,
    },
    /// KVM is too old.
    #[error("the {side}'s KVM cannot move time stamp counters; Linux 5.16 can")]
    Tsc {
        /// Whose.
        side: &'static str,
    },
    /// A guest with guests of its own, whose state is not moved.
    #[error(
        "the guest uses the processor's virtualisation itself (SVM or VMX); end the guest's own VMs and unload its KVM"
    )]
    Nested,
    /// A back-end that has a TAP.
    #[error(
        "the target's back-end of network device {device} takes no TAP: {error}; start it with --incoming-fds and without a TAP of its own"
    )]
    Tap {
        /// Which device.
        device: usize,
        /// What was heard of it.
        error: String,
    },
    /// Guest memory that is not what it should be.
    #[error("guest memory: {0}")]
    Ram(String),
    /// The descriptors are not those that the message needs.
    #[error("{0}")]
    Descriptors(String),
    /// The ownership word cannot be used.
    #[error("{0}")]
    Ownership(String),
    /// A state that contradicts itself or what was agreed.
    #[error("the VM's state is not possible: {0}")]
    State(String),
    /// The target cannot do its part.
    #[error("the target failed: {0}")]
    Target(String),
    /// The target does not wait for a VM any more.
    #[error("the target waits for no VM")]
    Busy,
    /// The peer is another user's.
    #[error("{0}")]
    User(String),
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

impl Refusal {
    /// The name, which stays the same whatever becomes of the text.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpus { .. } => "cpus",
            Self::Memory { .. } => "memory",
            Self::Devices { .. } => "devices",
            Self::QueuePairs { .. } => "queue-pairs",
            Self::LocalMigration { .. } => "local-migration",
            Self::DeviceState { .. } => "device-state",
            Self::Backend { .. } => "back-end",
            Self::Features { .. } => "features",
            Self::Mac { .. } => "mac",
            Self::Tsc { .. } => "tsc",
            Self::Nested => "nested",
            Self::Tap { .. } => "tap",
            Self::Ram(_) => "ram",
            Self::Descriptors(_) => "descriptors",
            Self::Ownership(_) => "ownership",
            Self::State(_) => "state",
            Self::Target(_) => "target",
            Self::Busy => "busy",
            Self::User(_) => "user",
        }
    }
}

impl From<Refusal> for Reason {
    fn from(refusal: Refusal) -> Self {
        Self { name: refusal.name().to_owned(), text: refusal.to_string() }
    }
}
