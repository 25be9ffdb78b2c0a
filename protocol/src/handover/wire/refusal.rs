//! Why a device cannot be handed over: reasons with names that stay, for scripts and for the operator's manual.

use crate::fd_manifest::ManifestError;
use crate::reasons::{Reason, Reasons};
use crate::version::VersionError;

/// One reason. The text says what to do where that is not plain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The target has a TAP.
    #[error("the target has a TAP already and cannot receive another; start one with --incoming-fds")]
    AlreadyInitialised,
    /// The target is busy with another source.
    #[error("the target is in another hand-over")]
    Busy,
    /// The source wants to give something that this target does not take.
    #[error("the target cannot take a {0}")]
    Purpose(String),
    /// No queue pair, or more than a device can have.
    #[error("the source has {0} queue pairs; 1 to 128 are possible")]
    QueuePairRange(usize),
    /// The target was started for another number.
    #[error(
        "the source has {source_pairs} queue pairs, the target {target}; give it the same --queue-pairs, or none"
    )]
    QueuePairs {
        /// The source's.
        source_pairs: usize,
        /// The target's.
        target: usize,
    },
    /// There is not one vhost-net for each pair.
    #[error(
        "the source has {source_pairs} queue pairs, the target's --vhost-fds {fds} descriptors; give it one for each"
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
    /// Features were negotiated that the target does not have.
    #[error(
        "negotiated features {0:#x} are not the target's; use a target with the same datapath and version"
    )]
    Features(u64),
    /// The target's own front-end acknowledged features that the device does not have.
    #[error("the target's front-end acknowledged features {0:#x}, which the device does not have")]
    FrontEndFeatures(u64),
    /// Protocol features were negotiated that the target does not have.
    #[error(
        "negotiated protocol features {0:#x} are not the target's; use a target with the same datapath and version"
    )]
    ProtocolFeatures(u64),
    /// A queue without headers.
    #[error("queue pair {0} has no virtio-net header")]
    VnetHdr(usize),
    /// A header of another size.
    #[error("queue pair {pair} has a virtio-net header of {length} bytes; 10 or 12 are possible")]
    HeaderSize {
        /// The pair.
        pair: usize,
        /// Its header's length.
        length: u16,
    },
    /// Queues of one TAP that do not agree about it.
    #[error("queue pair {0} says something else of the TAP than the first one")]
    Mixed(usize),
    /// A name that no interface has.
    #[error("the TAP's name is not possible: {0:?}")]
    TapName(String),
    /// A MAC address of a group, or all zeroes.
    #[error("the guest's MAC address is not a unicast address")]
    Mac,
    /// Less than IPv4 needs.
    #[error("an MTU of {0} is not possible")]
    Mtu(u16),
    /// Not an absolute path.
    #[error("the downscript {0:?} has no absolute path")]
    Downscript(String),
    /// Of another user.
    #[error(
        "the downscript {0:?} comes from another user, and would not be run; start the source with --downscript=no"
    )]
    DownscriptUser(String),
    /// Of a process in another namespace.
    #[error(
        "the downscript {path:?} would run in {difference}; run the target where the source runs, or start the source \
         with --downscript=no"
    )]
    DownscriptPlace {
        /// The script.
        path: String,
        /// What is not the source's.
        difference: &'static str,
    },
    /// A frame that does not lie in the file of frames, or is none.
    #[error("the frame in hand of queue pair {0} is not where the source says")]
    FrameInHand(usize),
    /// The descriptors are not those that are needed.
    #[error("the descriptors are not those of this device: {0}")]
    Descriptors(#[from] ManifestError),
    /// A descriptor is not what the state says.
    #[error("{0}")]
    Tap(String),
    /// The ownership word cannot be used, or does not offer the device.
    #[error("{0}")]
    Ownership(String),
    /// No version of the protocol in common.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The target serves somebody already.
    #[error("the target has a front-end of its own and cannot take another's session; start one without")]
    FrontEnd,
    /// A source that hands over a session, and says nothing of one.
    #[error("the source says nothing of its session")]
    NoSession,
    /// Front-ends would come in a way that the target does not know, or from nowhere.
    #[error("the target cannot take over where front-ends come from: {0}")]
    Endpoint(String),
    /// Not two for each queue pair.
    #[error("the session has {vrings} vrings, which are not those of {pairs} queue pairs")]
    Vrings {
        /// The session's vrings.
        vrings: usize,
        /// The device's queue pairs.
        pairs: usize,
    },
    /// More memory regions than the target's datapath takes.
    #[error(
        "the front-end shares {regions} memory regions, the target takes {max}; use a target without --vhost, or raise max_mem_regions of the module vhost"
    )]
    MemoryRegions {
        /// The session's.
        regions: usize,
        /// The target's.
        max: usize,
    },
    /// A region that is empty, wraps around or overlaps another one.
    #[error("memory region {0} is empty, wraps around or overlaps another one")]
    MemoryRegion(usize),
    /// A log or an inflight region that cannot be.
    #[error("the {0} wraps around or is empty")]
    Region(&'static str),
    /// Not a power of two, or too large.
    #[error("vring {vring} has {size} descriptors; a power of two up to 32768 is possible")]
    VringSize {
        /// Which vring.
        vring: usize,
        /// Its size.
        size: u16,
    },
    /// Rings that do not lie where rings can, or not in shared memory.
    #[error("the rings of vring {0} are not aligned or not in shared memory")]
    VringAddress(usize),
    /// Its notifications come in a way that the target does not know.
    #[error("vring {0} is kicked in a way that the target does not know")]
    VringKick(usize),
    /// It runs without being set up.
    #[error("vring {0} was started and is not set up")]
    VringStarted(usize),
    /// What is said at last does not go with what was said before.
    #[error("what the source says at last is not of this session: {0}")]
    Commit(&'static str),
    /// The target could not make anything of it.
    #[error("the target cannot use {what}: {text}")]
    Unusable {
        /// Of what.
        what: &'static str,
        /// Why.
        text: String,
    },
    /// The source could not give it.
    #[error("the source cannot give {what}: {text}")]
    Source {
        /// What.
        what: &'static str,
        /// Why not.
        text: String,
    },
    /// The peer is another user's.
    #[error("{0}")]
    User(String),
}

impl Refusal {
    /// The name, which stays the same whatever becomes of the text.
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
