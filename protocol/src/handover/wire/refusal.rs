//! Why a device or a session cannot be handed over. Each reason has a stable name, for scripts and the operator's
//! manual.

use crate::fd_manifest::ManifestError;
use crate::reasons::{Reason, Reasons};
use crate::version::VersionError;

/// One reason. The text says what the operator can do, unless that is obvious.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The target already has a TAP.
    #[error("the target already has a TAP and cannot receive another; start a target with --incoming-fds")]
    AlreadyInitialised,
    /// The target is busy with another source.
    #[error("the target is in another hand-over")]
    Busy,
    /// The target does not know what is to be handed over.
    #[error("the target cannot take over a {0:?}")]
    Purpose(String),
    /// The source has no queue pair, or more than a device can have.
    #[error("the source has {0} queue pairs; the valid range is 1 to 128")]
    QueuePairRange(usize),
    /// The target has another number of queue pairs.
    #[error(
        "the source has {source_pairs} queue pairs, the target {target}; start the target with the same --queue-pairs, \
         or without the option"
    )]
    QueuePairs {
        /// The source's number.
        source_pairs: usize,
        /// The target's number.
        target: usize,
    },
    /// The number of `--vhost-fds` differs from that of queue pairs.
    #[error(
        "the source has {source_pairs} queue pairs, but the target's --vhost-fds lists {fds} descriptors; pass one per \
         queue pair"
    )]
    VhostFds {
        /// The source's queue pairs.
        source_pairs: usize,
        /// The target's descriptors.
        fds: usize,
    },
    /// The target cannot open vhost-net.
    #[error("the target cannot use vhost-net: {0}")]
    VhostNet(String),
    /// The target does not support all negotiated virtio features.
    #[error(
        "the target does not support the negotiated features {0:#x}; use a target with the same datapath and version"
    )]
    Features(u64),
    /// The target's own front-end acknowledged features that the device does not have.
    #[error("the target's front-end acknowledged features {0:#x}, which the device does not have")]
    FrontEndFeatures(u64),
    /// The target does not support all negotiated protocol features.
    #[error(
        "the target does not support the negotiated protocol features {0:#x}; use a target with the same datapath and \
         version"
    )]
    ProtocolFeatures(u64),
    /// The TAP queue does not use virtio-net headers.
    #[error("queue pair {0} has no virtio-net header")]
    VnetHdr(usize),
    /// The virtio-net header has an unsupported size.
    #[error("queue pair {pair} has a virtio-net header of {length} bytes; it must have 10 or 12")]
    HeaderSize {
        /// The queue pair.
        pair: usize,
        /// The length of its header, in bytes.
        length: u16,
    },
    /// A queue pair describes the TAP differently from queue pair 0.
    #[error("queue pair {0} describes the TAP differently from queue pair 0")]
    Mixed(usize),
    /// The TAP's name is not a valid interface name.
    #[error("invalid TAP name {0:?}")]
    TapName(String),
    /// The MAC address is a group address or zero.
    #[error("the guest's MAC address is not a unicast address")]
    Mac,
    /// The MTU is less than IPv4 needs.
    #[error("MTU {0} is below 68, the minimum for IPv4")]
    Mtu(u16),
    /// The downscript's path is relative.
    #[error("the path of downscript {0:?} is not absolute")]
    Downscript(String),
    /// The source runs as another user, or as an unknown one.
    #[error(
        "the downscript {0:?} comes from another user and would not be run; start the source with --downscript=no"
    )]
    DownscriptUser(String),
    /// The target runs in another namespace or under another root directory.
    #[error(
        "the downscript {path:?} would run in {difference}; run the target where the source runs, or start the source \
         with --downscript=no"
    )]
    DownscriptPlace {
        /// The script.
        path: String,
        /// The place where it would run.
        difference: &'static str,
    },
    /// A frame in hand has an invalid length, or overlaps another one.
    #[error("the frame in hand of queue pair {0} has an invalid length or offset")]
    FrameInHand(usize),
    /// A message's descriptors are not the required ones.
    #[error("wrong descriptors: {0}")]
    Descriptors(#[from] ManifestError),
    /// A TAP descriptor or the frames in hand do not match the device state.
    #[error("{0}")]
    Tap(String),
    /// The ownership word cannot be used, or does not offer the device.
    #[error("{0}")]
    Ownership(String),
    /// The source and the target have no protocol version in common.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The target already serves a front-end.
    #[error("the target already has a front-end and cannot take another session; start a target without one")]
    FrontEnd,
    /// The source hands over a session, but its PREPARE has none.
    #[error("the source did not describe its session")]
    NoSession,
    /// The endpoint is of an unknown kind or has an invalid path.
    #[error("the target cannot take over the endpoint: {0}")]
    Endpoint(String),
    /// The session does not have two vrings per queue pair.
    #[error("the session has {vrings} vrings for {pairs} queue pairs; it must have two per pair")]
    Vrings {
        /// The session's vrings.
        vrings: usize,
        /// The device's queue pairs.
        pairs: usize,
    },
    /// The session has more memory regions than the target's datapath supports.
    #[error(
        "the front-end shares {regions} memory regions, but the target supports {max}; use a target without --vhost, \
         or raise max_mem_regions of the vhost module"
    )]
    MemoryRegions {
        /// The session's number.
        regions: usize,
        /// The target's limit.
        max: usize,
    },
    /// A memory region is empty, wraps around or overlaps another one.
    #[error("memory region {0} is empty, wraps around or overlaps another one")]
    MemoryRegion(usize),
    /// The dirty log or the inflight region is empty or wraps around.
    #[error("the {0} is empty or wraps around")]
    Region(&'static str),
    /// The vring's size is not a power of two, or too large.
    #[error("vring {vring} has {size} descriptors; the number must be a power of two, at most 32768")]
    VringSize {
        /// The vring.
        vring: usize,
        /// Its size.
        size: u16,
    },
    /// The rings are misaligned, or not in shared memory.
    #[error("the rings of vring {0} are misaligned or not in shared memory")]
    VringAddress(usize),
    /// The target does not know the vring's kind of kick.
    #[error("vring {0} has a kind of kick that the target does not know")]
    VringKick(usize),
    /// The vring is started without a kick.
    #[error("vring {0} is started but not set up")]
    VringStarted(usize),
    /// The COMMIT does not match the staged session.
    #[error("COMMIT does not match the staged session: {0}")]
    Commit(&'static str),
    /// The target failed to set something up.
    #[error("the target cannot use {what}: {text}")]
    Unusable {
        /// What it cannot use.
        what: &'static str,
        /// Why not.
        text: String,
    },
    /// The source failed to hand something over.
    #[error("the source cannot hand over {what}: {text}")]
    Source {
        /// What it cannot hand over.
        what: &'static str,
        /// Why not.
        text: String,
    },
    /// The peer runs as a user that may not hand over here.
    #[error("{0}")]
    User(String),
}

impl Refusal {
    /// Returns the reason's name, which is the same in every version.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AlreadyInitialised => "already-initialised",
            Self::Busy => "busy",
            Self::Purpose(_) => "purpose",
            Self::QueuePairRange(_) => "queue-pair-range",
            Self::QueuePairs { .. } => "queue-pairs",
            Self::VhostFds { .. } => "vhost-fds",
            Self::VhostNet(_) => "vhost-net",
            Self::Features(_) => "features",
            Self::FrontEndFeatures(_) => "front-end-features",
            Self::ProtocolFeatures(_) => "protocol-features",
            Self::VnetHdr(_) => "vnet-hdr",
            Self::HeaderSize { .. } => "header-size",
            Self::Mixed(_) => "mixed-queues",
            Self::TapName(_) => "tap-name",
            Self::Mac => "mac",
            Self::Mtu(_) => "mtu",
            Self::Downscript(_) => "downscript",
            Self::DownscriptUser(_) => "downscript-user",
            Self::DownscriptPlace { .. } => "downscript-place",
            Self::FrameInHand(_) => "frame-in-hand",
            Self::Descriptors(_) => "descriptors",
            Self::Tap(_) => "tap",
            Self::Ownership(_) => "ownership",
            Self::Version(_) => "version",
            Self::FrontEnd => "front-end",
            Self::NoSession => "session",
            Self::Endpoint(_) => "endpoint",
            Self::Vrings { .. } => "vrings",
            Self::MemoryRegions { .. } => "memory-regions",
            Self::MemoryRegion(_) => "memory-region",
            Self::Region(_) => "region",
            Self::VringSize { .. } => "vring-size",
            Self::VringAddress(_) => "vring-address",
            Self::VringKick(_) => "vring-kick",
            Self::VringStarted(_) => "vring-started",
            Self::Commit(_) => "commit",
            Self::Unusable { .. } => "unusable",
            Self::Source { .. } => "source",
            Self::User(_) => "user",
        }
    }
}

impl From<Refusal> for Reason {
    fn from(refusal: Refusal) -> Self {
        Self { name: refusal.name().to_owned(), text: refusal.to_string() }
    }
}

impl From<Refusal> for Reasons {
    fn from(refusal: Refusal) -> Self {
        Self::of([refusal])
    }
}
