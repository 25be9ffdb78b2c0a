//! The messages of a VM's migration, and what a target refuses of them.

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::migration::facts::{MachineFacts, NetFacts};
use baton_protocol::migration::message::{
    Active, Commit, Hello, Message, OWNERSHIP_FD, PROTOCOL, Prepare, Prepared, RamRegion, Ready, Refuse,
    State, Welcome, device_fd, ram_fd,
};
use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::state::{
    Clock, ControlState, DriverState, Msr, NetIdentity, NetState, Opaque, Outline, PlatformState, QueueState,
    RingBase, SerialState, TransportState, VcpuState, VmState,
};
use baton_protocol::migration::validate::{CheckedState, judge};
use baton_protocol::reasons::{Reason, Reasons};

use super::{check_decoded, check_encoded};

fn bytes(first: u8, length: usize) -> Opaque {
    Opaque((0..length).map(|at| first.wrapping_add(u8::try_from(at % 256).unwrap())).collect())
}

fn vcpu(first: u8) -> VcpuState {
    VcpuState {
        cpuid: vec![bytes(first, 40), bytes(first + 1, 40)],
        run_state: bytes(first + 2, 4),
        registers: bytes(first + 3, 144),
        special_registers: bytes(first + 4, 312),
        extended_state: bytes(first + 5, 4096),
        extended_controls: bytes(first + 6, 392),
        debug_registers: bytes(first + 7, 128),
        local_apic: bytes(first + 8, 1024),
        events: bytes(first + 9, 64),
        msrs: vec![Msr { index: 0xc000_0080, value: 0xd01 }, Msr { index: 0x11, value: u64::MAX }],
        tsc_khz: 2_400_000,
        tsc_offset: u64::MAX - 7,
    }
}

fn queue(first: u64) -> QueueState {
    QueueState {
        size: 256,
        ready: true,
        descriptor_table: first,
        available_ring: first + 0x1000,
        used_ring: first + 0x2000,
    }
}

fn vm() -> VmState {
    let platform = PlatformState {
        pic_primary: bytes(60, 520),
        pic_secondary: bytes(61, 520),
        io_apic: bytes(62, 520),
        timer: bytes(63, 112),
        clock: Clock { guest: 1_000_000_007, host: 3_000_000_019 },
    };
    let serial = SerialState {
        divisor_low: 12,
        divisor_high: 1,
        interrupt_enable: 5,
        interrupt_identification: 2,
        line_control: 19,
        line_status: 96,
        modem_control: 11,
        modem_status: 176,
        scratch: 90,
        input: b"root\n".to_vec(),
    };
    let net = NetState {
        identity: NetIdentity { features: 0x1_3063_ffa3, mac: [2, 0, 0, 0, 0, 1], mtu: 1400, queue_pairs: 1 },
        transport: TransportState {
            status: 15,
            device_features_select: 1,
            driver_features_select: 1,
            driver_features: 0x1_3063_ff83,
            queue_select: 2,
            queues: vec![queue(0x10_0000), queue(0x20_0000), queue(0x30_0000)],
            config_pending: true,
            config_generation: 3,
            needs_reset: false,
        },
        announce: true,
        driver: Some(DriverState {
            active_queue_pairs: 1,
            bases: vec![RingBase { index: 0, base: 7 }, RingBase { index: 1, base: 65535 }],
            control: Some(ControlState { next_available: 4, next_used: 3 }),
        }),
    };
    VmState { vcpus: vec![vcpu(1), vcpu(101)], platform, serial, net: vec![net] }
}

fn facts() -> MachineFacts {
    let net = NetFacts {
        queue_pairs: 1,
        local: true,
        device_state: true,
        connected: true,
        features: 0x1_3063_ff83,
        mac: Some([2, 0, 0, 0, 0, 1]),
    };
    MachineFacts { cpus: 2, memory: 512 << 20, moves_tsc: true, nested: false, net: vec![net] }
}

