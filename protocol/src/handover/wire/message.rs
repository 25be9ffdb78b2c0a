//! The packets of a hand-over: of a device, or of a whole session.
//!
//! A device:
//! ```text
//!   source                                   target
//!     HELLO    what is to be handed over ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  the current state of the device ─▶
//!         ◀─ READY, or REFUSE                       armed
//!   ── all rings of the source are stopped ──
//!     OFFER    the device and its descriptors ─▶
//!         ◀─ ADOPTED, or REFUSE
//!   ── a ring of the target starts: the word is swapped ──
//!         ◀─ TAKEN
//!   ── or a ring of the source starts: the word is swapped back ──
//!     RETRACT ─▶                                    armed
//! ```
//! When a front-end asks for device state, the OFFER is the first packet and carries a `link` for the answers. Over a
//! pipe, a file or a stream socket the source sends DEVICE instead, without descriptors.
//!
//! A session:
//! ```text
//!   source                                   target
//!     HELLO    what is to be handed over ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  the current state of device and session ─▶
//!         ◀─ READY, or REFUSE
//!   ── the front-end's messages stay in its socket ──
//!     STAGE    device and session, and the first descriptors ─▶
//!     DESCRIPTORS  more descriptors, in as many packets as STAGE says ─▶
//!         ◀─ STAGED, or REFUSE                      holds everything, has touched nothing
//!   ── all rings of the source are stopped, the word offers the session ──
//!     COMMIT   the changes since STAGE ─▶
//!   ── the target's swap ──
//!         ◀─ ACTIVE
//! ```

use serde::{Deserialize, Serialize};

use super::device::{DeviceState, MAX_QUEUE_PAIRS};
use super::session::{FreezeTimes, MAX_VRINGS, PairNow, SessionState, TakeTimes, VringNow, is_default};
use crate::bounded;
use crate::codec::Protocol;
use crate::fd_manifest::FdManifest;
use crate::reasons::Reasons;
use crate::version::Versions;

/// The hand-over protocol of this build.
pub const PROTOCOL: Protocol =
    Protocol { magic: *b"BATH", versions: Versions { oldest: 1, newest: 1 }, max_body: MAX_BODY };

/// The longest body, in bytes. With its header it fits a Unix socket's default send buffer of 212,992 bytes.
const MAX_BODY: usize = 192 * 1024;

/// Returns the name of a TAP queue's descriptor.
pub fn tap_fd(pair: usize) -> String {
    format!("tap/{pair}")
}

/// Returns the name of a memory region's file.
pub fn memory_fd(region: usize) -> String {
    format!("memory/{region}")
}

/// Returns the name of a vring's kick descriptor.
pub fn kick_fd(vring: usize) -> String {
    format!("kick/{vring}")
}

/// Returns the name of a vring's call descriptor.
pub fn call_fd(vring: usize) -> String {
    format!("call/{vring}")
}

/// Returns the name of a vring's error descriptor.
pub fn error_fd(vring: usize) -> String {
    format!("error/{vring}")
}

/// Returns the name of a queue pair's vhost-net instance, which has no owner yet.
pub fn vhost_fd(pair: usize) -> String {
    format!("vhost/{pair}")
}

/// The front-end's connection.
pub const FRONTEND_FD: &str = "frontend";
/// The listening socket.
pub const LISTENER_FD: &str = "listener";
/// The file of the dirty log.
pub const LOG_FD: &str = "log";
/// The file of the inflight region.
pub const INFLIGHT_FD: &str = "inflight";
/// The ownership word's memfd.
pub const OWNERSHIP_FD: &str = "ownership";
/// The memfd of the frames in hand. A device brings it only if there are any; a session always does, with one
/// [`FRAME_SLOT`](super::session::FRAME_SLOT) per queue pair.
pub const FRAMES_FD: &str = "frames";
/// A socket for the answers to an offer that is sent over another socket.
pub const LINK_FD: &str = "link";

