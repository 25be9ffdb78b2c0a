//! A device that stands still while its VM does, and what of it goes to the device of another VMM.

use std::sync::atomic::Ordering;

use baton_control::error_chain;
use baton_protocol::migration::state::{DriverState, NetState, Outline, RingBase};
use virtio_queue::QueueT;

use super::super::identity::{Identity, check_offer, for_backend};
use super::super::thread::NetError;
use super::Worker;
use super::started::{Started, Suspended, rings};
use crate::event;
use crate::vhost_user::frontend::Link;
use crate::virtio::{Activation, QueueSetup};

impl Worker {
    /// What the driver has started, as far as it usually stays while the driver runs.
    pub fn outline(&self) -> Option<Outline> {
        let device = self.device.as_ref()?;
        Some(Outline {
            features: device.features,
            active_queue_pairs: device.pairs,
            queues: device.queues.iter().copied().map(Into::into).collect(),
        })
    }

    /// Tells the back-end of the rings that a guest, which runs elsewhere yet, will most likely bring along: all that can be
    /// told before the guest is here, so that it does not stand still meanwhile. Nothing is lost if the driver changes it
    /// until then: [`Self::restore`] compares.
    pub fn expect(&mut self, outline: Outline) -> Result<(), NetError> {
        let Outline { features, active_queue_pairs, queues } = outline;
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        check_offer(features, link.offer())?;
        let pairs = self.config.queue_pairs;
        if queues.len() > usize::from(pairs) * 2 || !(1..=pairs).contains(&active_queue_pairs) {
            return Err(NetError::State);
        }
        let queues: Vec<QueueSetup> = queues.into_iter().map(Into::into).collect();
        let mut device =
            Started { features, queues, control: None, pairs: active_queue_pairs, inflight: None };
        device.ready().try_for_each(|(index, queue)| queue.check(index, &self.memory).map(drop))?;
        let rings = rings(&device, &self.shared, &[]);
        link.set_up(for_backend(features), &self.memory, &mut device.inflight, &rings)?;
        self.expected = Some(device);
        Ok(())
    }

    /// Stops the rings; on return nobody touches guest memory. The vCPUs stand still. A back-end that fails here is lost,
    /// and where it was is read from guest memory.
    pub fn suspend(&mut self) {
        if self.suspended.is_some() {
            return;
        }
        let mut bases = match self.link.as_mut().map_or(Ok(Vec::new()), Link::suspend) {
            Ok(bases) => bases,
            Err(error) => {
                self.lose(&error_chain(&error));
                Vec::new()
            }
        };
        if bases.is_empty() {
            bases = self.used_indices();
        }
        let base = |(index, base)| Some(RingBase { index: u16::try_from(index).ok()?, base });
        let bases = bases.into_iter().filter_map(base).collect();
        self.suspended = Some(Suspended { bases, set_up: false });
    }

    /// The index up to which each ring of the driver's was used.
    pub(super) fn used_indices(&self) -> Vec<(usize, u16)> {
        let ready = self.device.iter().flat_map(Started::ready);
        ready.filter_map(|(index, setup)| Some((index, self.used_index(index, &setup).ok()?))).collect()
    }

    pub(super) fn used_index(&self, index: usize, setup: &QueueSetup) -> Result<u16, NetError> {
        let queue = setup.check(index, &self.memory)?;
        Ok(queue.used_idx(&self.memory, Ordering::Acquire).map_err(NetError::UsedIndex)?.0)
    }

    /// Starts the rings that were stopped, or has them started as soon as there is a back-end; before the vCPUs run.
    pub fn resume(&mut self) {
        let Some(suspended) = self.suspended.take() else { return };
        if let Err(error) = self.start_rings(&suspended.bases, suspended.set_up, true) {
            self.lose(&error_chain(&error));
        }
        if let Some(kick) = self.control_kick() {
            event::signal(kick);
        }
    }

    /// What the driver has started; the device is suspended.
    pub fn save(&self) -> Option<DriverState> {
        let device = self.device.as_ref()?;
        Some(DriverState {
            active_queue_pairs: device.pairs,
            bases: self.suspended.as_ref().map(|suspended| suspended.bases.clone()).unwrap_or_default(),
            control: device.control.as_ref().map(|control| control.queue.save()),
        })
    }

    /// Takes on what another device's driver has started; the device is suspended. The same checks as of a driver's own
    /// start, and all that can fail before the rings are started.
    pub fn restore(&mut self, state: &NetState) -> Result<(), NetError> {
        let identity = Identity::from(state.identity);
        let link = self.link.as_ref().ok_or(NetError::NoBackend)?;
        check_offer(state.transport.driver_features, link.offer())?;
        // After a reset the driver is offered no more than it was, and no more than there is now.
        let now = Identity::new(link.offer(), self.config.queue_pairs, Some(identity.mac), self.fallback)?;
        self.shared.offer(Identity { features: identity.features & now.features, ..identity });
        // Another back-end that comes does not change it.
        self.config.mac = Some(identity.mac);
        self.shared.set_announce(state.announce);
        let expected = self.expected.take();
        let Some(driver) = &state.driver else { return self.disappoint(expected) };
        let queues = state.transport.queues.iter().copied().map(Into::into).collect();
        let mut device = self.accept(&Activation { features: state.transport.driver_features, queues })?;
        device.pairs = driver.active_queue_pairs;
        device.control = match (device.control, driver.control) {
            (Some(mut control), Some(state)) => {
                control.queue.restore(state);
                Some(control)
            }
            // It is out of order until the driver resets the device.
            (_, None) => None,
            (None, Some(_)) => return Err(NetError::State),
        };
        let known = |index: usize| driver.bases.iter().any(|base| usize::from(base.index) == index);
        if !device.ready().all(|(index, _)| known(index)) {
            return Err(NetError::State);
        }
        self.shared.set_driver(device.features, device.pairs);
        match expected {
            Some(expected) if expected.is_like(&device) => device.inflight = expected.inflight,
            other => {
                self.disappoint(other)?;
                let rings = rings(&device, &self.shared, &driver.bases);
                let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
                link.set_up(for_backend(device.features), &self.memory, &mut device.inflight, &rings)?;
            }
        }
        let link = self.link.as_mut().ok_or(NetError::NoBackend)?;
        link.place(&rings(&device, &self.shared, &driver.bases))?;
        self.device = Some(device);
        self.suspended = Some(Suspended { bases: driver.bases.clone(), set_up: true });
        Ok(())
    }

    /// What the back-end was told of a driver is not so.
    pub(super) fn disappoint(&mut self, expected: Option<Started>) -> Result<(), NetError> {
        let (Some(link), Some(expected)) = (&mut self.link, expected) else { return Ok(()) };
        tracing::debug!("{}: the driver has changed its rings meanwhile", self.name);
        let rings: Vec<_> = expected.ready().map(|(index, _)| index).collect();
        Ok(link.disable(&rings)?)
    }
}
