//! The device's part in a hand-over: its description, its vhost-net instances, setting the TAP aside and using it
//! again, and the frames in hand.

use std::sync::Arc;

use baton_control::limited;
use baton_protocol::control::Datapath;

use super::{Device, DeviceConfig, DeviceError};
use crate::dataplane::pair::QueuePair;
use crate::dataplane::polling::PollTime;
use crate::dataplane::rx::FrameInHand;
use crate::dataplane::vhost::KernelPath;
use crate::dataplane::worker::Worker;
use crate::features::{Features, Offer};
use crate::tap::Tap;
use crate::vhost_net::{VhostNet, VhostNetError};
use crate::vring_setup::VringSetup;

impl Device {
    /// Returns the features that a device with these properties offers.
    pub fn offer_with(&self, config: &DeviceConfig, ufo: bool, uso: bool) -> Features {
        let offer = Offer { mac: config.mac.is_some(), mtu: config.mtu.is_some(), ufo, uso };
        Features(offer.features().0 & self.mask.0)
    }

    /// Replaces the description of the device: by that of a device that arrives, or, if it does not, by the previous
    /// one.
    pub fn describe(&mut self, config: DeviceConfig, offer: Features, pairs: usize) {
        self.config = config;
        self.offer = offer;
        self.pairs = pairs.min(self.workers.len());
    }

    /// Gives one instance to each of the first pairs that have none, if the kernel moves the frames.
    ///
    /// # Errors
    /// Returns [`VhostNetError::Open`] if an eventfd cannot be created.
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

    /// Opens a vhost-net instance for each of the first `pairs` pairs that have none, if the kernel moves the frames.
    ///
    /// # Errors
    /// Returns a [`VhostNetError`] if an instance cannot be opened, and [`VhostNetError::Open`] also if an eventfd
    /// cannot be created.
    pub fn open_vhost(&mut self, pairs: usize) -> Result<(), VhostNetError> {
        if self.datapath == Datapath::Userspace {
            return Ok(());
        }
        for worker in self.workers.iter_mut().take(pairs) {
            // A dead worker reports itself.
            let Some(pair) = worker.park() else { return Ok(()) };
            if pair.kernel.is_none() {
                let kernel = KernelPath::new(VhostNet::open()?);
                pair.kernel = Some(kernel.map_err(|source| VhostNetError::Open { hint: "", source })?);
            }
        }
        Ok(())
    }

    /// Returns how many pairs, counted from the first, have a vhost-net instance.
    pub fn vhosts(&mut self) -> usize {
        self.workers.iter_mut().filter_map(Worker::park).take_while(|pair| pair.kernel.is_some()).count()
    }

    /// Closes the instances of all pairs but the first `first`. They must not be in use.
    pub fn keep_vhosts(&mut self, first: usize) {
        for pair in self.workers.iter_mut().skip(first).filter_map(Worker::park) {
            pair.kernel = None;
        }
    }

    /// Sets the TAP aside and returns it: no pair reads it or writes to it until [`Self::use_tap`].
    ///
    /// # Errors
    /// Returns [`DeviceError::Dataplane`] if a queue's epoll registration cannot be removed. Otherwise as for
    /// [`Self::change`].
    pub fn set_tap_aside(&mut self) -> Result<Option<Tap>, DeviceError> {
        self.park_each(QueuePair::detach)?;
        limited!(info, "set the TAP aside");
        self.remember_tap();
        let tap = self.tap.take();
        self.change(.., |_| ())?;
        Ok(tap)
    }

    /// Takes ownership of `tap`: applies the session's settings to it, checks every running ring for work, and calls
    /// every driver once.
    ///
    /// # Errors
    /// Returns [`DeviceError::Tap`] if the TAP refuses a setting. Otherwise as for [`Self::change`].
    pub fn use_tap(&mut self, tap: Tap) -> Result<(), DeviceError> {
        let pairs = tap.pairs().min(self.workers.len());
        self.pairs = pairs;
        self.workers.truncate(pairs);
        self.counters.truncate(pairs);
        self.session.vrings.truncate(2 * pairs);
        self.park_all()?;
        for pair in 1..pairs {
            // The queue keeps its frames until the front-end enables or disables the pair.
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
                // While the TAP was away another process may have worked on the ring.
                vring.base_is_ours &= vring.resumes;
            }
        })?;
        self.follow_pairs()?;
        limited!(info, "uses the TAP");
        Ok(())
    }

    /// Returns whether a ring is started but the device has no TAP.
    pub fn wants_tap(&self) -> bool {
        self.tap.is_none() && self.session.vrings.iter().any(|vring| vring.started)
    }

    /// Returns whether all rings are stopped (vhost-user: "suspended").
    pub fn suspended(&self) -> bool {
        self.session.vrings.iter().all(|vring| vring.kick.is_none())
    }

    /// Returns how many queue pairs the front-end has begun to set up.
    pub fn set_up_pairs(&self) -> usize {
        let used = |vring: &VringSetup| vring.size.is_some() || vring.kick.is_some();
        self.session.vrings.iter().rposition(used).map_or(0, |vring| vring / 2 + 1)
    }

    /// Returns a copy of the frame in hand of each pair.
    ///
    /// # Errors
    /// As for [`Self::change`].
    pub fn frames_in_hand(&mut self) -> Result<Vec<Option<FrameInHand>>, DeviceError> {
        let mut frames = Vec::new();
        self.park_each(|parked| {
            frames.push(parked.rx.in_hand.clone());
            Ok(())
        })?;
        self.change(.., |_| ())?;
        Ok(frames)
    }

    /// Sets or clears the frame in hand of a pair, which is delivered before any other.
    ///
    /// # Errors
    /// As for [`Self::change`].
    pub fn set_frame_in_hand(&mut self, pair: usize, frame: Option<FrameInHand>) -> Result<(), DeviceError> {
        if let Some(worker) = self.workers.get_mut(pair) {
            worker.park().ok_or(DeviceError::Dead(pair))?.rx.in_hand = frame;
            self.change(pair..=pair, |_| ())?;
        }
        Ok(())
    }

    /// Sets how long the workers poll before they sleep.
    ///
    /// # Errors
    /// As for [`Self::change`].
    pub fn set_poll(&mut self, poll: PollTime) -> Result<(), DeviceError> {
        self.park_each(|parked| {
            parked.set_poll(poll);
            Ok(())
        })?;
        self.change(.., |_| ())
    }
}
