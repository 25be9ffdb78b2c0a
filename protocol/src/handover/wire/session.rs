//! The wire state of a session. Untrusted until [`validate`](crate::handover::session::validate) has checked it. The
//! negotiated features are part of the [`DeviceState`](super::device::DeviceState).
//!
//! Later versions may add fields with a default; no field may change its meaning. Most fields are omitted while they
//! have their default.

use serde::{Deserialize, Serialize};

use super::device::DirectionCounters;
use super::device::MAX_QUEUE_PAIRS;
use crate::bounded;

/// The most memory regions of a session.
pub const MAX_REGIONS: usize = 509;
/// The most vrings of a session.
pub const MAX_VRINGS: usize = 2 * MAX_QUEUE_PAIRS;
/// The most counters that are read per direction.
const MAX_COUNTERS: usize = 64;

/// Size of one slot in the file `frames`, in bytes; queue pair *n* has slot *n*. A slot holds a virtio-net header of 10
/// bytes, then the frame in hand. No page belongs to two slots.
pub const FRAME_SLOT: u32 = 17 * 4096;

/// Returns whether a field can be omitted.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A session without its descriptors. Any part of it may not be set up yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionState {
    /// The front-end, if one is connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frontend: Option<FrontendState>,
    /// The endpoint.
    pub endpoint: EndpointState,
    /// The shared memory regions, by guest address.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "bounded::list::<MAX_REGIONS, _, _>")]
    pub regions: Vec<RegionState>,
    /// The dirty log (`SET_LOG_BASE`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogState>,
    /// The inflight region (`SET_INFLIGHT_FD`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inflight: Option<InflightState>,
    /// The vrings: 2n receives, 2n + 1 transmits.
    #[serde(deserialize_with = "bounded::list::<MAX_VRINGS, _, _>")]
    pub vrings: Vec<VringState>,
}

/// A connected front-end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FrontendState {
    /// The front-end has sent at least one message.
    pub begun: bool,
    /// Whether the last transfer of device state (`SET_DEVICE_STATE_FD`) succeeded. `None` if there was none, or after
    /// `CHECK_DEVICE_STATE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_state_moved: Option<bool>,
}

/// An endpoint: how front-ends connect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointState {
    /// The kind of endpoint.
    pub kind: EndpointKind,
    /// The socket's absolute path, if the kind has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// The kind of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointKind {
    /// No further front-end can connect.
    #[default]
    None,
    /// The back-end listens at a path, which the last owner unlinks.
    Listening,
    /// The back-end listens on an inherited socket.
    Listener,
    /// The back-end connects to the front-end at a path.
    Client,
    /// A kind of a later version.
    #[serde(other)]
    Other,
}

/// A memory region as the front-end described it. Sizes and offsets are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    /// Guest physical address.
    pub guest_address: u64,
    /// Length.
    pub size: u64,
    /// Address in the front-end's address space.
    pub user_address: u64,
    /// Offset of the region in its file.
    #[serde(default, skip_serializing_if = "is_default")]
    pub file_offset: u64,
    /// How often the front-end has shared the region. QEMU before 8.0 adds and removes it once per queue pair.
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub count: u32,
}

fn once() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_once(count: &u32) -> bool {
    *count == once()
}

/// The position of the dirty log in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub size: u64,
}

/// The position of the inflight region in its file, and its layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub size: u64,
    /// Number of vrings.
    pub queues: u16,
    /// Number of descriptors per vring.
    pub entries: u16,
}

