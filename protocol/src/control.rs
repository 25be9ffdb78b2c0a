//! The control socket's protocol: newline-delimited JSON over a Unix stream socket, one request a line, one
//! reply a line.
//!
//! A request is an object with a `command`: `{"command":"status"}`. A reply is the command's own object, or
//! `{"error":"…"}`. Commands and fields may be added; a reader ignores the fields that it does not know.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::handover::session::report::Report;
use crate::reasons::Reason;

/// The longest request or reply, in bytes, without its newline.
pub const MAX_LINE: usize = 64 * 1024;

/// What a client asks of a back-end or of a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the process is and does: [`BackendStatus`] or [`VmmStatus`].
    Status,
    /// A back-end's counters: [`BackendStats`].
    Stats,
    /// Stops a VM's vCPUs: [`Done`].
    Pause,
    /// Lets a paused VM run: [`Done`].
    Resume,
    /// Hands a back-end's session over to another one: [`SessionReport`]; or its device: [`HandoverReply`].
    Handover {
        /// Where the other one waits (`--incoming-fds`); nothing with `cancel`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
        /// When the front-end has stopped all rings.
        #[serde(default, rename = "on-suspend", skip_serializing_if = "is_false")]
        on_suspend: bool,
        /// Only find out whether it could be done.
        #[serde(default, rename = "dry-run", skip_serializing_if = "is_false")]
        dry_run: bool,
        /// End the hand-over that is under way instead.
        #[serde(default, skip_serializing_if = "is_false")]
        cancel: bool,
    },
    /// Moves a VM to another VMM on this host, which waits for it at `path`: [`MigrationReport`].
    Migrate {
        /// The target's socket (`--incoming`).
        path: PathBuf,
        /// Whether the TAPs move along, of the devices that want it.
        #[serde(default)]
        local: bool,
        /// Only to find out whether it could.
        #[serde(default, rename = "dry-run")]
        dry_run: bool,
    },
    /// Ends the process with exit code 0: [`Done`], sent before it ends.
    Quit,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The answer to [`Request::Handover`]: `{"result":"armed"}`. A refusal names every reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverReply {
    /// What was done.
    pub result: HandoverResult,
}

impl HandoverReply {
    /// It will be offered.
    pub const ARMED: Self = Self { result: HandoverResult::Armed };
    /// It could be.
    pub const POSSIBLE: Self = Self { result: HandoverResult::Possible };
    /// It will not be.
    pub const CANCELLED: Self = Self { result: HandoverResult::Cancelled };
}

/// The word in [`HandoverReply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverResult {
    /// The device is offered when all rings are stopped.
    Armed,
    /// The target would take it.
    Possible,
    /// The device stays.
    Cancelled,
}

/// How a hand-over of a running session ended. All but [`Self::Completed`] leave the session as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum SessionReport {
    /// The session is the target's.
    Completed {
        /// For how long nobody served, in microseconds.
        blackout_us: u64,
        /// What each phase took, in microseconds.
        phases: BTreeMap<String, u64>,
    },
    /// The session is the source's, and goes on.
    RolledBack {
        /// How far it was: `greet`, `check`, `stage`, `freeze` or `commit`.
        phase: String,
        /// What happened.
        reason: String,
    },
}

impl SessionReport {
    /// The session is the target's.
    pub fn completed(report: Report) -> Self {
        let Report { blackout_us, phases } = report;
        let phases = phases.into_iter().map(|(phase, took)| (phase.to_owned(), took));
        Self::Completed { blackout_us, phases: phases.collect() }
    }
}

