//! The name and text of every refusal of a hand-over and of a migration. Each case breaks one field.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use baton_protocol::handover::device::validate::{Capabilities, CheckedDevice, check_without_tap};
use baton_protocol::handover::wire::device::{DeviceState, FrameExtent, Place, QueuePairState};
use baton_protocol::migration::facts::{MachineFacts, NetFacts};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::state::{
    DriverState, NetIdentity, NetState, PlatformState, QueueState, RingBase, SerialState, TransportState,
    VcpuState, VmState,
};
use baton_protocol::migration::validate::{CheckedState, judge};
use baton_protocol::reasons::Reasons;

fn pair() -> QueuePairState {
    QueuePairState { using_vnet_hdr: true, host_vnet_hdr_len: 12, enabled: true, ..QueuePairState::default() }
}

fn device() -> DeviceState {
    DeviceState {
        tap: "tap0".to_owned(),
        queue_pairs: vec![pair(), pair()],
        features: 3,
        protocol_features: 3,
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: Some(1500),
        downscript: Some("/etc/down".to_owned()),
        ..DeviceState::default()
    }
}

fn capabilities() -> Capabilities {
    Capabilities {
        queue_pairs: Some(2),
        vhost_fds: Some(2),
        features: 7,
        protocol_features: 7,
        acknowledged: 1,
        set_up_pairs: 1,
        same_user: true,
        place: Some(Place { net: 1, ..Place::default() }),
    }
}

/// Returns the refusal of a device after `change` broke the device or the target.
fn device_refusal(change: impl FnOnce(&mut DeviceState, &mut Capabilities)) -> String {
    let (mut device, mut target) = (device(), capabilities());
    change(&mut device, &mut target);
    CheckedDevice::try_from((device, &target)).unwrap_err().to_string()
}

#[test]
fn matching_device_is_accepted() {
    assert_eq!(CheckedDevice::try_from((device(), &capabilities())).unwrap().state(), &device());
}

#[test]
fn device_refusal_has_the_expected_name_and_text() {
    let frame = |offset, length| Some(FrameExtent { offset, length });
    let cells = [
        (
            device_refusal(|device, _| device.queue_pairs.clear()),
            "queue-pair-range: the source has 0 queue pairs; the valid range is 1 to 128",
        ),
        (
            device_refusal(|_, target| target.queue_pairs = Some(3)),
            "queue-pairs: the source has 2 queue pairs, the target 3;",
        ),
        (
            device_refusal(|_, target| target.set_up_pairs = 4),
            "queue-pairs: the source has 2 queue pairs, the target 4;",
        ),
        (
            device_refusal(|_, target| target.vhost_fds = Some(1)),
            "vhost-fds: the source has 2 queue pairs, but the target's --vhost-fds lists 1",
        ),
        (
            device_refusal(|device, _| device.features = 0x18),
            "features: the target does not support the negotiated features 0x18;",
        ),
        (
            device_refusal(|_, target| target.acknowledged = 0x20),
            "front-end-features: the target's front-end acknowledged features 0x20,",
        ),
        (
            device_refusal(|device, _| device.protocol_features = 8),
            "protocol-features: the target does not support the negotiated protocol features 0x8;",
        ),
        (
            device_refusal(|device, _| device.queue_pairs[1].using_vnet_hdr = false),
            "vnet-hdr: queue pair 1 has no virtio-net header",
        ),
        (
            device_refusal(|device, _| {
                device.queue_pairs.iter_mut().for_each(|pair| pair.host_vnet_hdr_len = 20);
            }),
            "header-size: queue pair 0 has a virtio-net header of 20 bytes; it must have 10 or 12",
        ),
        (
            device_refusal(|device, _| device.queue_pairs[1].has_ufo = true),
            "mixed-queues: queue pair 1 describes the TAP differently",
        ),
        (device_refusal(|device, _| device.queue_pairs[1].has_uso = true), "mixed-queues: queue pair 1"),
        (device_refusal(|device, _| device.queue_pairs[1].has_tunnel = true), "mixed-queues: queue pair 1"),
        (
            device_refusal(|device, _| device.queue_pairs[1].host_vnet_hdr_len = 10),
            "mixed-queues: queue pair 1",
        ),
        (device_refusal(|device, _| device.tap.clear()), "tap-name: invalid TAP name \"\""),
        (device_refusal(|device, _| device.tap = "a/b".to_owned()), "tap-name: "),
        (device_refusal(|device, _| device.tap = "a".repeat(16)), "tap-name: "),
        (
            device_refusal(|device, _| device.mac = Some([1, 0, 0, 0, 0, 1])),
            "mac: the guest's MAC address is not a unicast address",
        ),
        (device_refusal(|device, _| device.mac = Some([0; 6])), "mac: "),
        (device_refusal(|device, _| device.mtu = Some(67)), "mtu: MTU 67 is below 68"),
        (
            device_refusal(|device, _| device.downscript = Some("down".to_owned())),
            "downscript: the path of downscript \"down\" is not absolute",
        ),
        (
            device_refusal(|_, target| target.same_user = false),
            "downscript-user: the downscript \"/etc/down\" comes from another user",
        ),
        (
            device_refusal(|device, target| {
                device.downscript_place = Some(Place::default());
                target.place = None;
            }),
            "downscript-place: the downscript \"/etc/down\" would run in a place that the target cannot compare",
        ),
        (
            device_refusal(|device, _| device.downscript_place = Some(Place::default())),
            "downscript-place: the downscript \"/etc/down\" would run in another network namespace; run the target",
        ),
        (
            device_refusal(|device, _| device.queue_pairs[1].frame_in_hand = frame(0, 10)),
            "frame-in-hand: the frame in hand of queue pair 1",
        ),
        (
            device_refusal(|device, _| device.queue_pairs[1].frame_in_hand = frame(u64::MAX, 70)),
            "frame-in-hand: ",
        ),
        (
            device_refusal(|device, _| device.queue_pairs[1].frame_in_hand = frame(0, 65_564)),
            "frame-in-hand: ",
        ),
        (
            device_refusal(|device, _| {
                device.queue_pairs[0].frame_in_hand = frame(0, 70);
                device.queue_pairs[1].frame_in_hand = frame(69, 70);
            }),
            "frame-in-hand: the frame in hand of queue pair 1",
        ),
    ];
    for (said, expected) in cells {
        assert!(said.starts_with(expected), "expected {expected:?}, got {said:?}");
        assert!(!said.contains("; and "), "more than one reason: {said}");
    }
}