/// A vring. Any part of it may not be set up yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VringState {
    /// `SET_VRING_NUM`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u16>,
    /// `SET_VRING_ADDR`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressesState>,
    /// `SET_VRING_ADDR` with `VHOST_VRING_F_LOG`: the guest address at which writes to the used ring are logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_used: Option<u64>,
    /// The next available index of a stopped vring. COMMIT carries it for a running one.
    #[serde(skip_serializing_if = "is_default")]
    pub base: u16,
    /// `base` is not this session's own position, so the used index may take precedence.
    #[serde(skip_serializing_if = "is_default")]
    pub base_is_given: bool,
    /// `SET_VRING_KICK`.
    #[serde(skip_serializing_if = "is_default")]
    pub kick: KickState,
    /// `SET_VRING_CALL` carried a descriptor.
    #[serde(skip_serializing_if = "is_default")]
    pub call: bool,
    /// `SET_VRING_ERR` carried a descriptor.
    #[serde(skip_serializing_if = "is_default")]
    pub error: bool,
    /// `SET_VRING_ENABLE`.
    #[serde(skip_serializing_if = "is_default")]
    pub enabled: bool,
    /// The vring ran before it was stopped, and the front-end has not set another base since.
    #[serde(skip_serializing_if = "is_default")]
    pub resumes: bool,
    /// The vring has been enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub was_enabled: bool,
    /// The vring is started, and has been enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub started: bool,
    /// The driver wrote invalid data to the ring, which is not served until the front-end stops it.
    #[serde(skip_serializing_if = "is_default")]
    pub broken: bool,
    /// The front-end is pausing this receive vring: it was stopped, or was disabled while vring 0 was disabled.
    #[serde(skip_serializing_if = "is_default")]
    pub paused: bool,
    /// A call is due: it must be signalled even if nothing new was used.
    #[serde(skip_serializing_if = "is_default")]
    pub call_due: bool,
}

/// The addresses of a vring's parts in the front-end's address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressesState {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// The source of a vring's kicks (`SET_VRING_KICK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KickState {
    /// The vring is not set up, or is stopped.
    #[default]
    None,
    /// None: the vring is polled.
    Polled,
    /// An eventfd.
    Fd,
    /// A kind of a later version.
    #[serde(other)]
    Other,
}

/// The part of a vring that changes while it runs, after it was stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VringNow {
    /// The next available index.
    pub base: u16,
    /// `base` is not this session's own position, so the used index may take precedence.
    #[serde(skip_serializing_if = "is_default")]
    pub base_is_given: bool,
    /// The vring is started, and has been enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub started: bool,
    /// The driver wrote invalid data to the ring, which is not served until the front-end stops it.
    #[serde(skip_serializing_if = "is_default")]
    pub broken: bool,
    /// A call is due: it must be signalled even if nothing new was used.
    #[serde(skip_serializing_if = "is_default")]
    pub call_due: bool,
}

/// The part of a queue pair that changes while it runs, after it was stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PairNow {
    /// Length of the frame in hand and its header, in bytes. The frame lies in the pair's [`FRAME_SLOT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frame: Option<u32>,
    /// TAP to guest.
    pub rx: Counters,
    /// Guest to TAP.
    pub tx: Counters,
}

/// [`DirectionCounters`] without field names: frames, bytes, large frames, the largest frame, dropped, discarded,
/// kicks, calls. Missing counters are 0. Later versions append theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counters(#[serde(deserialize_with = "bounded::list::<MAX_COUNTERS, _, _>")] pub Vec<u64>);

impl From<DirectionCounters> for Counters {
    fn from(counters: DirectionCounters) -> Self {
        let DirectionCounters {
            frames,
            bytes,
            large_frames,
            largest_frame,
            dropped,
            discarded,
            kicks,
            calls,
        } = counters;
        Self(vec![frames, bytes, large_frames, largest_frame, dropped, discarded, kicks, calls])
    }
}

impl From<&Counters> for DirectionCounters {
    fn from(counters: &Counters) -> Self {
        let at = |index: usize| counters.0.get(index).copied().unwrap_or_default();
        Self {
            frames: at(0),
            bytes: at(1),
            large_frames: at(2),
            largest_frame: at(3),
            dropped: at(4),
            discarded: at(5),
            kicks: at(6),
            calls: at(7),
        }
    }
}

/// The source's time stamps, in nanoseconds of `CLOCK_MONOTONIC`, which both ends share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FreezeTimes {
    /// The freeze began.
    pub freeze: u64,
    /// All rings were stopped.
    pub stopped: u64,
    /// COMMIT was sent.
    pub sent: u64,
}

/// The target's time stamps, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TakeTimes {
    /// COMMIT was received.
    pub received: u64,
    /// The target's swap had won.
    pub taken: u64,
    /// All rings ran.
    pub running: u64,
}
