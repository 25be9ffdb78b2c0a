//! The control socket's protocol: newline-delimited JSON over a Unix stream socket, one request or reply per line.
//!
//! A request is an object with a `command`: `{"command":"status"}`. A reply is an object specific to the command, or
//! `{"error":"…"}`. Later versions may add commands and fields. A client ignores unknown fields of a reply. In the
//! requests `handover` and `migrate` an unknown field is refused; in the others it is ignored.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::handover::session::report::Report;
use crate::reasons::Reason;

/// The longest request or reply, in bytes, without the newline.
pub const MAX_LINE: usize = 64 * 1024;

/// A client's request to a back-end or a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Returns the process's status: [`BackendStatus`] or [`VmmStatus`].
    Status,
    /// Returns a back-end's counters: [`BackendStats`].
    Stats,
    /// Stops a VM's vCPUs: [`Done`].
    Pause,
    /// Resumes a paused VM: [`Done`].
    Resume,
    /// Hands a back-end's session ([`SessionReport`]) or device ([`HandoverReply`]) over to another back-end.
    Handover {
        /// The target's socket (`--incoming-fds`); absent with `cancel`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
        /// Hand the device over once the front-end has stopped all rings.
        #[serde(default, rename = "on-suspend", skip_serializing_if = "is_false")]
        on_suspend: bool,
        /// Only check whether the hand-over is possible.
        #[serde(default, rename = "dry-run", skip_serializing_if = "is_false")]
        dry_run: bool,
        /// Cancel the hand-over that is under way instead.
        #[serde(default, skip_serializing_if = "is_false")]
        cancel: bool,
    },
    /// Moves a VM to the VMM on this host that waits at `path`: [`MigrationReport`].
    Migrate {
        /// The target's socket (`--incoming`).
        path: PathBuf,
        /// Also move the TAPs of the devices that have `local-migration=on`.
        #[serde(default)]
        local: bool,
        /// Only check whether the VM can move.
        #[serde(default, rename = "dry-run")]
        dry_run: bool,
    },
    /// Ends the process with exit code 0. [`Done`] is sent first.
    Quit,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The reply to [`Request::Handover`]: `{"result":"armed"}`. A refusal names every reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverReply {
    /// The result.
    pub result: HandoverResult,
}

impl HandoverReply {
    /// The device will be offered.
    pub const ARMED: Self = Self { result: HandoverResult::Armed };
    /// The hand-over is possible.
    pub const POSSIBLE: Self = Self { result: HandoverResult::Possible };
    /// The hand-over was cancelled.
    pub const CANCELLED: Self = Self { result: HandoverResult::Cancelled };
}

/// The result in a [`HandoverReply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverResult {
    /// The source offers the device once all rings are stopped.
    Armed,
    /// The target would accept the hand-over.
    Possible,
    /// The hand-over was cancelled; the source keeps what it has.
    Cancelled,
}

/// The outcome of the hand-over of a running session. Every outcome but [`Self::Completed`] leaves the session as it
/// was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum SessionReport {
    /// The target owns the session.
    Completed {
        /// The blackout, in microseconds.
        blackout_us: u64,
        /// The duration of each phase, in microseconds.
        phases: BTreeMap<String, u64>,
    },
    /// The source owns the session and continues it.
    RolledBack {
        /// The phase that failed: `greet`, `check`, `stage`, `freeze` or `commit`.
        phase: String,
        /// Why it failed.
        reason: String,
    },
}

impl SessionReport {
    /// Reports a completed hand-over.
    pub fn completed(report: Report) -> Self {
        let Report { blackout_us, phases } = report;
        let phases = phases.into_iter().map(|(phase, took)| (phase.to_owned(), took));
        Self::Completed { blackout_us, phases: phases.collect() }
    }
}

/// The status of a back-end's hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverStatus {
    /// The state of the hand-over.
    pub state: HandoverState,
    /// The peer, as far as its name is known.
    pub peer: String,
    /// The number of offers so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Why the hand-over failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The state of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverState {
    /// The source and the target check whether the hand-over is possible.
    Checking,
    /// The source will offer the device once all rings are stopped.
    Armed,
    /// The target sets up the session while the source still serves.
    Staging,
    /// The source has offered the device or session.
    Offered,
    /// The target owns the device or session.
    HandedOver,
    /// The operator cancelled; the source is the owner.
    Cancelled,
    /// A dry run: the hand-over is possible.
    Possible,
    /// The hand-over failed; the source is the owner.
    Failed,
    /// The target is ready for an offer.
    Ready,
    /// The target holds the device or session and has not taken it.
    Adopted,
}