#[test]
fn refusal_lists_all_reasons() {
    let broken = DeviceState { tap: String::new(), mtu: Some(1), features: 0x18, ..device() };
    let reasons = CheckedDevice::try_from((broken.clone(), &capabilities())).unwrap_err();
    let names: Vec<_> = reasons.0.iter().map(|reason| reason.name.as_str()).collect();
    assert_eq!(names, ["features", "tap-name", "mtu"]);
    // Without a TAP only the negotiated virtio features are checked.
    let reasons = check_without_tap(&broken, capabilities().features).unwrap_err();
    assert_eq!(reasons.0.iter().map(|reason| reason.name.as_str()).collect::<Vec<_>>(), ["features"]);
}

fn net() -> NetFacts {
    NetFacts {
        queue_pairs: 2,
        local: true,
        device_state: true,
        connected: true,
        features: 3,
        mac: Some([2, 0, 0, 0, 0, 1]),
    }
}

fn machine() -> MachineFacts {
    MachineFacts { cpus: 2, memory: 1 << 29, moves_tsc: true, nested: false, net: vec![net()] }
}

/// Returns the refusal of a VM after `change` broke the source or the target.
fn machine_refusal(change: impl FnOnce(&mut MachineFacts, &mut MachineFacts)) -> String {
    let (mut source, mut target) = (machine(), machine());
    change(&mut source, &mut target);
    Reasons::of(judge(&source, &target)).to_string()
}

#[test]
fn vm_refusal_has_the_expected_name_and_text() {
    assert_eq!(judge(&machine(), &machine()), []);
    let cells = [
        (
            machine_refusal(|_, target| target.cpus = 1),
            "cpus: the VM has 2 vCPUs, the target 1; start the target with --cpus=2",
        ),
        (
            machine_refusal(|_, target| target.memory = 1 << 28),
            "memory: the VM has 536870912 bytes of memory, the target 268435456; start the target with --memory=536870912",
        ),
        (
            machine_refusal(|source, _| source.moves_tsc = false),
            "tsc: the source's KVM cannot migrate the time stamp counter",
        ),
        (machine_refusal(|_, target| target.moves_tsc = false), "tsc: the target's KVM cannot"),
        (machine_refusal(|source, _| source.nested = true), "nested: the guest uses hardware virtualisation"),
        (
            machine_refusal(|_, target| target.net.push(net())),
            "devices: the VM has 1 network devices, the target 2;",
        ),
        (
            machine_refusal(|_, target| target.net[0].queue_pairs = 1),
            "queue-pairs: network device 0 has 2 queue pairs, the target's 1;",
        ),
        (
            machine_refusal(|_, target| target.net[0].local = false),
            "local-migration: network device 0 has local-migration=on, the target's off",
        ),
        (
            machine_refusal(|source, _| source.net[0].local = false),
            "local-migration: network device 0 has local-migration=off, the target's on",
        ),
        (
            machine_refusal(|source, _| source.net[0].device_state = false),
            "device-state: the source's back-end of network device 0 does not offer device state",
        ),
        (
            machine_refusal(|_, target| target.net[0].device_state = false),
            "device-state: the target's back-end of network device 0",
        ),
        (
            machine_refusal(|source, _| source.net[0].connected = false),
            "back-end: the source's back-end of network device 0 is not connected",
        ),
        (
            machine_refusal(|_, target| target.net[0].connected = false),
            "back-end: the target's back-end of network device 0",
        ),
        (
            machine_refusal(|source, _| source.net[0].features = 0x18),
            "features: the guest uses the features 0x18 of network device 0,",
        ),
        (
            machine_refusal(|_, target| target.net[0].mac = Some([2, 0, 0, 0, 0, 2])),
            "mac: network device 0 has a different MAC address",
        ),
    ];
    for (said, expected) in cells {
        assert!(said.starts_with(expected), "expected {expected:?}, got {said:?}");
    }
    // A target without a configured MAC address accepts any. A device that does not move needs no device state.
    let mut target = machine();
    target.net[0].mac = None;
    assert_eq!(judge(&machine(), &target), []);
    let mut stays = machine();
    (stays.net[0].local, stays.net[0].device_state) = (false, false);
    assert_eq!(judge(&stays, &stays), []);
}

