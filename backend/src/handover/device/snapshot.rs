//! Describes the device for a hand-over, and adopts an offered device from its description.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use baton_channel::ownership::SharedWord;
use baton_control::limited;
use baton_protocol::control;
use baton_protocol::fd_manifest::{FdManifest, NamedFds};
use baton_protocol::handover::device::validate::{Capabilities, CheckedDevice};
use baton_protocol::handover::wire::device::{
    Datapath, DeviceState, FrameExtent, MAX_QUEUE_PAIRS, QueuePairState,
};
use baton_protocol::handover::wire::message::{FRAMES_FD, LINK_FD, OWNERSHIP_FD, Offer, tap_fd};
use baton_protocol::handover::wire::refusal::Refusal;
use baton_protocol::ownership::{Offered, Owner, Word};
use baton_protocol::reasons::Reasons;

use super::frames;
use crate::dataplane::polling::PollTime;
use crate::dataplane::rx::FrameInHand;
use crate::device::{Device, DeviceConfig};
use crate::features;
use crate::handover::options::TargetOptions;
use crate::net_header;
use crate::script;
use crate::tap::{Tap, adopted};

/// An adopted device: this process holds its descriptors and has not touched it yet.
#[derive(Debug)]
pub struct Adopted {
    /// The device's TAP.
    pub tap: Tap,
    /// The ownership word.
    pub word: SharedWord,
    /// The device's description.
    pub device: CheckedDevice,
    /// The frames in hand, each with its pair, to be delivered first.
    pub frames: Vec<(usize, FrameInHand)>,
}

/// Describes `device`. Its TAP may be in use, put aside, or absent.
pub fn describe(device: &Device, tap: Option<&Tap>, extents: &[Option<FrameExtent>]) -> DeviceState {
    let session = device.session();
    let config = device.config();
    let queue_pairs = device.counters().iter().enumerate().take(device.pairs());
    let queue_pairs = queue_pairs.map(|(pair, counters)| QueuePairState {
        using_vnet_hdr: true,
        has_ufo: tap.is_some_and(Tap::has_ufo),
        has_uso: tap.is_some_and(Tap::has_uso),
        has_tunnel: false,
        enabled: tap.is_some_and(|tap| tap.is_attached(pair)),
        host_vnet_hdr_len: tap
            .and_then(Tap::header_size)
            .and_then(|size| u16::try_from(size).ok())
            .unwrap_or(u16::try_from(net_header::SHORT).unwrap_or_default()),
        frame_in_hand: extents.get(pair).copied().flatten(),
        rx: counters.rx.save(),
        tx: counters.tx.save(),
    });
    DeviceState {
        tap: tap.map(Tap::name).unwrap_or_default(),
        queue_pairs: queue_pairs.collect(),
        features: session.features.0,
        protocol_features: session.protocol_features,
        mac: config.mac,
        mtu: config.mtu,
        sndbuf: config.sndbuf,
        downscript: config.downscript.as_ref().map(|path| path.to_string_lossy().into_owned()),
        downscript_place: config.downscript.as_ref().and_then(|_| script::place()),
        datapath: match device.datapath() {
            control::Datapath::Userspace => Datapath::Userspace,
            control::Datapath::VhostNet => Datapath::VhostNet,
        },
        poll_us: match config.poll {
            PollTime::Auto => 0,
            PollTime::Fixed(time) => u32::try_from(time.as_micros()).unwrap_or(u32::MAX),
        },
        poll_auto: config.poll == PollTime::Auto,
    }
}

/// Describes `device` for a transfer without descriptors: what its front-end negotiated, and nothing about this host.
/// Targets of earlier versions compare the number of queue pairs.
pub fn describe_alone(device: &Device) -> DeviceState {
    DeviceState {
        queue_pairs: vec![QueuePairState::default(); device.pairs().min(MAX_QUEUE_PAIRS)],
        features: device.session().features.0,
        ..DeviceState::default()
    }
}

/// Returns the names and descriptors of an offer.
pub fn descriptors<'a>(
    tap: &'a Tap,
    word: &'a SharedWord,
    frames: Option<&'a OwnedFd>,
    link: Option<BorrowedFd<'a>>,
) -> (FdManifest, Vec<BorrowedFd<'a>>) {
    let taps = (0..tap.pairs()).map(|pair| (tap_fd(pair), tap.queue(pair).lend()));
    taps.chain([(OWNERSHIP_FD.to_owned(), word.as_fd())])
        .chain(frames.map(|frames| (FRAMES_FD.to_owned(), frames.as_fd())))
        .chain(link.map(|link| (LINK_FD.to_owned(), link)))
        .collect::<NamedFds<_>>()
        .unzip()
}