/// The first packet each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What is to be handed over: the name of a [`Purpose`](crate::handover::prologue::Purpose).
    pub purpose: String,
    /// The sender's program and version, for the log.
    #[serde(default)]
    pub program: String,
    /// Only check whether the hand-over is possible: nothing will be offered.
    #[serde(default)]
    pub dry_run: bool,
    /// The target uses vhost-net but may not open it: the source provides an instance per queue pair.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wants_vhost: bool,
}

/// The current state, for the target to check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The device.
    pub device: DeviceState,
    /// The session, if a session is handed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Box<SessionState>>,
}

/// The target accepts what PREPARE describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyToTake {}

/// The target refuses the hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// All reasons.
    pub reasons: Reasons,
}

/// The device and its descriptors. Neither process uses the device until one takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The epoch of the ownership word.
    pub epoch: u64,
    /// The device.
    pub device: DeviceState,
    /// Its descriptors.
    pub fds: FdManifest,
}

/// The offer that a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfOffer {
    /// The offer's epoch.
    pub epoch: u64,
}

/// The device without descriptors, for a front-end that moves it with the VM to a back-end that has its own TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateOnly {
    /// The device.
    pub device: DeviceState,
}

/// The device and the session, which still run, with the first descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The device, without the frames in hand, which COMMIT carries. COMMIT also replaces the counters. A survivor has no
    /// COMMIT and continues from these.
    pub device: DeviceState,
    /// The session, without the values that COMMIT carries.
    pub session: SessionState,
    /// The number of [`Descriptors`] packets that follow.
    pub more: u16,
    /// The first descriptors.
    pub fds: FdManifest,
}

/// More descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptors {
    /// The descriptors of this packet.
    pub fds: FdManifest,
}

/// The target holds everything, and has touched nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedAll {}

/// The changes since STAGE. Neither process uses the device until the word decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The epoch of the ownership word.
    pub epoch: u64,
    /// Each vring of STAGE, in the same order.
    #[serde(deserialize_with = "bounded::list::<MAX_VRINGS, _, _>")]
    pub vrings: Vec<VringNow>,
    /// Each queue pair of STAGE, in the same order.
    #[serde(deserialize_with = "bounded::list::<MAX_QUEUE_PAIRS, _, _>")]
    pub pairs: Vec<PairNow>,
    /// The source's time stamps.
    #[serde(default)]
    pub times: FreezeTimes,
}

/// The target owns and runs the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// The epoch of the ownership word.
    pub epoch: u64,
    /// The target's time stamps.
    #[serde(default)]
    pub times: TakeTimes,
}

crate::messages! {
    /// A packet.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Message: PROTOCOL {
        /// HELLO.
        Hello(Hello) = 1 "HELLO",
        /// REFUSE.
        Refuse(Refuse) = 2 "REFUSE",
        /// PREPARE.
        Prepare(Prepare) = 3 "PREPARE",
        /// READY.
        Ready(ReadyToTake) = 4 "READY",
        /// OFFER.
        Offer(Offer) = 5 "OFFER",
        /// ADOPTED: the target holds the device, and has not touched it.
        Adopted(OfOffer) = 6 "ADOPTED",
        /// TAKEN: the target owns the device.
        Taken(OfOffer) = 7 "TAKEN",
        /// RETRACT: the source owns the device again.
        Retract(OfOffer) = 8 "RETRACT",
        /// DEVICE.
        Device(StateOnly) = 9 "DEVICE",
        /// STAGE.
        Stage(Box<Stage>) = 10 "STAGE",
        /// DESCRIPTORS.
        Descriptors(Descriptors) = 11 "DESCRIPTORS",
        /// STAGED.
        Staged(StagedAll) = 12 "STAGED",
        /// COMMIT.
        Commit(Commit) = 13 "COMMIT",
        /// ACTIVE.
        Active(Active) = 14 "ACTIVE",
    }
}
