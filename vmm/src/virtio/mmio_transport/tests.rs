//! Tests of a driver's accesses to the registers, with a device that records its calls.

use std::cell::RefCell;
use std::sync::mpsc::channel;

use super::*;
use crate::virtio::DeviceEvents;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << 5;

struct Fake {
    events: DeviceEvents,
    notified: RefCell<Vec<u16>>,
    activations: Vec<Activation>,
    resets: usize,
    fails: bool,
}

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        1
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset).unwrap_or(0));
    }
    fn events(&self) -> &DeviceEvents {
        &self.events
    }
    fn notify(&self, queue: u16) {
        self.notified.borrow_mut().push(queue);
    }
    fn activate(&mut self, activation: Activation) {
        self.activations.push(activation);
        if self.fails {
            self.events.need_reset();
        }
    }
    fn reset(&mut self) -> Pending {
        self.resets += 1;
        Pending::new(channel().1)
    }
}

fn transport() -> MmioTransport<Fake> {
    MmioTransport::new(Fake {
        events: DeviceEvents::new().unwrap(),
        notified: RefCell::default(),
        activations: Vec::new(),
        resets: 0,
        fails: false,
    })
}

impl MmioTransport<Fake> {
    fn get(&mut self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, register: u32, value: u32) {
        let pending = self.write(u64::from(register), &value.to_le_bytes());
        pending.into_iter().for_each(Pending::wait);
    }

    fn negotiate(&mut self, features: u64) {
        for status in [1, 3] {
            self.set(VIRTIO_MMIO_STATUS, status);
        }
        for (select, value) in [(0, half(features, 0)), (1, half(features, 1))] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
        self.set(VIRTIO_MMIO_STATUS, 0xb);
    }
}

#[test]
fn registers_identify_a_version_2_network_device() {
    let mut transport = transport();
    assert_eq!(transport.get(0), 0x7472_6976);
    assert_eq!([transport.get(4), transport.get(8)], [2, 1]);
    transport.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(transport.get(VIRTIO_MMIO_DEVICE_FEATURES), 1);
    transport.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(transport.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(transport.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn driver_starts_and_resets_the_device() {
    let mut transport = transport();
    transport.negotiate(FEATURES);
    transport.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(transport.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    transport.set(VIRTIO_MMIO_QUEUE_NUM, 32);
    transport.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
    transport.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    transport.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
    transport.set(VIRTIO_MMIO_QUEUE_USED_HIGH, 2);
    transport.set(VIRTIO_MMIO_QUEUE_READY, 1);
    transport.set(VIRTIO_MMIO_QUEUE_NUM, 16);
    transport.set(VIRTIO_MMIO_STATUS, 0xf);
    transport.set(VIRTIO_MMIO_STATUS, 0xf);

    let ready = QueueSetup {
        size: 32,
        ready: true,
        descriptor_table: 0x1_0000_1000,
        available_ring: 0x2000,
        used_ring: 0x2_0000_0000,
    };
    let unused = QueueSetup { size: 256, ..QueueSetup::default() };
    assert_eq!(
        transport.device.activations,
        [Activation { features: FEATURES, queues: vec![unused, ready] }]
    );
    transport.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((transport.device.resets, transport.get(VIRTIO_MMIO_STATUS)), (1, 0));
    assert_eq!(transport.registers, Registers::after_reset(&[256, 64]));
}

#[test]
fn features_that_are_not_offered_are_not_accepted() {
    for wrong in [FEATURES | 1 << 6, 1 << 5] {
        let mut transport = transport();
        transport.negotiate(wrong);
        assert_eq!(transport.get(VIRTIO_MMIO_STATUS), 3);
        transport.set(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(transport.get(VIRTIO_MMIO_STATUS), 3);
        assert!(transport.device.activations.is_empty());
    }
}

#[test]
fn accepted_features_cannot_change() {
    let mut transport = transport();
    transport.negotiate(FEATURES);
    transport.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    transport.set(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(transport.registers.driver_features, FEATURES);
}

#[test]
fn queue_of_invalid_size_is_never_ready() {
    let mut transport = transport();
    transport.negotiate(FEATURES);
    for size in [0, 3, 512, 0x1_0040, u32::MAX] {
        transport.set(VIRTIO_MMIO_QUEUE_NUM, size);
        transport.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(transport.get(VIRTIO_MMIO_QUEUE_READY), 0, "{size}");
    }
    transport.set(VIRTIO_MMIO_QUEUE_SEL, 2);
    transport.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!([transport.get(VIRTIO_MMIO_QUEUE_NUM_MAX), transport.get(VIRTIO_MMIO_QUEUE_READY)], [0, 0]);
}

#[test]
fn device_that_cannot_start_needs_a_reset() {
    let mut transport = transport();
    transport.device.fails = true;
    transport.negotiate(FEATURES);
    transport.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(transport.get(VIRTIO_MMIO_STATUS), 0xf | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(transport.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    transport.set(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    assert_eq!(transport.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    transport.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(transport.get(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn only_existing_queues_are_notified() {
    let mut transport = transport();
    for queue in [1, 2, 0x1_0000, u32::MAX, 0] {
        transport.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    assert_eq!(*transport.device.notified.borrow(), [1, 0]);
}

#[test]
fn invalid_accesses_are_ignored() {
    let mut transport = transport();
    transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1]);
    transport.write(u64::from(VIRTIO_MMIO_STATUS) + 1, &[1, 0, 0, 0]);
    transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1; 8]);
    transport.write(CONFIG, &[1; 4]);
    transport.write(u64::MAX, &[1; 4]);
    assert_eq!(transport.registers, Registers::after_reset(&[256, 64]));
    let mut data = [0xaa; 2];
    transport.read(2, &mut data);
    assert_eq!(data, [0; 2]);
    transport.read(CONFIG + 4, &mut data);
    assert_eq!(data, [4; 2]);
}

proptest::proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in proptest::collection::vec((0_u64..0x120, 0_usize..9, proptest::prelude::any::<u64>()), 0..200),
    ) {
        let mut transport = transport();
        for (offset, length, value) in accesses {
            let pending = transport.write(offset, &value.to_le_bytes()[..length.min(8)]);
            pending.into_iter().for_each(Pending::wait);
            transport.read(offset, &mut [0; 8][..length.min(8)]);
        }
        for activation in &transport.device.activations {
            assert_eq!(activation.features & !FEATURES, 0);
        }
    }
}