/// The reply to a command that returns no data: `{"result":"done"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Always [`DoneResult::Done`].
    pub result: DoneResult,
}

impl Done {
    /// The only value.
    pub const DONE: Self = Self { result: DoneResult::Done };
}

/// The result in [`Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoneResult {
    /// The command was carried out.
    Done,
}

/// The reply to a command that failed or was refused: `{"error":"…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// One line for the operator.
    pub error: String,
}

/// Whether a front-end's connection is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Frontend {
    /// The connection is open.
    Connected,
    /// There is no connection.
    Disconnected,
}

/// The state of a back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendState {
    /// No front-end is connected, or the back-end has no TAP.
    Waiting,
    /// A front-end is connected, and the back-end has its TAP.
    Serving,
    /// Another back-end is staging the session, or the device or session is offered to it.
    HandingOver,
    /// Another back-end owns the device.
    HandedOver,
}

/// What moves the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Datapath {
    /// The back-end's own worker threads.
    Userspace,
    /// The kernel's vhost-net.
    VhostNet,
}

impl std::fmt::Display for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Userspace => "userspace",
            Self::VhostNet => "vhost-net",
        })
    }
}

/// A back-end's reply to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// The state of the back-end.
    pub state: BackendState,
    /// The TAP's interface name; empty while the back-end has none.
    pub tap: String,
    /// The device's number of queue pairs. While that is unknown, the number that the front-end has set up.
    pub queue_pairs: u16,
    /// The virtio features that the front-end acknowledged, in hexadecimal with `0x`; `0x0` before `SET_FEATURES`.
    pub features: String,
    /// The vhost-user protocol features that the front-end acknowledged, in hexadecimal with `0x`.
    pub protocol_features: String,
    /// Whether a front-end is connected.
    pub frontend: Frontend,
    /// What moves the frames.
    pub datapath: Datapath,
    /// Every vring, in the order of the device's virtqueues.
    pub vrings: Vec<VringStatus>,
    /// The hand-over that is under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<HandoverStatus>,
}

/// One vring of a [`BackendStatus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringStatus {
    /// Whether the vring is started (vhost-user: "Ring states").
    pub started: bool,
    /// Whether the vring is enabled (vhost-user: "Ring states").
    pub enabled: bool,
    /// The number of descriptors; 0 before `SET_VRING_NUM`.
    pub size: u16,
}

/// A back-end's reply to [`Request::Stats`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStats {
    /// Every queue pair, in order.
    pub queue_pairs: Vec<QueuePairStats>,
}

/// The counters of one queue pair. They continue across sessions and hand-overs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairStats {
    /// TAP to guest.
    pub rx: DirectionStats,
    /// Guest to TAP.
    pub tx: DirectionStats,
}

/// The counters of one direction of a queue pair. With the kernel's datapath, the counters that only the kernel could
/// keep are absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Frames delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames: Option<u64>,
    /// Bytes delivered, without the virtio-net headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Frames larger than a standard Ethernet frame (1518 bytes), whose segmentation is left to the receiver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub large_frames: Option<u64>,
    /// The largest frame so far, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_frame: Option<u64>,
    /// Frames dropped: the guest's buffer is too small, the TAP rejects the frame, or the descriptor chain is invalid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<u64>,
    /// Frames discarded because the vring is started but disabled. The back-end discards them with either datapath.
    pub discarded: u64,
    /// Notifications from the driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kicks: Option<u64>,
    /// Notifications to the driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
}

/// The state of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmState {
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped.
    Paused,
    /// A migration to another VMM is under way; this VMM still owns the VM.
    Migrating,
    /// Another VMM owns the VM.
    Postmigrate,
    /// The VMM waits for a VM.
    Incoming,
}

/// The outcome of a migration. Every outcome but [`Self::Completed`] leaves the VM as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum MigrationReport {
    /// The target owns the VM.
    Completed {
        /// How long the VM was stopped, in microseconds.
        pause_us: u64,
        /// The duration of each phase.
        phases: MigrationPhases,
    },
    /// The source owns the VM and continues it.
    RolledBack {
        /// The phase that failed: `hello`, `prepare`, `stop`, `restore` or `commit`.
        phase: String,
        /// Why it failed.
        reason: String,
    },
    /// A dry run: the VM can move.
    Possible,
    /// A dry run: the VM cannot move.
    Refused {
        /// All reasons.
        reasons: Vec<Reason>,
    },
}

impl MigrationReport {
    /// Returns whether the request succeeded.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Completed { .. } | Self::Possible)
    }
}