fn state() -> VmState {
    let queue = QueueState { size: 256, ready: true, ..QueueState::default() };
    let transport =
        TransportState { driver_features: 1, queues: vec![queue; 5], ..TransportState::default() };
    let bases = (0..4).map(|index| RingBase { index, base: 7 }).collect();
    let identity = NetIdentity { features: 3, queue_pairs: 2, ..NetIdentity::default() };
    let driver = DriverState { active_queue_pairs: 2, bases, control: None };
    VmState {
        vcpus: vec![VcpuState::default(), VcpuState::default()],
        platform: PlatformState::default(),
        serial: SerialState::default(),
        net: vec![NetState { identity, transport, announce: false, driver: Some(driver) }],
    }
}

fn state_refusal(change: impl FnOnce(&mut VmState)) -> String {
    let mut state = state();
    change(&mut state);
    CheckedState::new(state, &machine()).unwrap_err().to_string()
}

#[test]
fn invalid_vm_state_is_refused() {
    assert_eq!(*CheckedState::new(state(), &machine()).unwrap(), state());
    fn driver(state: &mut VmState) -> &mut DriverState {
        state.net[0].driver.as_mut().unwrap()
    }
    let cells = [
        (state_refusal(|state| state.vcpus.truncate(1)), "1 vCPUs instead of 2"),
        (
            state_refusal(|state| state.vcpus[1].cpuid = vec![Default::default(); 257]),
            "vCPU 1 has too many MSRs or CPUID entries",
        ),
        (state_refusal(|state| state.serial.input = vec![0; 65]), "more serial input than the port can hold"),
        (state_refusal(|state| state.net.clear()), "0 network devices instead of 1"),
        (
            state_refusal(|state| state.net[0].identity.queue_pairs = 1),
            "network device 0: 1 queue pairs instead of 2",
        ),
        (
            state_refusal(|state| state.net[0].transport.queues.truncate(4)),
            "network device 0: 4 virtqueues for 2 queue pairs",
        ),
        (
            state_refusal(|state| state.net[0].transport.queues[2].size = 100),
            "network device 0: invalid virtqueue size 100",
        ),
        (
            state_refusal(|state| state.net[0].transport.driver_features = 8),
            "network device 0: the driver acknowledged features that were not offered",
        ),
        (
            state_refusal(|state| driver(state).active_queue_pairs = 3),
            "network device 0: 3 active queue pairs, not 1 to 2",
        ),
        (
            state_refusal(|state| driver(state).bases[3].index = 4),
            "network device 0: invalid or duplicate base of virtqueue 4",
        ),
        (
            state_refusal(|state| driver(state).bases[3].index = 2),
            "network device 0: invalid or duplicate base of virtqueue 2",
        ),
    ];
    for (said, expected) in cells {
        assert_eq!(said, format!("state: invalid VM state: {expected}"));
    }
}

#[test]
fn refusals_from_outside_the_checks_have_the_expected_name_and_text() {
    let text = || "why".to_owned();
    let all = [
        (Refusal::Ram(text()), "ram", "guest memory: why"),
        (Refusal::Descriptors(text()), "descriptors", "why"),
        (Refusal::Ownership(text()), "ownership", "why"),
        (Refusal::Target(text()), "target", "the target failed: why"),
        (
            Refusal::Tap { device: 1, error: text() },
            "tap",
            "the target's back-end of network device 1 cannot take over the TAP: why; start it with --incoming-fds \
             and without a TAP of its own",
        ),
        (Refusal::Busy, "busy", "the target is not waiting for a VM"),
        (Refusal::User(text()), "user", "why"),
    ];
    for (refusal, name, said) in all {
        assert_eq!((refusal.name(), refusal.to_string().as_str()), (name, said));
    }
}
