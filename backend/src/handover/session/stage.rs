//! Stages a session on the target: checks, maps and sets up everything that the source sent, without touching anything
//! that the source works with.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_channel::ownership::SharedWord;
use baton_control::error_chain;
use baton_faults::Point;
use baton_protocol::fd_manifest::{ManifestError, NamedFds};
use baton_protocol::handover::session::validate::{Capabilities, CheckedSession, Shape};
use baton_protocol::handover::wire::device::DeviceState;
use baton_protocol::handover::wire::message::{
    FRAMES_FD, FRONTEND_FD, INFLIGHT_FD, LISTENER_FD, LOG_FD, OWNERSHIP_FD, Stage, call_fd, error_fd,
    kick_fd, memory_fd, tap_fd, vhost_fd,
};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::handover::wire::session as wire;
use baton_protocol::ownership::Word;
use baton_protocol::reasons::Reasons;

use super::Negotiated;
use super::frames::FrameSlots;
use crate::dataplane::ring::Kick;
use crate::device::{SavedCounters, SessionState};
use crate::dirty_log::DirtyLog;
use crate::endpoint::{self, Endpoint};
use crate::features::Features;
use crate::handover::Context;
use crate::handover::device::snapshot;
use crate::inflight::InflightRegion;
use crate::memory::{GuestMemory, RegionLayout};
use crate::notify::Notifier;
use crate::sigbus;
use crate::tap::adopted;
use crate::vhost_net::VhostNet;
use crate::vring::RingAddresses;
use crate::vring_setup::VringSetup;

/// The staged state besides the device and the front-end's connection.
#[derive(Debug)]
pub struct Staged {
    /// Whether the last transfer of device state succeeded, if the front-end has not asked yet.
    pub device_state_moved: Option<bool>,
    /// The counters of each pair when the source sent STAGE, for a survivor: COMMIT replaces them.
    pub counters: Vec<SavedCounters>,
    /// The slots for the frames in hand, which the source fills before COMMIT.
    pub frames: FrameSlots,
}

/// Returns what this back-end supports for a session. `same_user` says whether the source runs as the same user.
pub fn capabilities(cx: &Context<'_>, state: &DeviceState, same_user: bool) -> Capabilities {
    Capabilities {
        device: snapshot::capabilities(cx.device, cx.options, state, same_user),
        max_regions: cx.device.max_regions(),
        has_frontend: cx.front.connection().is_some_and(|connection| connection.begun),
    }
}

/// Stages the session that `stage` describes, with these descriptors.
///
/// # Errors
/// Returns all reasons for a refusal that the description shows, or else the first error in setting it up. Nothing is
/// changed, and the descriptors are closed.
pub fn stage(
    cx: &mut Context<'_>,
    same_user: bool,
    stage: Stage,
    mut fds: NamedFds<OwnedFd>,
) -> Result<(SharedWord, Staged, Shape), Reasons> {
    baton_faults::point(Point::TargetSessionGathered).map_err(|error| unusable("the session", &error))?;
    let Stage { device: device_state, session: session_state, .. } = stage;
    let capabilities = capabilities(cx, &device_state, same_user);
    let checked = CheckedSession::try_from((device_state, session_state, &capabilities))?;
    let (device_state, state) = (checked.device().state(), checked.session());
    let pairs = device_state.queue_pairs.len();

    let claimed = |error: ManifestError| Reasons::from(Refusal::Descriptors(error));
    let word = SharedWord::from_fd(fds.claim(OWNERSHIP_FD).map_err(claimed)?)
        .map_err(|error| Refusal::Ownership(error.to_string()))?;
    if word.load() != Ok(Word::INITIAL) {
        let text = "unexpected ownership word: the source does not own the session".to_owned();
        return Err(Refusal::Ownership(text).into());
    }
    let frames = FrameSlots::adopt(fds.claim(FRAMES_FD).map_err(claimed)?, pairs)
        .map_err(|error| unusable("frames", &error))?;
    let frontend = state.frontend.map(|_| fds.claim(FRONTEND_FD)).transpose().map_err(claimed)?;
    if frontend.as_ref().is_some_and(|socket| !endpoint::is_connection(socket)) {
        let text = "not a connected Unix stream socket".to_owned();
        return Err(Refusal::Unusable { what: "the front-end's connection", text }.into());
    }
    let listens = matches!(state.endpoint.kind, wire::EndpointKind::Listening | wire::EndpointKind::Listener);
    let listener = listens.then(|| fds.claim(LISTENER_FD)).transpose().map_err(claimed)?;
    let endpoint =
        Endpoint::adopt(&state.endpoint, listener).map_err(|error| Refusal::Endpoint(error.to_string()))?;
    let session = session(device_state, state, &mut fds)?;
    let taps: Result<Vec<_>, _> = (0..pairs).map(|pair| fds.claim(&tap_fd(pair))).collect();
    let tap = adopted::adopt(device_state, taps.map_err(claimed)?)
        .map_err(|error| Refusal::Tap(error.to_string()))?;
    let vhost = (0..pairs).filter_map(|pair| fds.claim_optional(&vhost_fd(pair))).collect::<Vec<_>>();
    fds.finish().map_err(claimed)?;

    let negotiated = Negotiated {
        begun: state.frontend.is_some_and(|frontend| frontend.begun),
        features: device_state.features,
        protocol_features: device_state.protocol_features,
    };
    let vhost = vhost.into_iter().map(VhostNet::from_fd).collect::<Result<Vec<_>, _>>();
    let vhost = vhost.map_err(|error| Refusal::VhostNet(error.to_string()))?;
    // The features of the source's vhost-net instances are known only now.
    let possible = vhost.iter().fold(negotiated.features, |mask, vhost| vhost.masked(Features(mask)).0);
    if possible != negotiated.features {
        return Err(Refusal::Features(negotiated.features & !possible).into());
    }
    cx.device.give_vhost(vhost).map_err(|error| Refusal::VhostNet(error.to_string()))?;
    cx.device.open_vhost(pairs).map_err(|error| Refusal::VhostNet(error.to_string()))?;
    let config = snapshot::config(device_state, cx.options);
    let offer = cx.device.offer_with(&config, tap.has_ufo(), tap.has_uso());
    cx.device.stage(session, tap, config, offer).map_err(|error| unusable("the device", &error))?;
    let connection = frontend.map(|socket| (socket, negotiated));
    let staged = cx.front.stage(connection, endpoint);
    let staged = staged.map_err(|error| unusable("the front-end's connection", &error)).and_then(|()| {
        // From here on, this process does not touch the memory until it takes the session.
        if sigbus::take_truncation() {
            let text = "the file of a region is truncated".to_owned();
            return Err(Refusal::Unusable { what: "the memory", text }.into());
        }
        Ok(())
    });
    match staged {
        Ok(()) => {
            let device_state_moved = state.frontend.and_then(|frontend| frontend.device_state_moved);
            let counters = device_state.queue_pairs.iter().map(|pair| (pair.rx, pair.tx)).collect();
            Ok((word, Staged { device_state_moved, counters, frames }, checked.shape()))
        }
        Err(reasons) => {
            cx.front.unstage();
            // The next use of a dead worker reports it.
            let _ = cx.device.unstage();
            Err(reasons)
        }
    }
}