/// How a hand-over of a back-end's device stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverStatus {
    /// Where it stands.
    pub state: HandoverState,
    /// The other side, as far as it has a name.
    pub peer: String,
    /// How often the device was offered so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where a hand-over stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverState {
    /// Both sides find out whether it can be done.
    Checking,
    /// The source will offer the device.
    Armed,
    /// The target makes everything ready for a session that runs on.
    Staging,
    /// The source has offered it.
    Offered,
    /// The target has it.
    HandedOver,
    /// The device is the source's, by the operator's wish.
    Cancelled,
    /// It could be done; nothing else was asked.
    Possible,
    /// The device is the source's.
    Failed,
    /// The target would take the device.
    Ready,
    /// The target holds the device, and has not taken it.
    Adopted,
}

/// The answer to a command that gives nothing back: `{"result":"done"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Always [`DoneResult::Done`].
    pub result: DoneResult,
}

impl Done {
    /// The only value.
    pub const DONE: Self = Self { result: DoneResult::Done };
}

/// The word in [`Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoneResult {
    /// The command was carried out.
    Done,
}

/// The answer to a command that was not carried out: `{"error":"…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// One line for the operator.
    pub error: String,
}

/// Whether a front-end's connection is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Frontend {
    /// A session is under way.
    Connected,
    /// None is.
    Disconnected,
}

/// What a back-end is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendState {
    /// No front-end is connected.
    Waiting,
    /// A front-end is connected.
    Serving,
    /// The device is offered to another back-end; nobody uses the TAP.
    HandingOver,
    /// The device is another back-end's.
    HandedOver,
}

/// Who moves the frames.
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

/// A back-end's answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// What it is doing.
    pub state: BackendState,
    /// The TAP's interface name; empty while the back-end has none.
    pub tap: String,
    /// How many queue pairs the device has; how many the front-end has set up while that is not known.
    pub queue_pairs: u16,
    /// The virtio features that the front-end acknowledged, in hexadecimal with `0x`; `0x0` before it did.
    pub features: String,
    /// The vhost-user protocol features that the front-end acknowledged, in hexadecimal with `0x`.
    pub protocol_features: String,
    /// Whether a front-end is connected.
    pub frontend: Frontend,
    /// Who moves the frames.
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
    /// Kicked since it was set up, and not stopped since.
    pub started: bool,
    /// `SET_VRING_ENABLE` (vhost-user: "Ring states").
    pub enabled: bool,
    /// How many descriptors the front-end gave it; 0 before it did.
    pub size: u16,
}

/// A back-end's answer to [`Request::Stats`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStats {
    /// Every queue pair, in order.
    pub queue_pairs: Vec<QueuePairStats>,
}

/// The counters of one queue pair since the process started; they run on across sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairStats {
    /// TAP to guest.
    pub rx: DirectionStats,
    /// Guest to TAP.
    pub tx: DirectionStats,
}

/// The counters of one direction of a queue pair. Those that are known only to whom moves the frames are absent where
/// that is the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Frames delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames: Option<u64>,
    /// Their bytes, without the virtio-net header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Frames larger than a standard Ethernet frame (1518 bytes): segmentation left to the other side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub large_frames: Option<u64>,
    /// The largest frame so far, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_frame: Option<u64>,
    /// Frames given up: the guest's buffer too small, the TAP's refusal, an invalid descriptor chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<u64>,
    /// Frames discarded because the vring is started but disabled: the back-end itself does that, whoever moves the
    /// others.
    pub discarded: u64,
    /// Notifications from the front-end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kicks: Option<u64>,
    /// Notifications to the front-end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
}

/// What a VMM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmState {
    /// The vCPUs run.
    Running,
    /// The vCPUs stand still.
    Paused,
    /// The VM is being moved to another VMM, and still this one's.
    Migrating,
    /// The VM is another VMM's.
    Postmigrate,
    /// The VM has yet to come.
    Incoming,
}

