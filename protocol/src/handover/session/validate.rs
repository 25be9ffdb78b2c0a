//! Checks a source's session and COMMIT before the target acts on them. Only this module constructs [`CheckedSession`]
//! and [`CheckedCommit`]. A failed check reports all reasons, not just the first.

use crate::handover::device::validate::{self, CheckedDevice, FRAME_HEADER, MAX_FRAME};
use crate::handover::wire::device::DeviceState;
use crate::handover::wire::message::{
    Commit, FRAMES_FD, FRONTEND_FD, INFLIGHT_FD, LISTENER_FD, LOG_FD, OWNERSHIP_FD, call_fd, error_fd,
    kick_fd, memory_fd, tap_fd, vhost_fd,
};
use crate::handover::wire::refusal::Refusal;
use crate::handover::wire::session::{
    EndpointKind, EndpointState, FRAME_SLOT, KickState, RegionState, SessionState, VringState,
};
use crate::ownership::Word;
use crate::reasons::Reasons;

/// The longest path of a Unix socket, in bytes.
const MAX_PATH: usize = 107;
/// The largest split virtqueue (virtio 1.2 §2.7).
const MAX_SIZE: u16 = 32768;
const _: () = assert!(MAX_FRAME <= FRAME_SLOT, "a slot has room for every frame");

/// What a target supports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What it supports for the device.
    pub device: validate::Capabilities,
    /// The most memory regions.
    pub max_regions: usize,
    /// The target already serves a front-end.
    pub has_frontend: bool,
}

/// A session that the target can take, provided that its descriptors are valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedSession {
    device: CheckedDevice,
    session: SessionState,
}

impl CheckedSession {
    /// Returns the device.
    pub fn device(&self) -> &CheckedDevice {
        &self.device
    }

    /// Returns the session.
    pub fn session(&self) -> &SessionState {
        &self.session
    }

    /// Returns what a COMMIT must match.
    pub fn shape(&self) -> Shape {
        let set_up = |vring: &VringState| vring.kick != KickState::None;
        Shape {
            pairs: self.device.state().queue_pairs.len(),
            set_up: self.session.vrings.iter().map(set_up).collect(),
        }
    }
}

impl TryFrom<(DeviceState, SessionState, &Capabilities)> for CheckedSession {
    type Error = Reasons;

    fn try_from(
        (device, session, target): (DeviceState, SessionState, &Capabilities),
    ) -> Result<Self, Reasons> {
        let mut refusals = Vec::new();
        check(&device, &session, target, &mut refusals);
        let mut reasons = Reasons::of(refusals);
        match CheckedDevice::try_from((device, &target.device)) {
            Ok(device) if reasons.0.is_empty() => return Ok(Self { device, session }),
            Ok(_) => {}
            Err(more) => reasons.0.extend(more.0),
        }
        Err(reasons)
    }
}

fn check(device: &DeviceState, session: &SessionState, target: &Capabilities, refusals: &mut Vec<Refusal>) {
    if target.has_frontend {
        refusals.push(Refusal::FrontEnd);
    }
    if let Err(text) = check_endpoint(&session.endpoint) {
        refusals.push(Refusal::Endpoint(text.to_owned()));
    }
    let (vrings, pairs) = (session.vrings.len(), device.queue_pairs.len());
    if vrings != 2 * pairs {
        refusals.push(Refusal::Vrings { vrings, pairs });
    }
    let regions = session.regions.len();
    if regions > target.max_regions {
        refusals.push(Refusal::MemoryRegions { regions, max: target.max_regions });
    } else {
        check_regions(&session.regions, refusals);
    }
    let possible = |offset: u64, size: u64| size != 0 && offset.checked_add(size).is_some();
    if session.log.is_some_and(|log| !possible(log.offset, log.size)) {
        refusals.push(Refusal::Region("dirty log"));
    }
    if session.inflight.is_some_and(|inflight| !possible(inflight.offset, inflight.size)) {
        refusals.push(Refusal::Region("inflight region"));
    }
    for (index, vring) in session.vrings.iter().enumerate().take(2 * pairs) {
        check_vring(index, vring, &session.regions, refusals);
    }
}

fn check_endpoint(endpoint: &EndpointState) -> Result<(), &'static str> {
    let needs_path = match endpoint.kind {
        EndpointKind::Listening | EndpointKind::Client => true,
        EndpointKind::None | EndpointKind::Listener => false,
        EndpointKind::Other => return Err("unknown kind, from a later version"),
    };
    match &endpoint.path {
        Some(path) if !path.starts_with('/') || path.len() > MAX_PATH || path.contains('\0') => {
            Err("its path is invalid: not absolute, too long or with a NUL byte")
        }
        None if needs_path => Err("its path is missing"),
        Some(_) if !needs_path => Err("an endpoint of its kind has no path"),
        _ => Ok(()),
    }
}

