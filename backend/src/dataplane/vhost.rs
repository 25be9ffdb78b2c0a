//! A queue pair whose frames the kernel moves ([`crate::vhost_net`]).
//!
//! The worker does only what the kernel cannot. It hands the kernel the rings that are started and enabled, discards
//! the available chains of a transmit ring that was enabled and is now disabled, and kicks the kernel for rings without
//! a kick. Only the kernel touches a ring that it has. The worker takes all rings back before it parks.
//!
//! ```text
//!   started ──enabled──▶ the kernel has it ──park──▶ the worker has it, at the kernel's index
//!      └──disabled again, transmit──▶ the worker discards its chains
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

/// How often to check that the TAP still exists, in milliseconds. vhost-net does not report its deletion.
pub(super) const TAP_WATCH: i32 = 1000;

/// What a queue pair needs for the kernel to move its frames.
#[derive(Debug)]
pub struct KernelPath {
    /// The vhost-net instance.
    pub vhost: VhostNet,
    /// The features that the front-end acknowledged.
    pub features: Features,
    /// The kick for rings that have none.
    doorbell: Notifier,
}

impl KernelPath {
    /// Creates the kernel path that uses `vhost`.
    ///
    /// # Errors
    /// Returns the error of `eventfd(2)`.
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

/// Returns what the kernel needs to start a ring.
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
    /// Describes the rings to the kernel while another process still works on them, so that starting them is fast.
    ///
    /// # Errors
    /// Returns the kernel's error if it rejects a ring.
    pub fn prepare_kernel(&mut self) -> io::Result<()> {
        let (Some(kernel), Some(tap)) = (&mut self.kernel, self.tap.clone()) else { return Ok(()) };
        for (side, ring) in [(Side::Rx, &self.rx.ring), (Side::Tx, &self.tx.ring)] {
            if let Some(ring) = ring {
                kernel.prepare(side, ring, &tap, self.polling.fixed())?;
            }
        }
        Ok(())
    }

    /// Hands the rings to the kernel and does the rest of the work. Returns the timeout for [`QueuePair::turn`].
    pub(super) fn turn_of_kernel(&mut self, tap: &TapQueue) -> io::Result<i32> {
        self.give(Side::Rx, tap);
        self.give(Side::Tx, tap);
        let polled = self.polled();
        if (self.look_tx || polled) && self.tx.ring.as_ref().is_some_and(|ring| !ring.enabled) {
            let turn = self.tx.run(self.index, tap, &self.counters.tx, None);
            self.look_tx = turn == Turn::More || !self.tx.enable_kicks();
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

    /// Hands the kernel the ring of `side`, if the ring is started and enabled and the kernel does not have it yet.
    fn give(&mut self, side: Side, tap: &TapQueue) {
        let (ring, name) = match side {
            Side::Rx => (&mut self.rx.ring, "receive"),
            Side::Tx => (&mut self.tx.ring, "transmit"),
        };
        let (Some(kernel), Some(ring)) = (&mut self.kernel, ring) else { return };
        if !ring.runs() || !ring.enabled || kernel.vhost.runs(side) {
            return;
        }
        if let Err(error) = kernel.start(side, ring, tap, self.polling.fixed()) {
            ring.fail(name, self.index, &error);
            return;
        }
        tracing::debug!(pair = self.index, vring = name, "handed the ring to the kernel");
        // Otherwise each kick would wake this thread, too.
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
                tracing::debug!(pair = self.index, ?side, base, "took the ring back from the kernel");
                // The kernel has advanced the used index, too.
                ring.vring.reread();
                ring.vring.set_next_available(base);
            }
            // The kernel may still use the ring, so the process must end.
            Err(error) => failures.report(&error),
        }
    }
}
