//! What a back-end says of its network device. Untrusted and of no effect: [`validate`](crate::handover::device::validate) checks it.
//!
//! Fields may be added, with a default; none may change its meaning. A field that is absent has its default, which the
//! check of an offer refuses wherever the field matters; without descriptors a reader needs the features only.

use serde::{Deserialize, Serialize};

use crate::bounded;

/// The most queue pairs of a device.
pub const MAX_QUEUE_PAIRS: usize = 128;

/// A network device without its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceState {
    /// The TAP's interface name; empty where the source has none.
    pub tap: String,
    /// Every queue pair, in order.
    #[serde(deserialize_with = "bounded::list::<MAX_QUEUE_PAIRS, _, _>")]
    pub queue_pairs: Vec<QueuePairState>,
    /// The virtio features that the front-end acknowledged; 0 before it did.
    pub features: u64,
    /// The vhost-user protocol features that it acknowledged.
    pub protocol_features: u64,
    /// The guest's MAC address (`--mac`).
    pub mac: Option<[u8; 6]>,
    /// The guest's MTU (`--mtu`).
    pub mtu: Option<u16>,
    /// The TAP's send buffer in bytes (`--sndbuf`).
    pub sndbuf: Option<u32>,
    /// The program that the last owner runs at the end (`--downscript`), by its absolute path.
    pub downscript: Option<String>,
    /// Where the source would run it; of a source that does not tell, anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downscript_place: Option<Place>,
    /// Who moves the frames.
    pub datapath: Datapath,
    /// How long workers look for work before they wait, in microseconds.
    pub poll_us: u32,
}

/// What decides which interface and which program a name means to a process (namespaces(7)). The numbers are those of
/// this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Inode number of its network namespace.
    pub net: u64,
    /// Inode number of its mount namespace.
    pub mnt: u64,
    /// Device and inode number of its root directory.
    pub root: (u64, u64),
}

/// Who moves the frames, as far as this version knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Datapath {
    /// The back-end's own workers.
    #[default]
    Userspace,
    /// The kernel's vhost-net.
    VhostNet,
    /// Another one, of a later version.
    #[serde(other)]
    Other,
}

/// One queue pair, with what the TAP's queue is set to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueuePairState {
    /// Each frame has a virtio-net header before it.
    pub using_vnet_hdr: bool,
    /// The kernel's TAP does UDP fragmentation offload.
    pub has_ufo: bool,
    /// The kernel's TAP does UDP segmentation offload.
    pub has_uso: bool,
    /// The kernel's TAP does UDP tunnel segmentation offload.
    pub has_tunnel: bool,
    /// The kernel gives frames to this queue.
    pub enabled: bool,
    /// Length of the virtio-net header, in bytes.
    pub host_vnet_hdr_len: u16,
    /// A frame that was read from the TAP and not delivered yet.
    pub frame_in_hand: Option<FrameExtent>,
    /// TAP to guest.
    pub rx: DirectionCounters,
    /// Guest to TAP.
    pub tx: DirectionCounters,
}

/// Where a frame lies in the file `frames`: a virtio-net header of 10 bytes, then the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameExtent {
    /// Offset of its header.
    pub offset: u64,
    /// Length of header and frame.
    pub length: u32,
}

/// What was counted in one direction of a queue pair so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectionCounters {
    /// Frames delivered.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames larger than a standard Ethernet frame.
    pub large_frames: u64,
    /// The largest frame.
    pub largest_frame: u64,
    /// Frames given up.
    pub dropped: u64,
    /// Frames discarded because the vring was disabled.
    pub discarded: u64,
    /// Notifications received.
    pub kicks: u64,
    /// Notifications sent.
    pub calls: u64,
}
