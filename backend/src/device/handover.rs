//! What a device does when it changes its process: it is described, its TAP put aside and used again, and what a
//! queue pair has in hand goes along.

use std::sync::Arc;
use std::time::Duration;

use baton_control::limited;
use baton_protocol::control::Datapath;

use super::{Device, DeviceConfig, DeviceError};
use crate::dataplane::pair::QueuePair;
use crate::dataplane::rx::FrameInHand;
use crate::dataplane::vhost::KernelPath;
use crate::dataplane::worker::Worker;
use crate::features::{Features, Offer};
use crate::tap::Tap;
use crate::vhost_net::{VhostNet, VhostNetError};
use crate::vring_setup::VringSetup;

impl Device {
    /// What a device with these properties offers.
    pub fn offer_with(&self, config: &DeviceConfig, ufo: bool, uso: bool) -> Features {
        let offer = Offer { mac: config.mac.is_some(), mtu: config.mtu.is_some(), ufo, uso };
        Features(offer.features().0 & self.mask.0)
    }

    /// Takes another description: of the device that arrives, or the one from before when it does not.
    pub fn describe(&mut self, config: DeviceConfig, offer: Features, pairs: usize) {
        self.config = config;
        self.offer = offer;
        self.pairs = pairs.min(self.workers.len());
    }

    /// Gives the first pairs that have no vhost-net one each, if the kernel moves the frames.
    ///
    /// # Errors
    /// [`VhostNetError::Open`] for want of an eventfd.
    pub fn give_vhost(&mut self, instances: Vec<VhostNet>) -> Result<(), VhostNetError> {
        let mut instances = instances.into_iter();
        if self.datapath == Datapath::Userspace {
            return Ok(());
        }
        for worker in &mut self.workers {
            let Some(pair) = worker.park().filter(|pair| pair.kernel.is_none()) else { continue };
            let Some(instance) = instances.next() else { break };
            self.mask = instance.masked(self.mask);
            let kernel = KernelPath::new(instance);
            pair.kernel = Some(kernel.map_err(|source| VhostNetError::Open { hint: "", source })?);
        }
        Ok(())
    }

    /// Has a vhost-net for each of the first `pairs` pairs, if the kernel moves the frames.
    ///
    /// # Errors
    /// [`VhostNetError`], and [`VhostNetError::Open`] for want of an eventfd.
    pub fn open_vhost(&mut self, pairs: usize) -> Result<(), VhostNetError> {
        if self.datapath == Datapath::Userspace {
            return Ok(());
        }
        for worker in self.workers.iter_mut().take(pairs) {
            // A dead worker is reported by itself.
            let Some(pair) = worker.park() else { return Ok(()) };
            if pair.kernel.is_none() {
                let kernel = KernelPath::new(VhostNet::open()?);
                pair.kernel = Some(kernel.map_err(|source| VhostNetError::Open { hint: "", source })?);
            }
        }
        Ok(())
    }

    /// How many pairs have a vhost-net: the first ones.
    pub fn vhosts(&mut self) -> usize {
        self.workers.iter_mut().filter_map(Worker::park).take_while(|pair| pair.kernel.is_some()).count()
    }

    /// Closes those of all pairs but the first, which are in nobody's use.
    pub fn keep_vhosts(&mut self, first: usize) {
        for pair in self.workers.iter_mut().skip(first).filter_map(Worker::park) {
            pair.kernel = None;
        }
    }

    /// Puts the TAP aside: no pair reads it or writes to it until [`Self::use_tap`].
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn set_tap_aside(&mut self) -> Result<Option<Tap>, DeviceError> {
        self.park_each(QueuePair::detach)?;
        limited!(info, "polling of the TAP is off");
        self.remember_tap();
        let tap = self.tap.take();
        self.change(.., |_| ())?;
        Ok(tap)
    }

    /// Uses `tap`, which this process owns from now on: its settings follow the session, and every ring that runs is
    /// looked at and its driver called once.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn use_tap(&mut self, tap: Tap) -> Result<(), DeviceError> {
        let pairs = tap.pairs().min(self.workers.len());
        self.pairs = pairs;
        self.workers.truncate(pairs);
        self.counters.truncate(pairs);
        self.session.vrings.truncate(2 * pairs);
        self.park_all()?;
        for pair in 1..pairs {
            // What the queue has is kept until the front-end has said what becomes of the pair.
            let receive = &mut self.session.vrings[2 * pair];
            receive.paused |= tap.is_attached(pair) && !receive.enabled;
        }
        let queues: Vec<_> = (0..pairs).map(|pair| Arc::clone(tap.queue(pair))).collect();
        self.tap = Some(tap);
        self.restore_tap();
        self.set_tap_features(self.session.features)?;
        let mut queues = queues.iter();
        self.park_each(|parked| queues.next().map_or(Ok(()), |queue| parked.attach(queue)))?;
        self.change(.., |session| {
            for vring in &mut session.vrings {
                vring.call_due |= vring.started && vring.was_enabled;
                // While there was no TAP another process may have worked on it.
                vring.base_is_ours &= vring.resumes;
            }
        })?;
        self.follow_pairs()?;
        limited!(info, "polling of the TAP is on");
        Ok(())
    }

    /// Whether a ring runs that needs a TAP, while there is none.
    pub fn wants_tap(&self) -> bool {
        self.tap.is_none() && self.session.vrings.iter().any(|vring| vring.started)
    }

    /// Whether all rings are stopped (vhost-user: "suspended").
    pub fn suspended(&self) -> bool {
        self.session.vrings.iter().all(|vring| vring.kick.is_none())
    }

    /// How many queue pairs the front-end has set up so far.
    pub fn set_up_pairs(&self) -> usize {
        let used = |vring: &VringSetup| vring.size.is_some() || vring.kick.is_some();
        self.session.vrings.iter().rposition(used).map_or(0, |vring| vring / 2 + 1)
    }

    /// The frames that were read from the TAP and not delivered yet, one a pair at most.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn frames_in_hand(&mut self) -> Result<Vec<Option<FrameInHand>>, DeviceError> {
        let mut frames = Vec::new();
        self.park_each(|parked| {
            frames.push(parked.rx.in_hand.clone());
            Ok(())
        })?;
        self.change(.., |_| ())?;
        Ok(frames)
    }

    /// Puts a frame into a pair's hand, to be delivered before any other; or takes it away.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn set_frame_in_hand(&mut self, pair: usize, frame: Option<FrameInHand>) -> Result<(), DeviceError> {
        if let Some(worker) = self.workers.get_mut(pair) {
            worker.park().ok_or(DeviceError::Dead(pair))?.rx.in_hand = frame;
            self.change(pair..=pair, |_| ())?;
        }
        Ok(())
    }

    /// Has the workers look for work for so long before they wait.
    ///
    /// # Errors
    /// [`DeviceError::Dead`], [`DeviceError::Dataplane`].
    pub fn set_poll(&mut self, poll: Duration) -> Result<(), DeviceError> {
        self.park_each(|parked| {
            parked.set_poll(poll);
            Ok(())
        })?;
        self.change(.., |_| ())
    }
}
