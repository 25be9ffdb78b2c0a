//! What a back-end says of its session with a front-end. Untrusted and of no effect:
//! [`validate`](crate::handover::session::validate) checks it. The features that were negotiated are the device's ([`super::device::DeviceState`]).
//!
//! Fields may be added, with a default; none may change its meaning. What has its default is not written.

use serde::{Deserialize, Serialize};

use super::device::DirectionCounters;
use super::device::MAX_QUEUE_PAIRS;
use crate::bounded;

/// The most memory regions of a session.
pub const MAX_REGIONS: usize = 509;
/// The most vrings of a session.
pub const MAX_VRINGS: usize = 2 * MAX_QUEUE_PAIRS;
/// The most counters of a direction that are read.
const MAX_COUNTERS: usize = 64;

/// Room for one frame in hand in the file `frames`, in bytes: pair *n*'s begins at *n* times that. A virtio-net header
/// of 10 bytes, then the frame; no page belongs to two pairs.
pub const FRAME_SLOT: u32 = 17 * 4096;

/// Whether a field need not be written.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A session, or what there is of one, without its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionState {
    /// The front-end, if one is connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frontend: Option<FrontendState>,
    /// Where front-ends come from.
    pub endpoint: EndpointState,
    /// The shared memory, by guest address.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "bounded::list::<MAX_REGIONS, _, _>")]
    pub regions: Vec<RegionState>,
    /// The log of changed pages (`SET_LOG_BASE`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogState>,
    /// The region in which chains are noted (`SET_INFLIGHT_FD`).
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
    /// It has said something.
    pub begun: bool,
    /// Whether the transfer of device state succeeded that it asked for last (`SET_DEVICE_STATE_FD`), until it asks
    /// (`CHECK_DEVICE_STATE`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_state_moved: Option<bool>,
}

/// Where front-ends come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointState {
    /// In which way.
    pub kind: EndpointKind,
    /// The socket's absolute path, for those that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// In which way front-ends come, as far as this version knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointKind {
    /// No other one will come.
    #[default]
    None,
    /// They connect to a path; the last owner unlinks it.
    Listening,
    /// They connect to an inherited socket.
    Listener,
    /// They are connected to, at a path.
    Client,
    /// In another one, of a later version.
    #[serde(other)]
    Other,
}

/// A memory region, as the front-end described it; sizes and offsets in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    /// Guest physical address.
    pub guest_address: u64,
    /// Length.
    pub size: u64,
    /// Address in the front-end's own address space.
    pub user_address: u64,
    /// Offset of the region's start in its file.
    #[serde(default, skip_serializing_if = "is_default")]
    pub file_offset: u64,
    /// How often it was shared.
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

/// Where the log of changed pages lies in its file, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    /// Its start.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

/// Where the inflight region lies in its file, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    /// Its start, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub size: u64,
    /// For how many vrings.
    pub queues: u16,
    /// For how many descriptors of each.
    pub entries: u16,
}

/// A vring, whole or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VringState {
    /// `SET_VRING_NUM`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u16>,
    /// `SET_VRING_ADDR`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressesState>,
    /// `SET_VRING_ADDR` with `VRING_F_LOG`: the guest address under which writes to the used ring are noted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_used: Option<u64>,
    /// The next available index, if the vring does not run: one that runs has it said by COMMIT.
    #[serde(skip_serializing_if = "is_default")]
    pub base: u16,
    /// It is the front-end's word, who may be behind.
    #[serde(skip_serializing_if = "is_default")]
    pub base_is_given: bool,
    /// `SET_VRING_KICK`.
    #[serde(skip_serializing_if = "is_default")]
    pub kick: KickState,
    /// `SET_VRING_CALL` came with a descriptor.
    #[serde(skip_serializing_if = "is_default")]
    pub call: bool,
    /// `SET_VRING_ERR` came with a descriptor.
    #[serde(skip_serializing_if = "is_default")]
    pub error: bool,
    /// `SET_VRING_ENABLE`.
    #[serde(skip_serializing_if = "is_default")]
    pub enabled: bool,
    /// It ran before it was stopped, and the front-end has not given it another place since.
    #[serde(skip_serializing_if = "is_default")]
    pub resumes: bool,
    /// It has been enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub was_enabled: bool,
    /// It is started, and was enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub started: bool,
    /// What the guest wrote made no sense.
    #[serde(skip_serializing_if = "is_default")]
    pub broken: bool,
    /// Disabled while the first receive ring was.
    #[serde(skip_serializing_if = "is_default")]
    pub paused: bool,
    /// Its call is to be signalled, whatever there is to tell.
    #[serde(skip_serializing_if = "is_default")]
    pub call_due: bool,
}

/// Where the three rings lie, in the front-end's own address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressesState {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// Where a vring's notifications come from, as far as this version knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KickState {
    /// It was not set up, or is stopped.
    #[default]
    None,
    /// Nowhere: the ring is polled.
    Polled,
    /// An eventfd.
    Fd,
    /// Somewhere else, in a later version.
    #[serde(other)]
    Other,
}

/// What of a vring changes while it runs, as it is now that it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VringNow {
    /// The next available index.
    pub base: u16,
    /// It is the front-end's word, who may be behind.
    #[serde(skip_serializing_if = "is_default")]
    pub base_is_given: bool,
    /// It is started, and was enabled in this session.
    #[serde(skip_serializing_if = "is_default")]
    pub started: bool,
    /// What the guest wrote made no sense.
    #[serde(skip_serializing_if = "is_default")]
    pub broken: bool,
    /// Its call is to be signalled, whatever there is to tell.
    #[serde(skip_serializing_if = "is_default")]
    pub call_due: bool,
}

/// What of a queue pair changes while it runs, as it is now that it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PairNow {
    /// Length of the frame in hand with its header, which lies in the pair's [`FRAME_SLOT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frame: Option<u32>,
    /// TAP to guest.
    pub rx: Counters,
    /// Guest to TAP.
    pub tx: Counters,
}

/// [`DirectionCounters`] without their names: frames, bytes, large frames, the largest frame, dropped, discarded,
/// kicks, calls. Those that are missing are 0; later versions add theirs behind.
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

/// When the source did what, in nanoseconds of `CLOCK_MONOTONIC`, which is one for both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FreezeTimes {
    /// It began to stop its rings.
    pub freeze: u64,
    /// All were stopped.
    pub stopped: u64,
    /// COMMIT went out.
    pub sent: u64,
}

/// When the target did what, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TakeTimes {
    /// COMMIT was there.
    pub received: u64,
    /// The word was the target's.
    pub taken: u64,
    /// Its rings ran.
    pub running: u64,
}
