//! Describes a session and collects its descriptors, on the source.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use baton_channel::ownership::SharedWord;
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::handover::wire::message::{
    FRAMES_FD, FRONTEND_FD, INFLIGHT_FD, LISTENER_FD, LOG_FD, OWNERSHIP_FD, call_fd, error_fd, kick_fd,
    memory_fd, tap_fd, vhost_fd,
};
use baton_protocol::handover::wire::session::{
    AddressesState, FrontendState, InflightState, KickState, LogState, RegionState, SessionState, VringState,
};

use super::FrontEnd;
use super::frames::FrameSlots;
use crate::dataplane::ring::Kick;
use crate::device::Device;
use crate::handover::Context;
use crate::vring::RingAddresses;
use crate::vring_setup::VringSetup;

/// Describes the session.
pub fn describe(cx: &Context<'_>) -> SessionState {
    let Context { device, front, transfer, .. } = cx;
    let session = device.session();
    let regions = session.memory.files().map(|(layout, count, _)| RegionState {
        guest_address: layout.guest_address,
        size: layout.size,
        user_address: layout.user_address,
        file_offset: layout.file_offset,
        count,
    });
    let log = session.log.as_ref().map(|log| {
        let (offset, size) = log.place();
        LogState { offset, size }
    });
    let inflight = session.inflight.as_ref().map(|region| {
        let (offset, size) = region.place();
        let (queues, entries) = region.shape();
        InflightState { offset, size, queues, entries }
    });
    SessionState {
        frontend: front.connection().map(|connection| FrontendState {
            begun: connection.begun,
            device_state_moved: transfer.succeeded(),
        }),
        endpoint: front.endpoint().state(),
        regions: regions.collect(),
        log,
        inflight,
        vrings: session.vrings.iter().map(vring).collect(),
    }
}

fn vring(setup: &VringSetup) -> VringState {
    let addresses = |addresses: RingAddresses| {
        let RingAddresses { descriptors, available, used } = addresses;
        AddressesState { descriptors, available, used }
    };
    VringState {
        size: setup.size,
        addresses: setup.addresses.map(addresses),
        log_used: setup.log_used,
        base: setup.base,
        base_is_given: setup.base_is_to_be_judged(),
        kick: match setup.kick {
            None => KickState::None,
            Some(Kick::Polled) => KickState::Polled,
            Some(Kick::Eventfd(_)) => KickState::Fd,
        },
        call: setup.call.is_some(),
        error: setup.error.is_some(),
        enabled: setup.enabled,
        resumes: setup.resumes,
        was_enabled: setup.was_enabled,
        started: setup.now().started,
        broken: setup.broken,
        paused: setup.paused,
        call_due: setup.call_due,
    }
}

/// Returns all descriptors of the session, by name. `vhost` has one vhost-net instance for each pair, or none.
pub fn descriptors<'a>(
    device: &'a Device,
    front: &'a dyn FrontEnd,
    word: &'a SharedWord,
    frames: &'a FrameSlots,
    vhost: &'a [File],
) -> NamedFds<BorrowedFd<'a>> {
    let session = device.session();
    let mut named = vec![(OWNERSHIP_FD.to_owned(), word.as_fd()), (FRAMES_FD.to_owned(), frames.as_fd())];
    let mut add = |name: &str, fd: Option<BorrowedFd<'a>>| named.extend(fd.map(|fd| (name.to_owned(), fd)));
    add(FRONTEND_FD, front.connection().map(|connection| connection.socket));
    add(LISTENER_FD, front.endpoint().listener());
    for (region, (_, _, file)) in session.memory.files().enumerate() {
        add(&memory_fd(region), Some(file.as_fd()));
    }
    add(LOG_FD, session.log.as_ref().map(|log| log.file().as_fd()));
    add(INFLIGHT_FD, session.inflight.as_ref().map(|region| region.file().as_fd()));
    for (index, vring) in session.vrings.iter().enumerate() {
        if let Some(Kick::Eventfd(kick)) = &vring.kick {
            add(&kick_fd(index), Some(kick.as_fd()));
        }
        add(&call_fd(index), vring.call.as_ref().map(AsFd::as_fd));
        add(&error_fd(index), vring.error.as_ref().map(AsFd::as_fd));
    }
    for pair in 0..device.pairs() {
        add(&tap_fd(pair), device.tap().map(|tap| tap.queue(pair).lend()));
        add(&vhost_fd(pair), vhost.get(pair).map(AsFd::as_fd));
    }
    named.into_iter().collect()
}
