//! The wire state of a network device. Untrusted until [`validate`](crate::handover::device::validate) has checked it.
//!
//! Later versions may add fields with a default; no field may change its meaning. An absent field has its default. The
//! check of an offer refuses that default wherever the field is required. Without descriptors only the features matter.

use serde::{Deserialize, Serialize};

use super::session::is_default;
use crate::bounded;

/// The most queue pairs of a device.
pub const MAX_QUEUE_PAIRS: usize = 128;

/// A network device without its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceState {
    /// The TAP's interface name; empty if the source has no TAP.
    pub tap: String,
    /// Every queue pair, in order.
    #[serde(deserialize_with = "bounded::list::<MAX_QUEUE_PAIRS, _, _>")]
    pub queue_pairs: Vec<QueuePairState>,
    /// The virtio features that the front-end acknowledged; 0 before `SET_FEATURES`.
    pub features: u64,
    /// The vhost-user protocol features that the front-end acknowledged.
    pub protocol_features: u64,
    /// The guest's MAC address (`--mac`).
    pub mac: Option<[u8; 6]>,
    /// The guest's MTU (`--mtu`).
    pub mtu: Option<u16>,
    /// The TAP's send buffer in bytes (`--sndbuf`).
    pub sndbuf: Option<u32>,
    /// The absolute path of the program that the last owner runs when it ends (`--downscript`).
    pub downscript: Option<String>,
    /// Where the source would run the downscript. If absent, the place is not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downscript_place: Option<Place>,
    /// What moves the frames.
    pub datapath: Datapath,
    /// How long a worker polls before it sleeps, in microseconds; 0 with `poll_auto`.
    pub poll_us: u32,
    /// A worker polls as long as that pays.
    #[serde(default, skip_serializing_if = "is_default")]
    pub poll_auto: bool,
}

/// Where a process runs a script: the namespaces and the root that decide which interface and which program a name
/// refers to (namespaces(7)). The numbers are only valid on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Inode number of the network namespace.
    pub net: u64,
    /// Inode number of the mount namespace.
    pub mnt: u64,
    /// Device and inode number of the root directory.
    pub root: (u64, u64),
}

/// What moves the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Datapath {
    /// The back-end's own workers.
    #[default]
    Userspace,
    /// The kernel's vhost-net.
    VhostNet,
    /// A datapath of a later version.
    #[serde(other)]
    Other,
}

/// One queue pair, with the settings of its TAP queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueuePairState {
    /// Each frame is preceded by a virtio-net header (`IFF_VNET_HDR`).
    pub using_vnet_hdr: bool,
    /// The kernel's TAP supports UDP fragmentation offload.
    pub has_ufo: bool,
    /// The kernel's TAP supports UDP segmentation offload.
    pub has_uso: bool,
    /// The kernel's TAP supports UDP tunnel segmentation offload.
    pub has_tunnel: bool,
    /// The queue is attached: the kernel delivers frames to it.
    pub enabled: bool,
    /// Length of the virtio-net header, in bytes.
    pub host_vnet_hdr_len: u16,
    /// The frame in hand: read from the TAP and not delivered yet.
    pub frame_in_hand: Option<FrameExtent>,
    /// TAP to guest.
    pub rx: DirectionCounters,
    /// Guest to TAP.
    pub tx: DirectionCounters,
}

/// The position of a frame in the file `frames`: a virtio-net header of 10 bytes, then the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameExtent {
    /// Offset of the header, in bytes.
    pub offset: u64,
    /// Length of header and frame, in bytes.
    pub length: u32,
}

/// The counters of one direction of a queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectionCounters {
    /// Frames delivered.
    pub frames: u64,
    /// Bytes delivered.
    pub bytes: u64,
    /// Frames larger than a standard Ethernet frame.
    pub large_frames: u64,
    /// The largest frame, in bytes.
    pub largest_frame: u64,
    /// Frames dropped.
    pub dropped: u64,
    /// Frames discarded because the vring was disabled.
    pub discarded: u64,
    /// Notifications received.
    pub kicks: u64,
    /// Notifications sent.
    pub calls: u64,
}
