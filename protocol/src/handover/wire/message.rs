//! The packets of a hand-over: of a device, or of a whole session.
//!
//! A device:
//! ```text
//!   source                                   target
//!     HELLO    what is to be handed over ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  the device as it is now ─▶
//!         ◀─ READY, or REFUSE                       armed
//!   ── all rings of the source are stopped ──
//!     OFFER    the device, its descriptors ─▶
//!         ◀─ ADOPTED, or REFUSE
//!   ── a ring of the target starts: the word is swapped ──
//!         ◀─ TAKEN
//!   ── or a ring of the source starts: the word is swapped back ──
//!     RETRACT ─▶                                    armed
//! ```
//! For a front-end that asks for device state, the OFFER comes first, with a `link` for the answers; over a pipe, a
//! file or a stream socket the device goes as DEVICE, without descriptors.
//!
//! A session:
//! ```text
//!   source                                   target
//!     HELLO    what is to be handed over ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  device and session as they are now ─▶
//!         ◀─ READY, or REFUSE
//!   ── the front-end's messages stay in its socket ──
//!     STAGE    both, and the first of their descriptors ─▶
//!     DESCRIPTORS  more of them, in as many packets as STAGE says ─▶
//!         ◀─ STAGED, or REFUSE                      holds all, has touched nothing
//!   ── all rings of the source are stopped, the word offers the session ──
//!     COMMIT   what has changed since STAGE ─▶
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

/// What this build speaks.
pub const PROTOCOL: Protocol =
    Protocol { magic: *b"BATH", versions: Versions { oldest: 1, newest: 1 }, max_body: MAX_BODY };

/// The longest body. With its header it fits into a Unix socket's send buffer, which is 212,992 bytes if nobody has
/// changed that.
const MAX_BODY: usize = 192 * 1024;

/// The descriptor of a TAP's queue.
pub fn tap_fd(pair: usize) -> String {
    format!("tap/{pair}")
}

/// The file of a memory region.
pub fn memory_fd(region: usize) -> String {
    format!("memory/{region}")
}

/// A vring's kick.
pub fn kick_fd(vring: usize) -> String {
    format!("kick/{vring}")
}

/// A vring's call.
pub fn call_fd(vring: usize) -> String {
    format!("call/{vring}")
}

/// A vring's error descriptor.
pub fn error_fd(vring: usize) -> String {
    format!("error/{vring}")
}

/// An instance of vhost-net for a queue pair, in nobody's use.
pub fn vhost_fd(pair: usize) -> String {
    format!("vhost/{pair}")
}

/// The front-end's connection.
pub const FRONTEND_FD: &str = "frontend";
/// The socket that front-ends connect to.
pub const LISTENER_FD: &str = "listener";
/// The file of the log of changed pages.
pub const LOG_FD: &str = "log";
/// The file of the inflight region.
pub const INFLIGHT_FD: &str = "inflight";
/// The ownership word's memfd.
pub const OWNERSHIP_FD: &str = "ownership";
/// The memfd of the frames in hand: of a device if there are any, of a session with room for all.
pub const FRAMES_FD: &str = "frames";
/// A socket for the answers to an offer that came over another one.
pub const LINK_FD: &str = "link";

/// The first packet each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What is to be handed over: the name of a [`Purpose`](crate::handover::prologue::Purpose).
    pub purpose: String,
    /// Which program says so, and its version: for the log.
    #[serde(default)]
    pub program: String,
    /// Only to find out whether it could be done: nothing will be offered.
    #[serde(default)]
    pub dry_run: bool,
    /// The target wants vhost-net and may not open it: the source is to give it an instance for each queue pair.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wants_vhost: bool,
}

/// The device as it is, to be judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// What would be handed over now.
    pub device: DeviceState,
    /// The session with it, if that is what is handed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Box<SessionState>>,
}

/// The target would take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyToTake {}

/// The target would not, or will not, take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// Why not.
    pub reasons: Reasons,
}

/// The device and its descriptors. Nobody uses it from here on, until one takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Of the ownership word.
    pub epoch: u64,
    /// What is offered.
    pub device: DeviceState,
    /// Its descriptors.
    pub fds: FdManifest,
}

/// A word about one offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfOffer {
    /// Which one.
    pub epoch: u64,
}

/// The device without descriptors, for a front-end that moves it with the VM to a back-end with a TAP of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateOnly {
    /// What it is.
    pub device: DeviceState,
}

/// Device and session, which run on, with the first of their descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What is handed over: but for counters, frames in hand and what else COMMIT says.
    pub device: DeviceState,
    /// The session with it, likewise.
    pub session: SessionState,
    /// In how many packets [`Descriptors`] follow.
    pub more: u16,
    /// The first descriptors.
    pub fds: FdManifest,
}

/// More of the descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptors {
    /// Which.
    pub fds: FdManifest,
}

/// The target holds all, and has touched nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedAll {}

/// What has changed since STAGE. Nobody uses the device until the word says who does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Of the ownership word.
    pub epoch: u64,
    /// Each vring of STAGE, in the same order.
    #[serde(deserialize_with = "bounded::list::<MAX_VRINGS, _, _>")]
    pub vrings: Vec<VringNow>,
    /// Each queue pair of STAGE, in the same order.
    #[serde(deserialize_with = "bounded::list::<MAX_QUEUE_PAIRS, _, _>")]
    pub pairs: Vec<PairNow>,
    /// When the source did what.
    #[serde(default)]
    pub times: FreezeTimes,
}

/// The session is the target's, and runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// Of the ownership word.
    pub epoch: u64,
    /// When the target did what.
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
