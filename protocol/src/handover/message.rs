//! The packets of a device's hand-over.
//!
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
//! For a front-end that asks for device state, the OFFER comes first, with a `link` for the answers; over a pipe the
//! device goes as DEVICE, without descriptors.

use serde::{Deserialize, Serialize};

use super::state::DeviceState;
use crate::codec::Protocol;
use crate::fd_manifest::FdManifest;
use crate::reasons::Reasons;
use crate::version::Versions;

/// What this build speaks.
pub const PROTOCOL: Protocol =
    Protocol { magic: *b"BATH", versions: Versions { oldest: 1, newest: 1 }, max_body: 128 * 1024 };

/// The descriptor of a TAP's queue.
pub fn tap_fd(pair: usize) -> String {
    format!("tap/{pair}")
}

/// The ownership word's memfd.
pub const OWNERSHIP_FD: &str = "ownership";
/// The memfd of the frames in hand, if there are any.
pub const FRAMES_FD: &str = "frames";
/// A socket for the answers to an offer that came over another one.
pub const LINK_FD: &str = "link";

/// The word in [`Hello::purpose`] for a device.
pub const DEVICE: &str = "device";

/// The first packet each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What is to be handed over: [`DEVICE`].
    pub purpose: String,
    /// Which program says so, and its version: for the log.
    #[serde(default)]
    pub program: String,
    /// Only to find out whether it could be done: nothing will be offered.
    #[serde(default)]
    pub dry_run: bool,
}

/// The device as it is, to be judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// What would be handed over now.
    pub device: DeviceState,
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

crate::messages! {
    /// A packet.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Message: PROTOCOL {
        /// HELLO.
        Hello(Hello) = 1,
        /// REFUSE.
        Refuse(Refuse) = 2,
        /// PREPARE.
        Prepare(Prepare) = 3,
        /// READY.
        Ready(ReadyToTake) = 4,
        /// OFFER.
        Offer(Offer) = 5,
        /// ADOPTED: the target holds the device, and has not touched it.
        Adopted(OfOffer) = 6,
        /// TAKEN: the target owns the device.
        Taken(OfOffer) = 7,
        /// RETRACT: the source owns the device again.
        Retract(OfOffer) = 8,
        /// DEVICE.
        Device(StateOnly) = 9,
    }
}

impl Message {
    /// Its name, for the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "HELLO",
            Self::Refuse(_) => "REFUSE",
            Self::Prepare(_) => "PREPARE",
            Self::Ready(_) => "READY",
            Self::Offer(_) => "OFFER",
            Self::Adopted(_) => "ADOPTED",
            Self::Taken(_) => "TAKEN",
            Self::Retract(_) => "RETRACT",
            Self::Device(_) => "DEVICE",
        }
    }
}
