//! The messages of a VM's migration.
//!
//! ```text
//!   source                                        target
//!     HELLO    the VM's properties ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  guest memory, ownership word ─▶    KVM and the back-ends map the memory; the back-ends set up the rings
//!         ◀─ PREPARED, or REFUSE
//!   ── vCPUs and rings are stopped, local devices are saved ──
//!     STATE    the rest of the VM's state ─▶      vCPUs and devices are restored; rings get their bases
//!         ◀─ READY, or REFUSE
//!   ── the word is offered: the commit point ──
//!     COMMIT ─▶                                   the word is taken; rings and vCPUs start
//!         ◀─ ACTIVE
//! ```

use serde::{Deserialize, Serialize};

use super::facts::MachineFacts;
use super::state::{Outline, VmState};
use crate::codec::Protocol;
use crate::fd_manifest::FdManifest;
use crate::reasons::Reasons;
use crate::version::Versions;

/// The migration protocol of this build.
pub const PROTOCOL: Protocol =
    Protocol { magic: *b"BATM", versions: Versions { oldest: 1, newest: 1 }, max_body: 4 << 20 };

/// This program's name and version, as sent to the peer.
pub const PROGRAM: &str = concat!("baton-vmm ", env!("CARGO_PKG_VERSION"));

/// The ownership word's memfd.
pub const OWNERSHIP_FD: &str = "ownership";

/// Returns the name of a guest memory region's memfd.
pub fn ram_fd(region: usize) -> String {
    format!("ram/{region}")
}

/// Returns the name of the target's end of the socket pair between the back-ends of a local device.
pub fn device_fd(device: usize) -> String {
    format!("device/{device}")
}

/// The source's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's program and version, for the log.
    #[serde(default)]
    pub program: String,
    /// Only check whether the VM can move: nothing will move.
    #[serde(default)]
    pub dry_run: bool,
    /// Also move the TAPs of the devices that have `local-migration=on`.
    pub local: bool,
    /// The VM's properties.
    pub machine: MachineFacts,
}

/// The target accepts the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The sender's program and version, for the log.
    #[serde(default)]
    pub program: String,
}

/// The target refuses the migration, or failed to carry out its part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// All reasons.
    pub reasons: Reasons,
}

/// The slow preparations, made while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The regions of guest memory, in the order of their descriptors.
    pub ram: Vec<RamRegion>,
    /// The descriptors.
    pub fds: FdManifest,
    /// What the driver of each network device has set up, if anything. The target sets up its back-ends from it before
    /// the VM stops. STATE has precedence.
    #[serde(default)]
    pub net: Vec<Option<Outline>>,
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// The guest address.
    pub start: u64,
    /// The length in bytes, which is that of the whole file.
    pub length: u64,
}

/// The target is prepared; the VM can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {}

/// The state of the stopped VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Whether the VM was running.
    pub running: bool,
    /// The VM's state.
    pub vm: VmState,
}

/// Everything is restored; the remaining steps cannot fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {}

/// The word offers the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The epoch of the ownership word.
    pub epoch: u64,
}

/// The target has taken the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// Whether the VM runs; otherwise it is paused.
    pub running: bool,
}

crate::messages! {
    /// A message.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Message: PROTOCOL {
        /// The source's HELLO.
        Hello(Hello) = 1 "HELLO",
        /// The target's HELLO.
        Welcome(Welcome) = 2 "HELLO",
        /// REFUSE.
        Refuse(Refuse) = 3 "REFUSE",
        /// PREPARE.
        Prepare(Prepare) = 4 "PREPARE",
        /// PREPARED.
        Prepared(Prepared) = 5 "PREPARED",
        /// STATE.
        State(State) = 6 "STATE",
        /// READY.
        Ready(Ready) = 7 "READY",
        /// COMMIT.
        Commit(Commit) = 8 "COMMIT",
        /// ACTIVE.
        Active(Active) = 9 "ACTIVE",
    }
}
