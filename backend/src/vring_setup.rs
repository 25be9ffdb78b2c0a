//! One vring as the front-end has set it up so far: plain data, part of the state of a session.
//!
//! ```text
//!   incomplete ──SET_VRING_KICK, the rest being set──▶ started ──its memory disappears──▶ unmapped
//!       ▲                                                 │ ▲                                │ │
//!       │                                                 │ └────────its memory returns──────┘ │
//!       └── GET_VRING_BASE, RESET_DEVICE, end of session──┴────────────────────────────────────┘
//! ```
//! `enabled` is independent of this (vhost-user: "Ring states"). The device processes the available chains of a started
//! ring at once, without waiting for a kick. The specification's text of 2026 says so, and other back-ends always did:
//! drivers of receive rings do not kick again, nor do drivers that the last device told not to kick.
//!
//! # Where a ring continues
//!
//! Completion is in order, so the used index in memory gives the position of the last device, whichever process that
//! was. Front-ends disagree about the base of a ring in use: QEMU sends the used index, DPDK's virtio-user 0, Cloud
//! Hypervisor the available index, and some send none. `B` is the base, `U` the used index, `A` the available index,
//! all modulo 2^16. An index *fits* if at most the ring's size lies between it and `A`, so that the driver can have
//! made that much available.
//!
//! | The base | and | the ring continues at |
//! |---|---|---|
//! | is this session's position, the ring still set up | | `B` |
//! | is given: where this session stopped the ring | `B` fits, `U` is not 0 | `B` |
//! | is given: ahead of `U`, behind it or equal | `U` fits, 0 or not | `U` |
//! | is given | `U` does not fit: a fresh ring that does not begin at 0 | `B` |
//! | is not given | `U` fits | `U` |
//! | is not given | `U` does not fit | `B`: the session's last position, else 0 |
//! | is any | the inflight region has chains in flight | `U`, those chains first |
//!
//! A driver that resets its ring clears `U`, so the same rules apply to a ring that starts over.

use std::sync::Arc;

use baton_protocol::handover::wire::session::VringNow;

use crate::dataplane::ring::{Kick, Ring};
use crate::dirty_log::{DirtyLog, RingLog};
use crate::features::Features;
use crate::inflight::{InflightQueue, InflightRegion};
use crate::memory::GuestMemory;
use crate::notify::Notifier;
use crate::vring::{LayoutError, RingAddresses, Vring, VringLayout};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// One vring of a session.
#[derive(Clone, Debug, Default)]
pub struct VringSetup {
    /// `SET_VRING_NUM`.
    pub size: Option<u16>,
    /// `SET_VRING_ADDR`.
    pub addresses: Option<RingAddresses>,
    /// `SET_VRING_ADDR` with `VRING_F_LOG`: the guest address at which writes to the used ring are marked in the log.
    pub log_used: Option<u64>,
    /// A call is due. The worker makes it, since a write to an eventfd that the front-end has filled may block.
    pub call_due: bool,
    /// The driver has been called since the ring was started and enabled, or such a call is due. It may not know of
    /// earlier completions: their call went to another descriptor, or was lost with the process that had to make it.
    pub called: bool,
    /// The next available index: from `SET_VRING_BASE`, or where the ring stopped.
    pub base: u16,
    /// `SET_VRING_KICK`.
    pub kick: Option<Kick>,
    /// `SET_VRING_CALL`.
    pub call: Option<Notifier>,
    /// `SET_VRING_ERR`.
    pub error: Option<Notifier>,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// Whether the ring ran in this session before it was stopped, and the front-end has not set another base since.
    pub resumes: bool,
    /// Whether the ring has been enabled in this session.
    pub was_enabled: bool,
    /// Whether the ring is started: it has been mapped since the front-end sent `kick`, and has not become
    /// [unmapped](Self::unmapped).
    pub started: bool,
    /// Whether the front-end sent `base`, rather than this session having recorded it.
    pub base_is_given: bool,
    /// Whether `base` is this session's position in a ring that has been set up since.
    pub base_is_ours: bool,
    /// The driver wrote invalid values to the ring. It is not used until the front-end stops it.
    pub broken: bool,
    /// For a receive ring: it was stopped, or disabled while the first one was disabled, so the front-end is taken to
    /// pause. The TAP queue keeps its frames until the ring is set up and enabled again, or disabled.
    pub paused: bool,
}

/// What is needed to map any vring of a session.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Shared memory.
    pub memory: &'a Arc<GuestMemory>,
    /// Virtio features.
    pub features: Features,
    /// The log of changed pages.
    pub log: Option<&'a Arc<DirtyLog>>,
    /// The inflight region.
    pub inflight: Option<&'a Arc<InflightRegion>>,
}