/// How a migration ended. All but [`Self::Completed`] and [`Self::Possible`] leave the VM as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum MigrationReport {
    /// The VM is the target's.
    Completed {
        /// How long it stood still, in microseconds.
        pause_us: u64,
        /// How long what took.
        phases: MigrationPhases,
    },
    /// The VM is the source's, and goes on.
    RolledBack {
        /// What was being done: `hello`, `prepare`, `stop`, `restore` or `commit`.
        phase: String,
        /// What happened.
        reason: String,
    },
    /// The VM could move.
    Possible,
    /// The VM cannot move.
    Refused {
        /// All reasons.
        reasons: Vec<Reason>,
    },
}

impl MigrationReport {
    /// Whether what was asked for was done.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Completed { .. } | Self::Possible)
    }
}

/// How long the phases of a migration took, in microseconds. The VM stands still in all but the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationPhases {
    /// The target got guest memory and was made ready.
    pub prepare_us: u64,
    /// The vCPUs stopped.
    pub stop_vcpus_us: u64,
    /// The back-ends left the rings.
    pub stop_rings_us: u64,
    /// The back-ends of local devices offered their TAPs.
    pub device_state_us: u64,
    /// The VM's state was taken.
    pub save_us: u64,
    /// The state was sent, and restored at the target.
    pub restore_us: u64,
    /// The VM was offered, taken and started.
    pub start_us: u64,
}

/// A VMM's answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// What it is doing.
    pub state: VmmState,
    /// How many vCPUs the VM has.
    pub cpus: u8,
    /// Guest memory, in bytes.
    pub memory: u64,
    /// Every network device, in the order of the command line.
    pub net: Vec<NetStatus>,
    /// How the last attempt to move this VM away ended, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationReport>,
}

/// One network device of a [`VmmStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// The vhost-user socket's path.
    pub socket: String,
    /// Whether its back-end's connection is open.
    pub backend: Frontend,
    /// How many queue pairs the device has.
    pub queue_pairs: u16,
    /// How many of them the guest's driver uses.
    pub active_queue_pairs: u16,
    /// The virtio features that the guest acknowledged, in hexadecimal with `0x`.
    pub features: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_an_object_with_a_command() {
        let status: Request = serde_json::from_str(r#"{"command":"status"}"#).unwrap();
        assert_eq!(status, Request::Status);
        assert_eq!(serde_json::to_string(&Request::Quit).unwrap(), r#"{"command":"quit"}"#);
    }

    #[test]
    fn a_hand_over_reads_as_documented() {
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
    fn a_migration_is_asked_for_by_its_path() {
        let text = r#"{"command":"migrate","path":"/run/b"}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::Migrate { path: "/run/b".into(), local: false, dry_run: false });
        let text = r#"{"command":"migrate","path":"/run/b","local":true,"dry-run":true}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::Migrate { path: "/run/b".into(), local: true, dry_run: true });
    }

    #[test]
    fn migrations_end_as_documented() {
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
    fn an_unknown_command_is_refused() {
        serde_json::from_str::<Request>(r#"{"command":"dance"}"#).unwrap_err();
    }

    #[test]
    fn a_counter_that_nobody_has_is_absent() {
        let unknown = DirectionStats { discarded: 7, ..DirectionStats::default() };
        let text = serde_json::to_string(&unknown).unwrap();
        assert_eq!(text, r#"{"discarded":7}"#);
        assert_eq!(serde_json::from_str::<DirectionStats>(&text).unwrap(), unknown);
        let known = DirectionStats { frames: Some(0), ..DirectionStats::default() };
        assert_eq!(serde_json::to_string(&known).unwrap(), r#"{"frames":0,"discarded":0}"#);
    }

    #[test]
    fn datapaths_read_as_documented() {
        for (datapath, text) in
            [(Datapath::Userspace, r#""userspace""#), (Datapath::VhostNet, r#""vhost-net""#)]
        {
            assert_eq!(serde_json::to_string(&datapath).unwrap(), text);
        }
    }

    #[test]
    fn done_reads_as_documented() {
        assert_eq!(serde_json::to_string(&Done::DONE).unwrap(), r#"{"result":"done"}"#);
    }
}