/// Returns what this back-end supports for a device in `state`. `same_user` says whether the source runs as the same
/// user.
pub fn capabilities(
    device: &Device,
    options: &TargetOptions,
    state: &DeviceState,
    same_user: bool,
) -> Capabilities {
    let first = state.queue_pairs.first().copied().unwrap_or_default();
    let offer = device.offer_with(&config(state, options), first.has_ufo, first.has_uso);
    // A device that this process had before may have reduced the number of workers.
    let workers = Some(device.counters().len()).filter(|workers| *workers < state.queue_pairs.len());
    Capabilities {
        queue_pairs: options.queue_pairs.or(workers),
        vhost_fds: options.vhost_fds,
        features: offer.0,
        protocol_features: features::protocol_offer(device.datapath()).bits(),
        acknowledged: device.session().features.0,
        set_up_pairs: device.set_up_pairs(),
        same_user,
        place: script::place(),
    }
}

/// Returns the device's configuration: the source's, except for `--poll-us` of the target.
pub fn config(state: &DeviceState, options: &TargetOptions) -> DeviceConfig {
    let source = if state.poll_auto {
        PollTime::Auto
    } else {
        PollTime::Fixed(Duration::from_micros(u64::from(state.poll_us)))
    };
    DeviceConfig {
        mac: state.mac,
        mtu: state.mtu,
        sndbuf: state.sndbuf,
        downscript: state.downscript.as_ref().map(PathBuf::from),
        poll: options.poll.unwrap_or(source),
    }
}

/// Why an offer is not adopted.
#[derive(Debug)]
pub enum NotAdopted {
    /// The source retracted the offer before the target read it.
    Withdrawn,
    /// The target refuses the offer.
    Refused(Reasons),
}

impl From<Reasons> for NotAdopted {
    fn from(reasons: Reasons) -> Self {
        Self::Refused(reasons)
    }
}

impl From<Refusal> for NotAdopted {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.into())
    }
}

/// Checks an offer and claims its descriptors without touching the device. Closes the descriptors that are not kept.
///
/// # Errors
/// Returns an error if the source retracted the offer, or if the target must refuse it.
pub fn adopt(
    device: &mut Device,
    options: &TargetOptions,
    same_user: bool,
    offer: Offer,
    mut fds: NamedFds<OwnedFd>,
) -> Result<(Word, Adopted), NotAdopted> {
    let ownership = fds.claim(OWNERSHIP_FD).map_err(Refusal::Descriptors)?;
    let word = SharedWord::from_fd(ownership).map_err(|error| Refusal::Ownership(error.to_string()))?;
    check_offer(&word, offer.epoch)?;
    let epoch = offer.epoch;
    match keep(device, options, same_user, offer, fds) {
        Ok((tap, device, frames)) => {
            let offered = Word { epoch, owner: Owner::Offered };
            Ok((offered, Adopted { tap, word, device, frames }))
        }
        // The checks may have failed because the source took the device back meanwhile.
        Err(reasons) => Err(check_offer(&word, epoch).err().unwrap_or(NotAdopted::Refused(reasons))),
    }
}

/// Checks that the ownership word offers the device in this epoch.
fn check_offer(word: &SharedWord, epoch: u64) -> Result<(), NotAdopted> {
    let now = word.load().map_err(|error| Refusal::Ownership(error.to_string()))?;
    match now.judge_offer(epoch) {
        Offered::Stands => Ok(()),
        Offered::Withdrawn => Err(NotAdopted::Withdrawn),
        Offered::Impossible => {
            let text = format!("the ownership word does not offer the device: {now:?}");
            Err(Refusal::Ownership(text).into())
        }
    }
}

/// The frames in hand, each with its pair.
type Kept = Vec<(usize, FrameInHand)>;

/// Checks and claims everything in an offer except the ownership word.
fn keep(
    device: &mut Device,
    options: &TargetOptions,
    same_user: bool,
    offer: Offer,
    mut fds: NamedFds<OwnedFd>,
) -> Result<(Tap, CheckedDevice, Kept), Reasons> {
    let epoch = offer.epoch;
    let capabilities = capabilities(device, options, &offer.device, same_user);
    let checked = CheckedDevice::try_from((offer.device, &capabilities))?;
    let state = checked.state();
    let claimed: Result<Vec<_>, _> =
        (0..state.queue_pairs.len().min(MAX_QUEUE_PAIRS)).map(|pair| fds.claim(&tap_fd(pair))).collect();
    let file = fds.claim_optional(FRAMES_FD);
    let taps = claimed
        .and_then(|claimed| fds.finish().map(|()| claimed))
        .map_err(|error| Reasons::from(Refusal::Descriptors(error)))?;
    let tap = adopted::adopt(state, taps).map_err(|error| Refusal::Tap(error.to_string()))?;
    let frames = frames::read(&checked, file).map_err(|error| Refusal::Tap(error.to_string()))?;
    device.open_vhost(tap.pairs()).map_err(|error| Refusal::VhostNet(error.to_string()))?;
    limited!(info, tap = tap.name(), queues = tap.pairs(), epoch, "TAP descriptors claimed");
    Ok((tap, checked, frames))
}