/// Every message, with the name of its file.
fn messages() -> Vec<(&'static str, Message)> {
    let program = || "baton-vmm 0.1.0".to_owned();
    let names = [ram_fd(0), ram_fd(1), OWNERSHIP_FD.to_owned(), device_fd(0)];
    let ram = vec![RamRegion { start: 0, length: 3 << 30 }, RamRegion { start: 4 << 30, length: 1 << 30 }];
    let queues = vec![queue(0x10_0000), queue(0x20_0000)];
    let net = vec![Some(Outline { features: 0x1_3063_ff83, active_queue_pairs: 1, queues }), None];
    // As version 1 first worded them: a text may change, the golden file does not.
    let reason = |name: &str, text: &str| Reason { name: name.to_owned(), text: text.to_owned() };
    let reasons = Reasons(vec![
        reason("busy", "the target waits for no VM"),
        reason("cpus", "the VM has 2 vCPUs, the target 1; start the target with --cpus=2"),
    ]);
    let hello = Hello { program: program(), dry_run: true, local: true, machine: facts() };
    vec![
        ("hello", Message::Hello(hello)),
        ("welcome", Message::Welcome(Welcome { program: program() })),
        ("refuse", Message::Refuse(Refuse { reasons })),
        ("prepare", Message::Prepare(Prepare { ram, fds: FdManifest::new(names), net })),
        ("prepared", Message::Prepared(Prepared {})),
        ("state", Message::State(State { running: true, vm: vm() })),
        ("ready", Message::Ready(Ready {})),
        ("commit", Message::Commit(Commit { epoch: 1 })),
        ("active", Message::Active(Active { running: false })),
    ]
}

#[test]
fn every_message_is_written_as_it_was() {
    check_encoded("migration", &messages());
}

#[test]
fn every_message_of_every_version_so_far_is_read() {
    check_decoded("migration", &messages());
}

