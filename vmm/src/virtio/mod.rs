//! Virtio devices (Virtual I/O Device Version 1.2): the transport that a guest drives, and the device behind it.
//!
//! [`mmio_transport`] is the register file in front of a [`VirtioDevice`]. The only such device is [`net`]: its
//! back-end serves the data virtqueues, and its own thread serves the control virtqueue ([`control_queue`]).

pub mod control_queue;
pub mod mmio_transport;
pub mod net;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use baton_protocol::migration::state::QueueState;
use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::memory::GuestMemory;
use crate::mmio_bus::Pending;

/// Returns feature bit `number` as a mask.
pub const fn feature(number: u32) -> u64 {
    1 << number
}

/// A virtqueue as the driver has set it up. Plain and untrusted data: [`QueueSetup::check`] validates it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// The number of its descriptors.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// The descriptor table's guest address.
    pub descriptor_table: u64,
    /// The available ring's guest address.
    pub available_ring: u64,
    /// The used ring's guest address.
    pub used_ring: u64,
}

impl From<QueueState> for QueueSetup {
    fn from(state: QueueState) -> Self {
        let QueueState { size, ready, descriptor_table, available_ring, used_ring } = state;
        Self { size, ready, descriptor_table, available_ring, used_ring }
    }
}

impl From<QueueSetup> for QueueState {
    fn from(setup: QueueSetup) -> Self {
        let QueueSetup { size, ready, descriptor_table, available_ring, used_ring } = setup;
        Self { size, ready, descriptor_table, available_ring, used_ring }
    }
}

/// A virtqueue that is misaligned or not in guest memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("virtqueue {index} of {size} descriptors is misaligned or not in guest memory")]
pub struct InvalidQueue {
    /// Its index.
    pub index: usize,
    /// Its size.
    pub size: u16,
}

impl QueueSetup {
    /// Returns the virtqueue if it is valid and all of it is in guest memory.
    pub fn check(&self, index: usize, memory: &GuestMemory) -> Result<Queue, InvalidQueue> {
        let invalid = InvalidQueue { index, size: self.size };
        let mut queue = Queue::new(self.size).map_err(|_| invalid)?;
        queue
            .try_set_desc_table_address(vm_memory::GuestAddress(self.descriptor_table))
            .map_err(|_| invalid)?;
        queue
            .try_set_avail_ring_address(vm_memory::GuestAddress(self.available_ring))
            .map_err(|_| invalid)?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.used_ring)).map_err(|_| invalid)?;
        queue.set_ready(true);
        if queue.is_valid(memory) { Ok(queue) } else { Err(invalid) }
    }
}

/// What a driver has negotiated when it starts a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activation {
    /// The features it acknowledged: a subset of those offered.
    pub features: u64,
    /// All virtqueues, ready or not.
    pub queues: Vec<QueueSetup>,
}

/// A device behind a transport. All methods are called with the transport locked, so none may wait for a back-end.
pub trait VirtioDevice: Send {
    /// Returns the virtio device type.
    fn device_type(&self) -> u32;
    /// Returns the largest size of each virtqueue.
    fn queue_sizes(&self) -> &[u16];
    /// Returns the features offered.
    fn features(&self) -> u64;
    /// Fills `data` from the configuration space, and with zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Returns the device's events: configuration changes, and whether it needs a reset.
    fn events(&self) -> &DeviceEvents;
    /// Tells the device that the driver has made buffers available in a virtqueue.
    fn notify(&self, queue: u16);
    /// Starts the device as the driver has set it up. If that is not possible, the device needs a reset.
    fn activate(&mut self, activation: Activation);
    /// Begins to stop the device. Once stopped, it does not touch guest memory.
    fn reset(&mut self) -> Pending;
}

/// Tells a driver that the configuration has changed, or that the device needs a reset.
#[derive(Debug)]
pub struct DeviceEvents {
    interrupt: EventFd,
    config_pending: AtomicBool,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl DeviceEvents {
    /// Creates the events, none of them pending.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: event::new()?,
            config_pending: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        })
    }

    /// Returns the interrupt for these events, to be registered as an irqfd.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.config_pending.store(true, Ordering::SeqCst);
        event::signal(&self.interrupt);
    }

    /// Tells the driver that only a reset makes the device work again.
    pub fn need_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    /// Restores the events of another VMM's device, and interrupts the driver again if one is pending.
    fn restore(&self, config_pending: bool, config_generation: u32, needs_reset: bool) {
        self.config_generation.store(config_generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.config_pending.store(config_pending, Ordering::SeqCst);
        if config_pending {
            event::signal(&self.interrupt);
        }
    }

    fn config_pending(&self) -> bool {
        self.config_pending.load(Ordering::SeqCst)
    }

    fn acknowledge_config(&self) {
        self.config_pending.store(false, Ordering::SeqCst);
    }

    fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn clear(&self) {
        self.config_pending.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> QueueSetup {
        QueueSetup {
            size: 16,
            ready: true,
            descriptor_table: 0x1000,
            available_ring: 0x2000,
            used_ring: 0x3000,
        }
    }

    #[test]
    fn queue_must_be_valid_and_in_guest_memory() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        queue().check(0, &memory).unwrap();
        let end = 64 << 20;
        for wrong in [
            QueueSetup { size: 0, ..queue() },
            QueueSetup { size: 3, ..queue() },
            QueueSetup { size: 65535, ..queue() },
            QueueSetup { descriptor_table: end - 16, ..queue() },
            QueueSetup { descriptor_table: 0x1008, ..queue() },
            QueueSetup { available_ring: end - 4, ..queue() },
            QueueSetup { available_ring: 0x2001, ..queue() },
            QueueSetup { used_ring: u64::MAX - 3, ..queue() },
            QueueSetup { used_ring: 0x3002, ..queue() },
            QueueSetup { used_ring: end, ..queue() },
        ] {
            assert!(wrong.check(0, &memory).is_err(), "{wrong:?}");
        }
    }
}