/// Returns the refusal for a part of the session that cannot be set up.
fn unusable(what: &'static str, error: &dyn std::error::Error) -> Reasons {
    Refusal::Unusable { what, text: error_chain(error) }.into()
}

/// Builds the session's state: maps the memory, log and inflight region, and claims the vrings' descriptors.
fn session(
    device: &DeviceState,
    state: &wire::SessionState,
    fds: &mut NamedFds<OwnedFd>,
) -> Result<SessionState, Reasons> {
    let mut claim = |name: &str| fds.claim(name).map(File::from).map_err(Refusal::from);
    let mut regions = Vec::new();
    for (index, region) in state.regions.iter().enumerate() {
        let layout = RegionLayout {
            guest_address: region.guest_address,
            size: region.size,
            user_address: region.user_address,
            file_offset: region.file_offset,
        };
        regions.push((layout, region.count, claim(&memory_fd(index))?));
    }
    let memory = GuestMemory::map_counted(regions).map_err(|error| unusable("the memory", &error))?;
    let mut log = None;
    if let Some(wire::LogState { offset, size }) = state.log {
        let mapped = DirtyLog::new(claim(LOG_FD)?, offset, size);
        log = Some(Arc::new(mapped.map_err(|error| unusable("the log of changed pages", &error))?));
    }
    let features = Features(device.features);
    SessionState::check_log(features, &memory, log.as_deref())
        .map_err(|error| unusable("the log of changed pages", &error))?;
    let mut inflight = None;
    if let Some(wire::InflightState { offset, size, queues, entries }) = state.inflight {
        let mapped = InflightRegion::new(claim(INFLIGHT_FD)?, offset, size, queues, entries);
        inflight = Some(Arc::new(mapped.map_err(|error| unusable("the inflight region", &error))?));
    }
    let mut vrings = Vec::new();
    for (index, state) in state.vrings.iter().enumerate() {
        let mut notifier = |is_there: bool, name: String| -> Result<Option<Notifier>, Reasons> {
            if !is_there {
                return Ok(None);
            }
            let notifier = Notifier::try_from(claim(&name)?);
            notifier.map(Some).map_err(|error| unusable("a vring's descriptor", &error))
        };
        let kick = notifier(state.kick == wire::KickState::Fd, kick_fd(index))?;
        let call = notifier(state.call, call_fd(index))?;
        let error = notifier(state.error, error_fd(index))?;
        vrings.push(vring(state, kick, call, error));
    }
    Ok(SessionState {
        features,
        protocol_features: device.protocol_features,
        memory: Arc::new(memory),
        log,
        inflight,
        vrings,
    })
}

fn vring(
    state: &wire::VringState,
    kick: Option<Notifier>,
    call: Option<Notifier>,
    error: Option<Notifier>,
) -> VringSetup {
    let addresses = |addresses: wire::AddressesState| {
        let wire::AddressesState { descriptors, available, used } = addresses;
        RingAddresses { descriptors, available, used }
    };
    VringSetup {
        size: state.size,
        addresses: state.addresses.map(addresses),
        log_used: state.log_used,
        call_due: state.call_due,
        called: false,
        base: state.base,
        kick: match state.kick {
            wire::KickState::Polled => Some(Kick::Polled),
            _ => kick.map(Kick::Eventfd),
        },
        call,
        error,
        enabled: state.enabled,
        resumes: state.resumes,
        was_enabled: state.was_enabled,
        started: state.started,
        base_is_given: state.base_is_given,
        base_is_ours: !state.base_is_given && state.kick != wire::KickState::None,
        broken: state.broken,
        paused: state.paused,
    }
}