fn check_regions(regions: &[RegionState], refusals: &mut Vec<Refusal>) {
    let fits = |region: &RegionState| {
        let starts = [region.guest_address, region.user_address, region.file_offset];
        region.size != 0
            && region.count != 0
            && starts.iter().all(|start| start.checked_add(region.size).is_some())
    };
    let overlap = |one: &RegionState, other: &RegionState| {
        let cross = |a: u64, b: u64| a < b + other.size && b < a + one.size;
        cross(one.guest_address, other.guest_address) || cross(one.user_address, other.user_address)
    };
    let mut good: Vec<&RegionState> = Vec::new();
    for (index, region) in regions.iter().enumerate() {
        if !fits(region) || good.iter().any(|other| overlap(region, other)) {
            refusals.push(Refusal::MemoryRegion(index));
        } else {
            good.push(region);
        }
    }
}

fn check_vring(index: usize, vring: &VringState, regions: &[RegionState], refusals: &mut Vec<Refusal>) {
    if let Some(size) = vring.size.filter(|size| !size.is_power_of_two() || *size > MAX_SIZE) {
        refusals.push(Refusal::VringSize { vring: index, size });
        return;
    }
    if vring.kick == KickState::Other {
        refusals.push(Refusal::VringKick(index));
    }
    if vring.started && vring.kick == KickState::None {
        refusals.push(Refusal::VringStarted(index));
    }
    // The memory of a vring that is not fully set up may not be shared yet.
    let (Some(size), Some(addresses)) = (vring.size, vring.addresses) else { return };
    let count = u64::from(size);
    let rings = [
        (addresses.descriptors, 16, 16 * count),
        (addresses.available, 2, 6 + 2 * count),
        (addresses.used, 4, 6 + 8 * count),
    ];
    let lies = |(address, alignment, length): (u64, u64, u64)| {
        let within = |region: &RegionState| {
            let offset = address.wrapping_sub(region.user_address);
            offset < region.size && region.size - offset >= length
        };
        address.is_multiple_of(alignment) && regions.iter().any(within)
    };
    if vring.kick != KickState::None && !rings.into_iter().all(lies) {
        refusals.push(Refusal::VringAddress(index));
    }
}

/// Returns the names of all descriptors of a session, in the order in which they are sent: those that the
/// [`SessionState`] implies, the TAP's, and one vhost-net instance per queue pair if `vhost`.
pub fn fd_names(device: &DeviceState, session: &SessionState, vhost: bool) -> Vec<String> {
    let one = |is_there: bool, name: &str| is_there.then(|| name.to_owned());
    let listens = matches!(session.endpoint.kind, EndpointKind::Listening | EndpointKind::Listener);
    let mut names = vec![OWNERSHIP_FD.to_owned(), FRAMES_FD.to_owned()];
    names.extend(one(session.frontend.is_some(), FRONTEND_FD));
    names.extend(one(listens, LISTENER_FD));
    names.extend((0..session.regions.len()).map(memory_fd));
    names.extend(one(session.log.is_some(), LOG_FD));
    names.extend(one(session.inflight.is_some(), INFLIGHT_FD));
    for (index, vring) in session.vrings.iter().enumerate() {
        names.extend((vring.kick == KickState::Fd).then(|| kick_fd(index)));
        names.extend(vring.call.then(|| call_fd(index)));
        names.extend(vring.error.then(|| error_fd(index)));
    }
    let pairs = 0..device.queue_pairs.len();
    names.extend(pairs.clone().map(tap_fd));
    if vhost {
        names.extend(pairs.map(vhost_fd));
    }
    names
}

/// The properties of a staged session that its COMMIT must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pairs: usize,
    /// Whether the kick of each vring is set.
    set_up: Vec<bool>,
}

/// A COMMIT that matches its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedCommit(Commit);

impl CheckedCommit {
    /// Returns the message.
    pub fn commit(&self) -> &Commit {
        &self.0
    }

    /// Returns each frame in hand: its queue pair, its offset in the file `frames`, and its length with the header.
    pub fn frames(&self) -> impl Iterator<Item = (usize, u64, u32)> {
        let slots = (0u64..).step_by(FRAME_SLOT as usize);
        let pairs = self.0.pairs.iter().enumerate().zip(slots);
        pairs.filter_map(|((pair, now), slot)| now.frame.map(|length| (pair, slot, length)))
    }
}

impl TryFrom<(Commit, &Shape)> for CheckedCommit {
    type Error = Reasons;

    fn try_from((commit, shape): (Commit, &Shape)) -> Result<Self, Reasons> {
        let mut refusals = Vec::new();
        if Word::INITIAL.offered().is_none_or(|word| word.epoch != commit.epoch) {
            refusals.push(Refusal::Commit("wrong epoch"));
        }
        if commit.pairs.len() != shape.pairs {
            refusals.push(Refusal::Commit("wrong number of queue pairs"));
        }
        if commit.vrings.len() != shape.set_up.len() {
            refusals.push(Refusal::Commit("wrong number of vrings"));
        }
        let frames = FRAME_HEADER + 1..=MAX_FRAME;
        for (pair, now) in commit.pairs.iter().enumerate().take(shape.pairs) {
            if now.frame.is_some_and(|length| !frames.contains(&length)) {
                refusals.push(Refusal::FrameInHand(pair));
            }
        }
        for (vring, (now, set_up)) in commit.vrings.iter().zip(&shape.set_up).enumerate() {
            if now.started && !set_up {
                refusals.push(Refusal::VringStarted(vring));
            }
        }
        Reasons::none_of(refusals)?;
        Ok(Self(commit))
    }
}
