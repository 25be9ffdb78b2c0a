//! A queue pair whose frames the kernel moves ([`crate::vhost_net`]).
//!
//! The worker only does what the kernel cannot: it gives the kernel the rings that are started and enabled, discards
//! what is available in a transmit ring that was enabled and is disabled, and notifies the kernel of rings without a
//! kick. Nobody but the kernel touches a ring that it was given; when the worker parks it has taken all of them back.
//!
//! ```text
//!   started ──enabled──▶ the kernel's ──park──▶ here, from the kernel's index on
//!      └──disabled again, transmit──▶ discarded here
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use baton_control::limited;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Turn;
use super::failures::Failures;
use super::pair::{KICK_EVENTS, POLLED_WAIT, QueuePair, RX_KICK, TX_KICK};
use super::ring::{Kick, Ring, Side};
use crate::features::Features;
use crate::notify::{Notifier, NotifierError};
use crate::tap::TapQueue;
use crate::vhost_net::{Start, VhostNet};

/// How often to see whether the TAP is still there, in milliseconds: vhost-net does not tell.
pub(super) const TAP_WATCH: i32 = 1000;

/// What a queue pair needs for the kernel to move its frames.
#[derive(Debug)]
pub struct KernelPath {
    /// The kernel's side.
    pub vhost: VhostNet,
    /// What the front-end acknowledged.
    pub features: Features,
    /// The kick of rings that have none.
    doorbell: Notifier,
}

impl KernelPath {
    /// For the kernel's side `vhost`.
    ///
    /// # Errors
    /// What `eventfd(2)` fails with.
    pub fn new(vhost: VhostNet) -> io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let doorbell = Notifier::try_from(std::fs::File::from(OwnedFd::from(eventfd)))
            .map_err(|error: NotifierError| io::Error::other(error))?;
        Ok(Self { vhost, features: Features::default(), doorbell })
    }

    fn start(&mut self, side: Side, ring: &Ring, tap: &TapQueue, poll: Duration) -> io::Result<()> {
        let Self { vhost, features, doorbell } = self;
        vhost.start(side, &ring.vring, &wiring(*features, doorbell, ring, tap, poll))
    }

    fn prepare(&mut self, side: Side, ring: &Ring, tap: &TapQueue, poll: Duration) -> io::Result<()> {
        let Self { vhost, features, doorbell } = self;
        vhost.prepare(side, &ring.vring, &wiring(*features, doorbell, ring, tap, poll))
    }
}

/// What the kernel starts a ring with.
fn wiring<'a>(
    features: Features,
    doorbell: &'a Notifier,
    ring: &'a Ring,
    tap: &'a TapQueue,
    poll: Duration,
) -> Start<'a> {
    let kick = match &ring.kick {
        Kick::Eventfd(kick) => kick,
        Kick::Polled => doorbell,
    };
    Start { features, tap, kick, error: ring.error.as_ref(), poll }
}

impl QueuePair {
    /// Tells the kernel of the rings, which another process works on: it is to have them in no time later.
    ///
    /// # Errors
    /// The kernel's.
    pub fn prepare_kernel(&mut self) -> io::Result<()> {
        let (Some(kernel), Some(tap)) = (&mut self.kernel, self.tap.clone()) else { return Ok(()) };
        for (side, ring) in [(Side::Rx, &self.rx.ring), (Side::Tx, &self.tx.ring)] {
            if let Some(ring) = ring {
                kernel.prepare(side, ring, &tap, self.poll)?;
            }
        }
        Ok(())
    }

    /// Has the kernel move frames, and does what it leaves to do.
    pub(super) fn turn_of_kernel(&mut self, tap: &TapQueue) -> io::Result<i32> {
        self.give(Side::Rx, tap);
        self.give(Side::Tx, tap);
        let polled = self.polled();
        if (self.look_tx || polled) && self.tx.ring.as_ref().is_some_and(|ring| !ring.enabled) {
            self.look_tx = self.tx.run(self.index, tap, &self.counters.tx, true) == Turn::More;
        } else {
            self.look_tx = false;
        }
        if tap.was_deleted() {
            return Err(io::Error::other("the TAP was deleted"));
        }
        if polled && let Some(kernel) = &self.kernel {
            kernel.doorbell.notify();
        }
        Ok(match (self.look_tx, polled, self.index) {
            (true, ..) => 0,
            (false, true, _) => POLLED_WAIT,
            (false, false, 0) => TAP_WATCH,
            (false, false, _) => -1,
        })
    }

    /// Gives the kernel the ring of `side`, if it is to run and is not the kernel's already.
    fn give(&mut self, side: Side, tap: &TapQueue) {
        let (ring, name) = match side {
            Side::Rx => (&mut self.rx.ring, "receive"),
            Side::Tx => (&mut self.tx.ring, "transmit"),
        };
        let (Some(kernel), Some(ring)) = (&mut self.kernel, ring) else { return };
        if !ring.runs() || !ring.enabled || kernel.vhost.runs(side) {
            return;
        }
        if let Err(error) = kernel.start(side, ring, tap, self.poll) {
            ring.fail(name, self.index, &error);
            return;
        }
        tracing::debug!(pair = self.index, vring = name, "the kernel has the ring");
        // Each of the driver's kicks would wake this thread, too.
        if let Kick::Eventfd(kick) = &ring.kick
            && let Err(error) = self.epoll.remove(kick)
        {
            limited!(warn, pair = self.index, %error, "cannot stop watching a kick");
        }
    }

    /// Takes the ring of `side` back, if the kernel has it.
    pub(super) fn take_from_kernel(&mut self, side: Side, failures: &Failures) {
        let (ring, token) = match side {
            Side::Rx => (&mut self.rx.ring, RX_KICK),
            Side::Tx => (&mut self.tx.ring, TX_KICK),
        };
        let (Some(kernel), Some(ring)) = (&mut self.kernel, ring) else { return };
        if !kernel.vhost.runs(side) {
            return;
        }
        let watched = match &ring.kick {
            Kick::Eventfd(kick) => self.epoll.add(kick, KICK_EVENTS, token),
            Kick::Polled => Ok(()),
        };
        match watched.and_then(|()| kernel.vhost.stop(side)) {
            Ok(base) => {
                tracing::debug!(pair = self.index, ?side, base, "the kernel has given the ring back");
                // The used index is the kernel's work, too.
                ring.vring.reread();
                ring.vring.set_next_available(base);
            }
            // Who has the ring is not known, so the process must not go on.
            Err(error) => failures.report(&error),
        }
    }
}
