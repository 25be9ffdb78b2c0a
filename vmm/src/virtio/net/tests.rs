//! vCPUs at the registers of a device whose thread is busy with its back-end: the tests take the thread's commands.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_STATUS,
};

use super::identity::Identity;
use super::mailbox::{Command, Mailbox};
use super::{Net, NetShared};
use crate::config::{Mac, NetConfig};
use crate::event;
use crate::mmio_bus::Bus;
use crate::platform::VIRTIO_MMIO_SIZE;
use crate::virtio::mmio_transport::MmioTransport;

/// Only catches a test that hangs.
const LIMIT: Duration = Duration::from_secs(60);
const VERSION_1: u64 = 1 << 32;

/// A device on a bus, and the commands to its thread.
fn busy_device() -> (Arc<Bus>, Receiver<Command>) {
    let config: NetConfig = "socket=/s,queue-pairs=2".parse().unwrap();
    let shared = Arc::new(NetShared::new(&config).unwrap());
    shared.offer(Identity { features: VERSION_1, mac: Mac::default(), mtu: 0, queue_pairs: 2 });
    let (commands, receiver) = channel();
    let net = Net::new(shared, Mailbox { commands, wake: event::new().unwrap() });
    let mut bus = Bus::default();
    bus.insert(0, VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(MmioTransport::new(net))));
    (Arc::new(bus), receiver)
}

/// Has another thread, as a vCPU, do `access`, which must come to an end.
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
fn starting_a_device_waits_for_no_back_end() {
    let (bus, commands) = busy_device();
    vcpu(&bus, negotiate);
    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_STATUS)), 0xf);
    assert!(matches!(commands.try_recv(), Ok(Command::Start(_))));
}

/// Virtio 1.2, section 2.4.1: the status is 0 when the device has stopped, and not before.
#[test]
fn other_vcpus_use_a_device_while_one_waits_for_its_reset() {
    let (bus, commands) = busy_device();
    vcpu(&bus, negotiate);
    commands.recv().unwrap();
    let resetting = {
        let bus = Arc::clone(&bus);
        std::thread::spawn(move || bus.write(VIRTIO_MMIO_STATUS.into(), &[0; 4]))
    };
    let Ok(Command::Reset(answer)) = commands.recv_timeout(LIMIT) else { panic!("no reset") };

    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_INTERRUPT_STATUS)), 1);
    vcpu(&bus, negotiate);
    assert_eq!(vcpu(&bus, |bus| read_register(bus, VIRTIO_MMIO_STATUS)), 0xf);
    assert!(!resetting.is_finished());

    answer.send(()).unwrap();
    resetting.join().unwrap();
    assert_eq!(read_register(&bus, VIRTIO_MMIO_STATUS), 0);
    negotiate(&bus);
    assert!(matches!(commands.try_recv(), Ok(Command::Start(_))));
}
