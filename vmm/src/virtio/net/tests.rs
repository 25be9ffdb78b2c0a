//! Tests of vCPUs that access a device whose worker is busy with its back-end. The tests take the worker's tasks.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_STATUS,
};

use super::identity::Identity;
use super::mailbox::{Inbox, mailbox};
use super::{Net, NetShared};
use crate::config::{Mac, NetConfig};
use crate::mmio_bus::Bus;
use crate::platform::VIRTIO_MMIO_SIZE;
use crate::virtio::mmio_transport::MmioTransport;

/// Reached only if a test hangs.
const LIMIT: Duration = Duration::from_secs(60);
const VERSION_1: u64 = 1 << 32;

/// Returns a device on a bus, and the tasks of its worker.
fn busy_device() -> (Arc<Bus>, Inbox) {
    let config: NetConfig = "socket=/s,queue-pairs=2".parse().unwrap();
    let shared = Arc::new(NetShared::new(&config).unwrap());
    shared.offer(Identity { features: VERSION_1, mac: Mac::default(), mtu: 0, queue_pairs: 2 });
    let (mailbox, inbox) = mailbox().unwrap();
    let net = Net::new(shared, mailbox);
    let mut bus = Bus::default();
    bus.insert(0, VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(MmioTransport::new(net))));
    (Arc::new(bus), inbox)
}

/// Carries out `access` on another thread, like a vCPU. It must not block.
fn vcpu<T: Send + 'static>(bus: &Arc<Bus>, access: impl FnOnce(&Bus) -> T + Send + 'static) -> T {
    let (done, outcome) = channel();
    let bus = Arc::clone(bus);
    std::thread::spawn(move || done.send(access(&bus)).unwrap());
    outcome.recv_timeout(LIMIT).expect("the vCPU is stuck")
}

fn read_register(bus: &Bus, register: u32) -> u32 {
    let mut data = [0; 4];
    bus.read(register.into(), &mut data);
    u32::from_le_bytes(data)
}

fn negotiate(bus: &Bus) {
    let write = |register: u32, value: u32| bus.write(register.into(), &value.to_le_bytes());
    for status in [1, 3] {
        write(VIRTIO_MMIO_STATUS, status);
    }
    write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    for status in [0xb, 0xf] {
        write(VIRTIO_MMIO_STATUS, status);
    }
}

#[test]
fn starting_a_device_does_not_wait_for_its_back_end() {
    let (bus, inbox) = busy_device();
    vcpu(&bus, negotiate);
    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_STATUS)), 0xf);
    drop(inbox.tasks.try_recv().unwrap());
}

/// Virtio 1.2, section 2.4.1: the status is 0 when the device has stopped, and not before.
#[test]
fn other_vcpus_can_use_a_device_while_one_waits_for_its_reset() {
    let (bus, inbox) = busy_device();
    vcpu(&bus, negotiate);
    drop(inbox.tasks.recv().unwrap());
    let resetting = {
        let bus = Arc::clone(&bus);
        std::thread::spawn(move || bus.write(VIRTIO_MMIO_STATUS.into(), &[0; 4]))
    };
    let reset = inbox.tasks.recv_timeout(LIMIT).unwrap();

    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_INTERRUPT_STATUS)), 1);
    vcpu(&bus, negotiate);
    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_STATUS)), 0xf);
    assert!(!resetting.is_finished());

    // Ends the reset, as if the worker had run the task.
    drop(reset);
    resetting.join().unwrap();
    assert_eq!(read_register(&bus, VIRTIO_MMIO_STATUS), 0);
    negotiate(&bus);
    drop(inbox.tasks.try_recv().unwrap());
}
