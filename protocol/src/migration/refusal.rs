//! Why a VM cannot move. Each reason has a stable name, for scripts and the operator's manual.

use thiserror::Error;

use crate::reasons::Reason;

/// One reason. The text says what the operator can do, unless that is obvious.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The target has another number of vCPUs.
    #[error(
        "the VM has {source_cpus} vCPUs, the target {target}; start the target with --cpus={source_cpus}"
    )]
    Cpus {
        /// The source's number.
        source_cpus: u8,
        /// The target's number.
        target: u8,
    },
    /// The target has another size of memory.
    #[error(
        "the VM has {source_bytes} bytes of memory, the target {target}; start the target with --memory={source_bytes}"
    )]
    Memory {
        /// The source's size, in bytes.
        source_bytes: u64,
        /// The target's size, in bytes.
        target: u64,
    },
    /// The target has another number of network devices.
    #[error(
        "the VM has {source_devices} network devices, the target {target}; give the target the same --net options"
    )]
    Devices {
        /// The source's number.
        source_devices: usize,
        /// The target's number.
        target: usize,
    },
    /// The target's device has another number of queue pairs.
    #[error(
        "network device {device} has {source_pairs} queue pairs, the target's {target}; set queue-pairs={source_pairs} \
         at the target"
    )]
    QueuePairs {
        /// The device's index.
        device: usize,
        /// The source's number.
        source_pairs: u16,
        /// The target's number.
        target: u16,
    },
    /// `local-migration` differs between the two sides.
    #[error(
        "network device {device} has local-migration={}, the target's {}; use the same value on both sides",
        on_off(*source_local),
        on_off(!*source_local)
    )]
    LocalMigration {
        /// The device's index.
        device: usize,
        /// The source's value.
        source_local: bool,
    },
    /// A back-end cannot hand over or take the TAP.
    #[error(
        "the {side}'s back-end of network device {device} does not offer device state (DEVICE_STATE); start a \
         baton-backend of this version there, or set local-migration=off"
    )]
    DeviceState {
        /// The device's index.
        device: usize,
        /// `source` or `target`.
        side: &'static str,
    },
    /// A back-end is not connected.
    #[error("the {side}'s back-end of network device {device} is not connected; start it first")]
    Backend {
        /// The device's index.
        device: usize,
        /// `source` or `target`.
        side: &'static str,
    },
    /// The guest uses features that the target's back-end does not offer.
    #[error(
        "the guest uses the features {missing:#x} of network device {device}, which the target's back-end does not \
         offer; start a back-end with the same options and datapath"
    )]
    Features {
        /// The device's index.
        device: usize,
        /// The missing features.
        missing: u64,
    },
    /// The target is configured with another MAC address.
    #[error("network device {device} has a different MAC address at the target; omit mac= there")]
    Mac {
        /// The device's index.
        device: usize,
    },
    /// KVM is too old.
    #[error("the {side}'s KVM cannot migrate the time stamp counter; use Linux 5.16 or later")]
    Tsc {
        /// `source` or `target`.
        side: &'static str,
    },
    /// The guest runs nested VMs, whose state is not migrated.
    #[error(
        "the guest uses hardware virtualisation (SVM or VMX); shut down its nested VMs and unload its KVM modules"
    )]
    Nested,
    /// The target's back-end cannot take the TAP, usually because it has one.
    #[error(
        "the target's back-end of network device {device} cannot take over the TAP: {error}; start it with \
         --incoming-fds and without a TAP of its own"
    )]
    Tap {
        /// The device's index.
        device: usize,
        /// The back-end's error.
        error: String,
    },
    /// The guest memory received is invalid.
    #[error("guest memory: {0}")]
    Ram(String),
    /// The descriptors are not those that the message needs.
    #[error("{0}")]
    Descriptors(String),
    /// The ownership word cannot be used.
    #[error("{0}")]
    Ownership(String),
    /// The VM's state contradicts itself or the agreed properties.
    #[error("invalid VM state: {0}")]
    State(String),
    /// The target failed to carry out its part.
    #[error("the target failed: {0}")]
    Target(String),
    /// The target does not wait for a VM any more.
    #[error("the target is not waiting for a VM")]
    Busy,
    /// The peer runs as a user that may not migrate to the target.
    #[error("{0}")]
    User(String),
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

impl Refusal {
    /// Returns the reason's name, which is the same in every version.
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
