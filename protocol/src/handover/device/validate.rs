//! Checks a source's device before the target acts on it. Only this module constructs [`CheckedDevice`]. A failed check
//! reports all reasons, not just the first.

use crate::handover::wire::device::{DeviceState, FrameExtent, MAX_QUEUE_PAIRS, Place, QueuePairState};
use crate::handover::wire::refusal::Refusal;
use crate::reasons::Reasons;

/// The largest frame with its header, in bytes: the header, an IP packet, an Ethernet header and a VLAN tag.
pub(crate) const MAX_FRAME: u32 = 10 + 65535 + 14 + 4;
/// Length of the virtio-net header before a frame in hand, in bytes.
pub(crate) const FRAME_HEADER: u32 = 10;
/// The longest name of an interface.
const MAX_NAME: usize = 15;
/// The smallest MTU of IPv4.
const MIN_MTU: u16 = 68;

/// What a target supports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The required number of queue pairs (`--queue-pairs`), if any.
    pub queue_pairs: Option<usize>,
    /// The number of `--vhost-fds`, if given.
    pub vhost_fds: Option<usize>,
    /// The virtio features that the target supports with this device.
    pub features: u64,
    /// The vhost-user protocol features that the target supports.
    pub protocol_features: u64,
    /// The virtio features that the target's own front-end has acknowledged.
    pub acknowledged: u64,
    /// The number of queue pairs that the target's own front-end has set up.
    pub set_up_pairs: usize,
    /// The source runs as the same user.
    pub same_user: bool,
    /// Where the target runs scripts, if it can tell.
    pub place: Option<Place>,
}

/// A device that the target can take, provided that its descriptors are valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedDevice(DeviceState);

impl CheckedDevice {
    /// Returns the device state.
    pub fn state(&self) -> &DeviceState {
        &self.0
    }

    /// Returns each frame in hand with its queue pair. The frames do not overlap.
    pub fn frames(&self) -> impl Iterator<Item = (usize, FrameExtent)> {
        let pairs = self.0.queue_pairs.iter().enumerate();
        pairs.filter_map(|(pair, state)| state.frame_in_hand.map(|extent| (pair, extent)))
    }
}

impl TryFrom<(DeviceState, &Capabilities)> for CheckedDevice {
    type Error = Reasons;

    fn try_from((device, target): (DeviceState, &Capabilities)) -> Result<Self, Reasons> {
        Reasons::none_of(refusals(&device, target))?;
        Ok(Self(device))
    }
}

/// Checks device state without descriptors against the features that the target offers its own front-end. The state of
/// the source's TAP, queues and connection is irrelevant: the target's front-end negotiates its own.
///
/// # Errors
/// Returns a refusal if the source's front-end acknowledged features that the target does not offer.
pub fn check_without_tap(device: &DeviceState, offered: u64) -> Result<(), Reasons> {
    let lacking = device.features & !offered;
    Reasons::none_of(if lacking == 0 { Vec::new() } else { vec![Refusal::Features(lacking)] })
}

fn refusals(device: &DeviceState, target: &Capabilities) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    check_pairs(device, target, &mut refusals);
    let pairs = device.queue_pairs.len();
    if let Some(fds) = target.vhost_fds.filter(|fds| *fds != pairs) {
        refusals.push(Refusal::VhostFds { source_pairs: pairs, fds });
    }
    check_features(device, target, &mut refusals);
    let name = &device.tap;
    let possible = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':');
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(possible) {
        refusals.push(Refusal::TapName(name.chars().take(MAX_NAME).collect()));
    }
    if device.mac.is_some_and(|mac| mac[0] & 1 != 0 || mac == [0; 6]) {
        refusals.push(Refusal::Mac);
    }
    if let Some(mtu) = device.mtu.filter(|mtu| *mtu < MIN_MTU) {
        refusals.push(Refusal::Mtu(mtu));
    }
    if let Some(path) = &device.downscript {
        if !path.starts_with('/') {
            refusals.push(Refusal::Downscript(path.clone()));
        }
        if !target.same_user {
            refusals.push(Refusal::DownscriptUser(path.clone()));
        }
        if let Some(source) = device.downscript_place
            && let Some(difference) = difference(source, target.place)
        {
            refusals.push(Refusal::DownscriptPlace { path: path.clone(), difference });
        }
    }
    check_queues(&device.queue_pairs, &mut refusals);
    refusals
}

/// Returns the difference between two places because of which a script could act on another TAP or be another program.
fn difference(source: Place, target: Option<Place>) -> Option<&'static str> {
    match target {
        None => Some("a place that the target cannot compare with the source's"),
        Some(target) if target.net != source.net => Some("another network namespace"),
        Some(target) if target.mnt != source.mnt => Some("another mount namespace"),
        Some(target) if target.root != source.root => Some("another root directory"),
        Some(_) => None,
    }
}

fn check_pairs(device: &DeviceState, target: &Capabilities, refusals: &mut Vec<Refusal>) {
    let pairs = device.queue_pairs.len();
    if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
        refusals.push(Refusal::QueuePairRange(pairs));
        return;
    }
    let set_up = Some(target.set_up_pairs).filter(|set_up| *set_up > pairs);
    if let Some(target) = target.queue_pairs.filter(|own| *own != pairs).or(set_up) {
        refusals.push(Refusal::QueuePairs { source_pairs: pairs, target });
    }
}

fn check_features(device: &DeviceState, target: &Capabilities, refusals: &mut Vec<Refusal>) {
    let lacking = device.features & !target.features;
    if lacking != 0 {
        refusals.push(Refusal::Features(lacking));
    }
    let lacking = device.protocol_features & !target.protocol_features;
    if lacking != 0 {
        refusals.push(Refusal::ProtocolFeatures(lacking));
    }
    if target.acknowledged & !target.features != 0 {
        refusals.push(Refusal::FrontEndFeatures(target.acknowledged & !target.features));
    }
}

fn check_queues(pairs: &[QueuePairState], refusals: &mut Vec<Refusal>) {
    let mut extents: Vec<(usize, FrameExtent)> = Vec::new();
    for (pair, state) in pairs.iter().enumerate().take(MAX_QUEUE_PAIRS) {
        if !state.using_vnet_hdr {
            refusals.push(Refusal::VnetHdr(pair));
        }
        let length = state.host_vnet_hdr_len;
        // Only the first pair is checked here; the others must agree with it.
        if pair == 0 && !matches!(length, 10 | 12) {
            refusals.push(Refusal::HeaderSize { pair, length });
        }
        let of_the_tap = |state: &QueuePairState| {
            (state.has_ufo, state.has_uso, state.has_tunnel, state.host_vnet_hdr_len)
        };
        if of_the_tap(state) != of_the_tap(&pairs[0]) {
            refusals.push(Refusal::Mixed(pair));
        }
        if let Some(extent) = state.frame_in_hand {
            let end = extent.offset.checked_add(u64::from(extent.length));
            let overlaps = |(_, other): &(usize, FrameExtent)| {
                extent.offset < other.offset + u64::from(other.length)
                    && end.is_some_and(|end| other.offset < end)
            };
            let size = FRAME_HEADER + 1..=MAX_FRAME;
            if end.is_none() || !size.contains(&extent.length) || extents.iter().any(overlaps) {
                refusals.push(Refusal::FrameInHand(pair));
            } else {
                extents.push((pair, extent));
            }
        }
    }
}
