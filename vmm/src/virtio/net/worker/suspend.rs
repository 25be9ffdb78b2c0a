//! Suspends and resumes a device with its VM, and saves and restores its state when the VM migrates.

use std::sync::atomic::Ordering;

use baton_control::error_chain;
use baton_protocol::migration::state::{DriverState, NetState, Outline, RingBase};
use virtio_queue::QueueT;

use super::super::error::NetError;
use super::super::identity::{Identity, check_offer, for_backend};
use super::Worker;
use super::setup::{DeviceSetup, Suspended, rings};
use crate::event;
use crate::vhost_user::frontend::Connection;
use crate::virtio::{Activation, QueueSetup};

impl Worker {
    /// Returns the part of the driver's set-up that usually does not change while the driver runs.
    pub fn outline(&self) -> Option<Outline> {
        let device = self.device.as_ref()?;
        Some(Outline {
            features: device.features,
            active_queue_pairs: device.pairs,
            queues: device.queues.iter().copied().map(Into::into).collect(),
        })
    }

    /// Sets up the rings of a guest that still runs at the source of a migration, to shorten its blackout. If the
    /// driver changes them before the guest arrives, [`Self::restore`] sets them up again.
    pub fn prepare(&mut self, outline: Outline) -> Result<(), NetError> {
        let Outline { features, active_queue_pairs, queues } = outline;
        let connection = self.connection.as_mut().ok_or(NetError::NoBackend)?;
        check_offer(features, connection.offer())?;
        let pairs = self.config.queue_pairs;
        if queues.len() > usize::from(pairs) * 2 || !(1..=pairs).contains(&active_queue_pairs) {
            return Err(NetError::State);
        }
        let queues: Vec<QueueSetup> = queues.into_iter().map(Into::into).collect();
        let mut device =
            DeviceSetup { features, queues, control: None, pairs: active_queue_pairs, inflight: None };
        device.ready().try_for_each(|(index, queue)| queue.check(index, &self.memory).map(drop))?;
        let rings = rings(&device, &self.shared, &[]);
        connection.set_up(for_backend(features), &self.memory, &mut device.inflight, &rings)?;
        self.prepared = Some(device);
        Ok(())
    }

    /// Stops the rings. On return, nothing touches guest memory. The vCPUs must be paused. If the back-end fails, the
    /// connection is dropped and the bases are the used indices in guest memory.
    pub fn suspend(&mut self) {
        if self.suspended.is_some() {
            return;
        }
        let mut bases = match self.connection.as_mut().map_or(Ok(Vec::new()), Connection::suspend) {
            Ok(bases) => bases,
            Err(error) => {
                self.lose_connection(&error_chain(&error));
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

    /// Returns the used index of each of the driver's rings.
    fn used_indices(&self) -> Vec<(usize, u16)> {
        let ready = self.device.iter().flat_map(DeviceSetup::ready);
        ready.filter_map(|(index, setup)| Some((index, self.used_index(index, &setup).ok()?))).collect()
    }

    pub(super) fn used_index(&self, index: usize, setup: &QueueSetup) -> Result<u16, NetError> {
        let queue = setup.check(index, &self.memory)?;
        Ok(queue.used_idx(&self.memory, Ordering::Acquire).map_err(NetError::UsedIndex)?.0)
    }

    /// Starts the stopped rings. Without a back-end, they start when one connects. Must be called before the vCPUs run.
    pub fn resume(&mut self) {
        let Some(suspended) = self.suspended.take() else { return };
        if let Err(error) = self.start_rings(&suspended.bases, suspended.set_up, true) {
            self.lose_connection(&error_chain(&error));
        }
        if let Some(kick) = self.control_kick() {
            event::signal(kick);
        }
    }

    /// Returns the state of a suspended device, if a driver has set it up.
    pub fn save(&self) -> Option<DriverState> {
        let device = self.device.as_ref()?;
        Some(DriverState {
            active_queue_pairs: device.pairs,
            bases: self.suspended.as_ref().map(|suspended| suspended.bases.clone()).unwrap_or_default(),
            control: device.control.as_ref().map(|control| control.queue.save()),
        })
    }

    /// Restores the state of another VMM's device into this one, which is suspended. Makes the same checks as
    /// [`Self::start`]. Everything that can fail before the rings start is done here.
    pub fn restore(&mut self, state: &NetState) -> Result<(), NetError> {
        let identity = Identity::from(state.identity);
        let connection = self.connection.as_ref().ok_or(NetError::NoBackend)?;
        check_offer(state.transport.driver_features, connection.offer())?;
        // After a reset, the driver is offered only what both the source and this back-end offer.
        let now =
            Identity::new(connection.offer(), self.config.queue_pairs, Some(identity.mac), self.fallback)?;
        self.shared.offer(Identity { features: identity.features & now.features, ..identity });
        // A back-end that replaces this one must not change the address.
        self.config.mac = Some(identity.mac);
        self.shared.set_announce(state.announce);
        let prepared = self.prepared.take();
        let Some(driver) = &state.driver else { return self.discard_prepared(prepared) };
        let queues = state.transport.queues.iter().copied().map(Into::into).collect();
        let mut device = self.check(&Activation { features: state.transport.driver_features, queues })?;
        device.pairs = driver.active_queue_pairs;
        device.control = match (device.control, driver.control) {
            (Some(mut control), Some(state)) => {
                control.queue.restore(state);
                Some(control)
            }
            // The control virtqueue is broken until the driver resets the device.
            (_, None) => None,
            (None, Some(_)) => return Err(NetError::State),
        };
        let known = |index: usize| driver.bases.iter().any(|base| usize::from(base.index) == index);
        if !device.ready().all(|(index, _)| known(index)) {
            return Err(NetError::State);
        }
        self.shared.set_driver(device.features, device.pairs);
        match prepared {
            Some(prepared) if prepared.has_rings_of(&device) => device.inflight = prepared.inflight,
            other => {
                self.discard_prepared(other)?;
                let rings = rings(&device, &self.shared, &driver.bases);
                let connection = self.connection.as_mut().ok_or(NetError::NoBackend)?;
                connection.set_up(
                    for_backend(device.features),
                    &self.memory,
                    &mut device.inflight,
                    &rings,
                )?;
            }
        }
        let connection = self.connection.as_mut().ok_or(NetError::NoBackend)?;
        connection.set_bases(&rings(&device, &self.shared, &driver.bases))?;
        self.device = Some(device);
        self.suspended = Some(Suspended { bases: driver.bases.clone(), set_up: true });
        Ok(())
    }

    /// Disables prepared rings that do not match those of the guest.
    fn discard_prepared(&mut self, prepared: Option<DeviceSetup>) -> Result<(), NetError> {
        let (Some(connection), Some(prepared)) = (&mut self.connection, prepared) else { return Ok(()) };
        tracing::debug!("{}: the driver changed its rings during the migration", self.name);
        let rings: Vec<_> = prepared.ready().map(|(index, _)| index).collect();
        Ok(connection.disable(&rings)?)
    }
}