/// The durations of a migration's phases, in microseconds. The VM is stopped in all but the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationPhases {
    /// The target receives guest memory and prepares.
    pub prepare_us: u64,
    /// The vCPUs stop.
    pub stop_vcpus_us: u64,
    /// The back-ends stop the rings.
    pub stop_rings_us: u64,
    /// The back-ends of local devices offer their TAPs.
    pub device_state_us: u64,
    /// The source saves the VM's state.
    pub save_us: u64,
    /// The source sends the state and the target restores it.
    pub restore_us: u64,
    /// The source offers the VM, and the target takes and starts it.
    pub start_us: u64,
}

/// A VMM's reply to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// The state of the VMM.
    pub state: VmmState,
    /// The number of vCPUs.
    pub cpus: u8,
    /// Guest memory, in bytes.
    pub memory: u64,
    /// Every network device, in the order of the command line.
    pub net: Vec<NetStatus>,
    /// The outcome of the last attempt to move this VM away, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationReport>,
}

/// One network device of a [`VmmStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// The path of the vhost-user socket.
    pub socket: String,
    /// Whether the connection to the back-end is open.
    pub backend: Frontend,
    /// The device's number of queue pairs.
    pub queue_pairs: u16,
    /// The number of queue pairs that the guest's driver uses.
    pub active_queue_pairs: u16,
    /// The virtio features that the guest acknowledged, in hexadecimal with `0x`.
    pub features: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_an_object_with_a_command() {
        let status: Request = serde_json::from_str(r#"{"command":"status"}"#).unwrap();
        assert_eq!(status, Request::Status);
        assert_eq!(serde_json::to_string(&Request::Quit).unwrap(), r#"{"command":"quit"}"#);
    }

    #[test]
    fn handover_request_and_reply_have_the_documented_form() {
        let request = Request::Handover {
            path: Some("/run/b".to_owned()),
            on_suspend: true,
            dry_run: false,
            cancel: false,
        };
        let text = r#"{"command":"handover","path":"/run/b","on-suspend":true}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        assert_eq!(serde_json::to_string(&HandoverReply::ARMED).unwrap(), r#"{"result":"armed"}"#);
    }

    #[test]
    fn migrate_options_default_to_false() {
        let text = r#"{"command":"migrate","path":"/run/b"}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::Migrate { path: "/run/b".into(), local: false, dry_run: false });
        let text = r#"{"command":"migrate","path":"/run/b","local":true,"dry-run":true}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::Migrate { path: "/run/b".into(), local: true, dry_run: true });
    }

    #[test]
    fn migration_report_has_the_documented_form() {
        let rolled_back =
            MigrationReport::RolledBack { phase: "restore".to_owned(), reason: "gone".to_owned() };
        assert_eq!(
            serde_json::to_string(&rolled_back).unwrap(),
            r#"{"result":"rolled-back","phase":"restore","reason":"gone"}"#
        );
        assert_eq!(serde_json::to_string(&MigrationReport::Possible).unwrap(), r#"{"result":"possible"}"#);
        let completed = MigrationReport::Completed { pause_us: 7, phases: MigrationPhases::default() };
        let text = serde_json::to_string(&completed).unwrap();
        assert!(
            text.starts_with(r#"{"result":"completed","pause_us":7,"phases":{"prepare_us":0,"#),
            "{text}"
        );
    }

    #[test]
    fn unknown_command_is_refused() {
        serde_json::from_str::<Request>(r#"{"command":"dance"}"#).unwrap_err();
    }

    #[test]
    fn unknown_counter_is_absent() {
        let unknown = DirectionStats { discarded: 7, ..DirectionStats::default() };
        let text = serde_json::to_string(&unknown).unwrap();
        assert_eq!(text, r#"{"discarded":7}"#);
        assert_eq!(serde_json::from_str::<DirectionStats>(&text).unwrap(), unknown);
        let known = DirectionStats { frames: Some(0), ..DirectionStats::default() };
        assert_eq!(serde_json::to_string(&known).unwrap(), r#"{"frames":0,"discarded":0}"#);
    }

    #[test]
    fn datapath_has_the_documented_form() {
        for (datapath, text) in
            [(Datapath::Userspace, r#""userspace""#), (Datapath::VhostNet, r#""vhost-net""#)]
        {
            assert_eq!(serde_json::to_string(&datapath).unwrap(), text);
        }
    }

    #[test]
    fn done_reply_has_the_documented_form() {
        assert_eq!(serde_json::to_string(&Done::DONE).unwrap(), r#"{"result":"done"}"#);
    }
}
