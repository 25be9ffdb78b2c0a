//! The messages of a VM's migration.
//!
//! ```text
//!   source                                        target
//!     HELLO    what the VM is ─▶
//!         ◀─ HELLO, or REFUSE with all reasons
//!     PREPARE  guest memory, ownership word ─▶    KVM and the back-ends get the memory, and hear of the rings
//!         ◀─ PREPARED, or REFUSE
//!   ── vCPUs and rings are stopped, local devices are saved ──
//!     STATE    all the rest of the VM ─▶          vCPUs, devices; rings get their places, and are not started
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

/// What this build speaks.
pub const PROTOCOL: Protocol =
    Protocol { magic: *b"BATM", versions: Versions { oldest: 1, newest: 1 }, max_body: 4 << 20 };

/// This program, as it names itself to its peer.
pub const PROGRAM: &str = concat!("baton-vmm ", env!("CARGO_PKG_VERSION"));

/// The ownership word's memfd.
pub const OWNERSHIP_FD: &str = "ownership";

/// A region of guest memory.
pub fn ram_fd(region: usize) -> String {
    format!("ram/{region}")
}

/// The target's end of the socket between the back-ends of a local device.
pub fn device_fd(device: usize) -> String {
    format!("device/{device}")
}

/// The source's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which program says so, and its version: for the log.
    #[serde(default)]
    pub program: String,
    /// Only to find out whether it could be done: nothing will move.
    #[serde(default)]
    pub dry_run: bool,
    /// Whether the TAPs of the devices that want it move along.
    pub local: bool,
    /// What would move.
    pub machine: MachineFacts,
}

/// The target would take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Which program says so, and its version: for the log.
    #[serde(default)]
    pub program: String,
}

/// It cannot be done, or could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// Why not.
    pub reasons: Reasons,
}

/// What takes time, and is done while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Where the regions of guest memory lie, in the order of their descriptors.
    pub ram: Vec<RamRegion>,
    /// The descriptors.
    pub fds: FdManifest,
    /// What the driver of each network device has started, if it has: the target's back-ends can be told of it before
    /// the VM stands still. What STATE says is what counts.
    #[serde(default)]
    pub net: Vec<Option<Outline>>,
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// Its guest address.
    pub start: u64,
    /// Its length in bytes: all of its file.
    pub length: u64,
}

/// Done; the VM can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {}

/// The VM, which stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Whether it ran.
    pub running: bool,
    /// What it is.
    pub vm: VmState,
}

/// All is restored; what is left cannot fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {}

/// The word offers the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Of the ownership word.
    pub epoch: u64,
}

/// The target has taken the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// Whether it runs there; else it waits to be resumed.
    pub running: bool,
}

crate::messages! {
    /// A message.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Message: PROTOCOL {
        /// HELLO, the source's.
        Hello(Hello) = 1 "HELLO",
        /// HELLO, the target's.
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
