//! What the front-end has said of one vring, whole or not, running or not: plain state that a session consists of.
//!
//! ```text
//!   incomplete ──SET_VRING_KICK, the rest being there──▶ started
//!       ▲                                                   │
//!       └───── GET_VRING_BASE, RESET_DEVICE, end of session─┘
//! ```
//! `enabled` is independent of all that (vhost-user: "Ring states"). What is available in a started ring is worked on at
//! once, without waiting for a kick, as the specification's text of 2026 says and other back-ends always did: drivers of
//! receive rings do not kick again, and one whose last device told it not to kick does not either.
//!
//! # Where a ring goes on
//!
//! Completion is in order, so the used index in memory says how far the last device came, whoever that was. Front-ends
//! disagree about the base of a ring in use: QEMU gives the used index, DPDK's virtio-user 0, Cloud Hypervisor the
//! available index, and some give none. `B` is the base, `U` the used index, `A` the available index, all modulo 2^16. An
//! index *fits* if the driver can have made available what lies between it and `A`: at most the ring's size.
//!
//! | The base | and | the ring goes on from |
//! |---|---|---|
//! | was this session's own place, the ring still set up | | `B` |
//! | is the one at which this session stopped, given back | `B` fits, `U` is not 0 | `B` |
//! | is given: ahead of `U`, behind it or equal | `U` fits, 0 or not | `U` |
//! | is given | `U` does not fit: a fresh ring that begins elsewhere | `B` |
//! | is not given | `U` fits | `U` |
//! | is not given | `U` does not fit | `B`: the session's last place, else 0 |
//! | whatever it is | the inflight region says that chains were left | `U`, those chains first |
//!
//! A driver that resets its ring clears `U`, so the ring begins anew by the same rules.

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
    /// `SET_VRING_ADDR` with `VRING_F_LOG`: the guest address under which writes to the used ring are noted.
    pub log_used: Option<u64>,
    /// `call` is to be signalled, whatever there is to tell. By the worker: an eventfd that the front-end has filled
    /// blocks who writes to it.
    pub call_due: bool,
    /// The driver was called since the ring is started and enabled, or is about to be. What was completed before may be
    /// unknown to it: the last call went to another descriptor, or was lost with the process that was to make it.
    pub called: bool,
    /// `SET_VRING_BASE`, and where the ring stopped: the next available index.
    pub base: u16,
    /// `SET_VRING_KICK`.
    pub kick: Option<Kick>,
    /// `SET_VRING_CALL`.
    pub call: Option<Notifier>,
    /// `SET_VRING_ERR`.
    pub error: Option<Notifier>,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// Whether it ran before it was stopped, and the front-end has not given it another place since.
    pub resumes: bool,
    /// Whether it has been enabled in this session.
    pub was_enabled: bool,
    /// Whether the ring is started: it was mapped since `kick` came.
    pub started: bool,
    /// Whether `base` is the front-end's word rather than where this session was.
    pub base_is_given: bool,
    /// Whether `base` is where this session has the ring, which is set up since.
    pub base_is_ours: bool,
    /// What the guest wrote made no sense; nothing is done until the front-end stops the ring.
    pub broken: bool,
    /// Of a receive ring: stopped, or disabled while the first one was, so the front-end pauses, and will go on. Until the
    /// ring is set up and enabled again its TAP queue keeps the frames that it has.
    pub paused: bool,
}

/// What all vrings of a session are mapped with.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Shared memory.
    pub memory: &'a Arc<GuestMemory>,
    /// Virtio features.
    pub features: Features,
    /// Where writes are to be noted.
    pub log: Option<&'a Arc<DirtyLog>>,
    /// Where chains are to be noted.
    pub inflight: Option<&'a Arc<InflightRegion>>,
}

impl VringSetup {
    /// Whether everything is there that a ring needs to run.
    pub fn is_set_up(&self) -> bool {
        self.size.is_some() && self.addresses.is_some() && self.kick.is_some()
    }

    /// Maps the vring, if it is set up whole; it is number `index`.
    ///
    /// # Errors
    /// [`LayoutError`] where size and addresses do not go with the memory.
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

    /// Puts a mapped vring, of which nothing has been done since it was mapped or [read again](Vring::reread), where it
    /// goes on.
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
        // Front-ends enable last: what the driver has made available until then is not to be discarded.
        self.was_enabled |= self.enabled;
        ring.held = !self.was_enabled;
        ring.enabled = self.enabled;
        ring.broken = self.broken;
        self.call_due |= self.enabled && !self.called;
        self.called = self.enabled;
        ring.call_due = std::mem::take(&mut self.call_due);
    }

    /// Whether the used index has more weight than `base`, for a process that does not know [`Self::base_is_ours`].
    pub fn base_is_to_be_judged(&self) -> bool {
        self.base_is_given || self.kick.is_some() && !self.base_is_ours
    }

    /// How it stands while no worker has it.
    pub fn now(&self) -> VringNow {
        VringNow {
            base: self.base,
            base_is_given: self.base_is_to_be_judged(),
            // Earlier versions, if they are told so, discard what waits in a ring that was not enabled yet.
            started: self.started && self.was_enabled,
            broken: self.broken,
            call_due: self.call_due,
        }
    }

    /// Makes it as another process says that it stands.
    pub fn set_now(&mut self, now: &VringNow) {
        let VringNow { base, base_is_given, started, broken, call_due } = *now;
        self.base = base;
        self.base_is_given = base_is_given;
        self.base_is_ours = !base_is_given && self.kick.is_some();
        self.started = started;
        self.broken = broken;
        self.call_due = call_due;
    }

    /// Notes where a ring is that was taken out of its worker.
    pub fn deactivate(&mut self, ring: &Ring) {
        self.base = ring.vring.base();
        self.base_is_given = false;
        self.base_is_ours = true;
        self.broken = ring.broken;
        self.call_due |= ring.call_due;
    }

    /// Notes that the ring cannot be mapped any more: it is not started, and its driver is called when it is again.
    pub fn unmapped(&mut self) {
        self.started = false;
        self.called = false;
    }

    /// Stops the ring (`GET_VRING_BASE`): its place is kept, its kick and call are dropped. `ran`: there was a TAP, so it
    /// was worked on.
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