impl VringSetup {
    /// Returns whether the ring has size, addresses and kick.
    pub fn is_set_up(&self) -> bool {
        self.size.is_some() && self.addresses.is_some() && self.kick.is_some()
    }

    /// Maps vring number `index`. Returns `None` if it is not set up completely.
    ///
    /// # Errors
    /// Returns a [`LayoutError`] if its rings are misaligned or not in shared memory.
    pub fn activate(
        &mut self,
        index: usize,
        surroundings: Surroundings<'_>,
    ) -> Result<Option<Ring>, LayoutError> {
        let Surroundings { memory, features, log, inflight } = surroundings;
        let (Some(size), Some(addresses), Some(kick)) = (self.size, self.addresses, &self.kick) else {
            return Ok(None);
        };
        let layout = VringLayout {
            size,
            addresses,
            event_idx: features.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: features.has(VIRTIO_RING_F_INDIRECT_DESC),
        };
        let vring = Vring::new(layout, Arc::clone(memory), self.call.clone())?;
        let mut ring = Ring {
            vring,
            kick: kick.clone(),
            error: self.error.clone(),
            call_due: false,
            held: false,
            enabled: false,
            broken: false,
        };
        ring.vring.set_log(log.map(|log| RingLog { log: Arc::clone(log), used: self.log_used }));
        self.place(index, &mut ring, inflight);
        Ok(Some(ring))
    }

    /// Sets the position at which a mapped vring continues. The vring must not have been used since it was mapped or
    /// [reread](Vring::reread).
    pub fn place(&mut self, index: usize, ring: &mut Ring, inflight: Option<&Arc<InflightRegion>>) {
        let vring = &mut ring.vring;
        if !self.base_is_ours {
            let used = vring.published();
            let given_back = self.base_is_given && self.resumes && used != 0 && vring.fits(self.base);
            if !given_back && vring.fits(used) {
                self.base = used;
            }
        }
        self.base_is_given = false;
        self.base_is_ours = true;
        vring.set_next_available(self.base);
        if let Some(inflight) = inflight.and_then(|region| InflightQueue::new(region, index, vring.size())) {
            vring.set_inflight(inflight);
        }
        self.started = true;
        // Front-ends enable last: until then, do not discard what the driver has made available.
        self.was_enabled |= self.enabled;
        ring.held = !self.was_enabled;
        ring.enabled = self.enabled;
        ring.broken = self.broken;
        self.call_due |= self.enabled && !self.called;
        self.called = self.enabled;
        ring.call_due = std::mem::take(&mut self.call_due);
    }

    /// Returns whether the used index takes precedence over `base`, for a process that does not know
    /// [`Self::base_is_ours`].
    pub fn base_is_to_be_judged(&self) -> bool {
        self.base_is_given || self.kick.is_some() && !self.base_is_ours
    }

    /// Returns the state of a ring that no worker has.
    pub fn now(&self) -> VringNow {
        VringNow {
            base: self.base,
            base_is_given: self.base_is_to_be_judged(),
            // Earlier versions discard the chains of a ring that they are told is started, even before it is enabled.
            started: self.started && self.was_enabled,
            broken: self.broken,
            call_due: self.call_due,
        }
    }

    /// Sets the state that another process reports.
    pub fn set_now(&mut self, now: &VringNow) {
        let VringNow { base, base_is_given, started, broken, call_due } = *now;
        self.base = base;
        self.base_is_given = base_is_given;
        self.base_is_ours = !base_is_given && self.kick.is_some();
        self.started = started;
        self.broken = broken;
        self.call_due = call_due;
    }

    /// Records the position and state of a ring that was taken out of its worker.
    pub fn deactivate(&mut self, ring: &Ring) {
        self.base = ring.vring.base();
        self.base_is_given = false;
        self.base_is_ours = true;
        self.broken = ring.broken;
        self.call_due |= ring.call_due;
    }

    /// Records that the ring can no longer be mapped. It is not started, and its driver is called when it starts again.
    pub fn unmapped(&mut self) {
        self.started = false;
        self.called = false;
    }

    /// Stops the ring (`GET_VRING_BASE`): keeps its position and drops its kick and call. `ran` says whether there was
    /// a TAP, so that a started ring ran.
    pub fn stop(&mut self, ran: bool) {
        let set_up = self.is_set_up();
        self.resumes |= self.started && ran;
        self.base_is_ours = false;
        self.kick = None;
        self.call = None;
        self.call_due = false;
        self.called = false;
        self.started = false;
        self.broken = false;
        self.paused = self.enabled && (set_up || self.paused);
    }
}
