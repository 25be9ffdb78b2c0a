//! The virtio-mmio transport, version 2 (Virtio 1.2, section 4.2): the registers through which a guest finds,
//! configures and starts a device.
//!
//! Kicks and calls do not pass through here: they are ioeventfds and irqfds. For each interrupt the driver reads
//! InterruptStatus and writes InterruptACK. The VMM does not see the back-end's calls, so InterruptStatus always
//! reports used buffers, and the driver checks its virtqueues. No coalesced call is lost.
//!
//! A reset lasts until the back-end has stopped. The vCPU that requested the reset waits with the transport unlocked.
//! Until then the status that any vCPU reads is not 0, because the reset is not complete (section 2.4.1), and writes
//! are ignored.
//!
//! The guest is not trusted: an access of the wrong size or at the wrong time is ignored.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_protocol::migration::state::TransportState;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use super::{Activation, QueueSetup, VirtioDevice, feature};
use crate::mmio_bus::{BusDevice, Pending};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"BTON");
/// The value of the shared-memory registers: there is no region.
const NO_SHARED_MEMORY: u32 = u32::MAX;
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// The offset of QueueNotify, for the ioeventfds.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Every status bit that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// The registers that a driver can write. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

impl Registers {
    fn after_reset(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueSetup { size, ..QueueSetup::default() }).collect(),
        }
    }
}

/// A device and its registers.
#[derive(Debug)]
pub struct MmioTransport<D> {
    registers: Registers,
    /// Present while a reset is in progress; true when the device has completed it.
    reset: Option<Arc<AtomicBool>>,
    device: D,
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// Creates a transport in its state after a reset.
    pub fn new(device: D) -> Self {
        Self { registers: Registers::after_reset(device.queue_sizes()), reset: None, device }
    }

    /// Returns the transport's state. The vCPUs must be paused, so that no reset is in progress.
    pub fn save(&mut self) -> TransportState {
        self.end_reset();
        let Registers {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
        } = &self.registers;
        let events = self.device.events();
        TransportState {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.iter().copied().map(Into::into).collect(),
            config_pending: events.config_pending(),
            config_generation: events.config_generation(),
            needs_reset: events.needs_reset(),
        }
    }

    /// Restores a validated state, and the pending events. The device's own state is restored separately.
    pub fn restore(&mut self, state: &TransportState) {
        let TransportState {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            config_pending,
            config_generation,
            needs_reset,
        } = state;
        self.registers = Registers {
            status: status & DRIVER_STATUS,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.iter().copied().map(Into::into).collect(),
        };
        self.device.events().restore(*config_pending, *config_generation, *needs_reset);
    }

    fn has(&self, bit: u32) -> bool {
        self.registers.status & bit != 0
    }

    fn read_register(&self, register: u32) -> u32 {
        let registers = &self.registers;
        let queue = self.selected_queue();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.device.features(), registers.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                queue.map_or(0, |(index, _)| u32::from(self.device.queue_sizes()[index]))
            }
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |(_, queue)| u32::from(queue.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => {
                let config = if self.device.events().config_pending() { VIRTIO_MMIO_INT_CONFIG } else { 0 };
                VIRTIO_MMIO_INT_VRING | config
            }
            VIRTIO_MMIO_STATUS => {
                let needs_reset = self.has(VIRTIO_CONFIG_S_DRIVER_OK) && self.device.events().needs_reset();
                registers.status | if needs_reset { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
            }
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.events().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) -> Option<Pending> {
        match register {
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value)
                    && usize::from(queue) < self.registers.queues.len()
                {
                    self.device.notify(queue);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                if value & VIRTIO_MMIO_INT_CONFIG != 0 {
                    self.device.events().acknowledge_config();
                }
            }
            _ => self.write_queue(register, value),
        }
        None
    }

    fn write_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_select {
            0 => set_low(features, value),
            1 => set_high(features, value),
            _ => {}
        }
    }

    fn selected_queue(&self) -> Option<(usize, &QueueSetup)> {
        let index = usize::try_from(self.registers.queue_select).ok()?;
        Some((index, self.registers.queues.get(index)?))
    }

    fn write_queue(&mut self, register: u32, value: u32) {
        let Some((index, queue)) = self.selected_queue() else { return };
        // A running device keeps its virtqueues until a reset.
        let configurable = self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        if !configurable || (queue.ready && register != VIRTIO_MMIO_QUEUE_READY) {
            return;
        }
        let max = self.device.queue_sizes()[index];
        let queue = &mut self.registers.queues[index];
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_READY => {
                queue.ready = value == 1 && queue.size.is_power_of_two() && queue.size <= max;
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) -> Option<Pending> {
        if value == 0 {
            return self.reset();
        }
        // A driver only adds bits. NEEDS_RESET belongs to the device; the driver may write it back.
        let added = value & DRIVER_STATUS & !self.registers.status;
        for bit in [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED] {
            self.registers.status |= added & bit;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.has(VIRTIO_CONFIG_S_DRIVER)
            && self.features_acceptable()
        {
            self.registers.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.registers.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            let activation = Activation {
                features: self.registers.driver_features,
                queues: self.registers.queues.clone(),
            };
            self.device.activate(activation);
        }
        None
    }

    fn features_acceptable(&self) -> bool {
        let wanted = self.registers.driver_features;
        wanted & !self.device.features() == 0 && wanted & feature(VIRTIO_F_VERSION_1) != 0
    }

    fn reset(&mut self) -> Option<Pending> {
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            let pending = self.device.reset();
            self.reset = Some(pending.ended());
            return Some(pending);
        }
        self.clear();
        None
    }

    /// Ends a reset that the device has completed. Returns false while a reset is in progress.
    fn end_reset(&mut self) -> bool {
        match &self.reset {
            Some(ended) if !ended.load(Ordering::Acquire) => return false,
            Some(_) => self.clear(),
            None => {}
        }
        true
    }

    fn clear(&mut self) {
        self.device.events().clear();
        self.registers = Registers::after_reset(self.device.queue_sizes());
        self.reset = None;
    }
}

impl<D: VirtioDevice> BusDevice for MmioTransport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.end_reset();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
            return;
        }
        let register = u32::try_from(offset).ok().filter(|register| register.is_multiple_of(4));
        match (register, <&mut [u8; 4]>::try_from(&mut *data)) {
            (Some(register), Ok(data)) => *data = self.read_register(register).to_le_bytes(),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending> {
        // A virtio 1 driver cannot write to a network device's configuration space.
        if !self.end_reset() || offset >= CONFIG {
            return None;
        }
        let register = u32::try_from(offset).ok().filter(|register| register.is_multiple_of(4))?;
        self.write_register(register, u32::from_le_bytes(data.try_into().ok()?))
    }
}

/// Returns the low (0) or the high (1) half of a feature mask, and 0 for any other `select`.
fn half(mask: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = mask.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