#[test]
fn the_largest_vm_fits_into_a_message() {
    let mut vm = vm();
    let mut cpu = vcpu(1);
    cpu.cpuid = vec![bytes(0, 40); 256];
    cpu.msrs = vec![Msr { index: u32::MAX, value: u64::MAX }; 300];
    vm.vcpus = vec![cpu; 16];
    let net = &mut vm.net[0];
    net.transport.queues = vec![queue(1 << 40); 257];
    let driver = net.driver.as_mut().unwrap();
    driver.bases = (0..256).map(|index| RingBase { index, base: u16::MAX }).collect();
    vm.net = vec![vm.net[0].clone(); 19];
    Message::State(State { running: true, vm }).encode().unwrap();
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    type Case = (&'static str, fn(&mut MachineFacts, &mut MachineFacts));
    let cases: [Case; 18] = [
        ("", |_, _| {}),
        ("", |source, target| {
            source.net[0].local = false;
            target.net[0] = NetFacts { local: false, device_state: false, ..target.net[0] };
        }),
        ("", |_, target| target.net[0].mac = None),
        ("", |source, _| source.net[0].features = 0),
        ("cpus", |_, target| target.cpus = 1),
        ("memory", |source, _| source.memory = 1 << 30),
        ("devices", |source, _| source.net.push(NetFacts::default())),
        ("devices", |_, target| target.net.clear()),
        ("queue-pairs", |_, target| target.net[0].queue_pairs = 2),
        ("local-migration", |_, target| target.net[0].local = false),
        ("local-migration", |source, _| source.net[0].local = false),
        ("device-state", |_, target| target.net[0].device_state = false),
        ("device-state", |source, _| source.net[0].device_state = false),
        ("back-end", |_, target| target.net[0] = NetFacts { connected: false, features: 0, ..target.net[0] }),
        ("features", |_, target| target.net[0].features &= !(1 << 15)),
        ("mac", |_, target| target.net[0].mac = Some([2, 0, 0, 0, 0, 2])),
        ("tsc", |_, target| target.moves_tsc = false),
        ("nested", |source, _| source.nested = true),
    ];
    for (name, change) in cases {
        let (mut source, mut target) = (facts(), facts());
        change(&mut source, &mut target);
        let refused: Vec<_> = judge(&source, &target).iter().map(Refusal::name).collect();
        let expected: Vec<&str> = Some(name).filter(|name| !name.is_empty()).into_iter().collect();
        assert_eq!(refused, expected);
    }
}

#[test]
fn all_reasons_are_told_at_once() {
    let mut target = facts();
    target.cpus = 1;
    target.net[0] = NetFacts { queue_pairs: 4, local: false, mac: Some([2, 0, 0, 0, 0, 9]), ..target.net[0] };
    let refusals = judge(&facts(), &target);
    let names: Vec<_> = refusals.iter().map(Refusal::name).collect();
    assert_eq!(names, ["cpus", "queue-pairs", "local-migration", "mac"]);
    let text = Reasons::of(refusals).to_string();
    assert!(text.contains("local-migration=on, the target's off"), "{text}");
}

#[test]
fn a_state_must_fit_the_machine_and_itself() {
    type Case = (&'static str, fn(&mut VmState));
    fn driver(vm: &mut VmState) -> &mut DriverState {
        vm.net[0].driver.as_mut().unwrap()
    }
    let cases: [Case; 16] = [
        ("", |_| {}),
        ("", |vm| vm.net[0].driver = None),
        ("1 vCPUs instead of 2", |vm| vm.vcpus.truncate(1)),
        ("vCPU 1 has too many MSRs", |vm| vm.vcpus[1].msrs = vec![Msr { index: 0, value: 0 }; 5000]),
        ("vCPU 0 has too many MSRs", |vm| vm.vcpus[0].cpuid = vec![Opaque::default(); 300]),
        ("more serial input", |vm| vm.serial.input = vec![0; 65]),
        ("0 network devices instead of 1", |vm| vm.net.clear()),
        ("device 0: 2 queue pairs instead of 1", |vm| vm.net[0].identity.queue_pairs = 2),
        ("device 0: 2 virtqueues", |vm| vm.net[0].transport.queues.truncate(2)),
        ("device 0: invalid virtqueue size 3", |vm| vm.net[0].transport.queues[1].size = 3),
        ("device 0: invalid virtqueue size 0", |vm| vm.net[0].transport.queues[1].size = 0),
        ("device 0: the driver acknowledged features", |vm| vm.net[0].transport.driver_features = u64::MAX),
        ("device 0: 0 active", |vm| driver(vm).active_queue_pairs = 0),
        ("device 0: 2 active", |vm| driver(vm).active_queue_pairs = 2),
        ("device 0: invalid or duplicate base of virtqueue 2", |vm| driver(vm).bases[1].index = 2),
        ("device 0: invalid or duplicate base of virtqueue 0", |vm| driver(vm).bases[1].index = 0),
    ];
    for (text, change) in cases {
        let mut vm = vm();
        change(&mut vm);
        match CheckedState::new(vm, &facts()) {
            Ok(_) => assert_eq!(text, ""),
            Err(reasons) => {
                let said = reasons.to_string();
                assert!(!text.is_empty() && said.contains(text) && reasons.0.len() == 1, "{said}: {text}");
            }
        }
    }
}

#[test]
fn a_field_of_a_newer_version_is_skipped() {
    #[derive(serde::Serialize)]
    struct Newer {
        epoch: u64,
        colour: String,
        more: Vec<u8>,
    }
    let newer = Newer { epoch: 9, colour: "blue".to_owned(), more: vec![1, 2, 3] };
    let packet = baton_protocol::codec::encode(PROTOCOL, 8, &newer).unwrap();
    assert_eq!(Message::decode(&packet).unwrap(), Message::Commit(Commit { epoch: 9 }));
}
