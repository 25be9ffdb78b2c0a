//! The packets of a session's hand-over, and what a target refuses of them.

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::device::validate;
use baton_protocol::handover::session::validate::{Capabilities, CheckedCommit, CheckedSession, fd_names};
use baton_protocol::handover::wire::device::{Datapath, DeviceState, DirectionCounters, QueuePairState};
use baton_protocol::handover::wire::message::{
    Active, Commit, Descriptors, FRAMES_FD, FRONTEND_FD, Hello, INFLIGHT_FD, LISTENER_FD, LOG_FD, Message,
    OWNERSHIP_FD, Prepare, Stage, StagedAll, call_fd, error_fd, kick_fd, memory_fd, tap_fd, vhost_fd,
};
use baton_protocol::handover::wire::session::{
    AddressesState, Counters, EndpointKind, EndpointState, FreezeTimes, FrontendState, InflightState,
    KickState, LogState, PairNow, RegionState, SessionState, TakeTimes, VringNow, VringState,
};

use super::{check_decoded, check_encoded};

fn device() -> DeviceState {
    let pair =
        QueuePairState { using_vnet_hdr: true, host_vnet_hdr_len: 12, enabled: true, ..Default::default() };
    DeviceState {
        tap: "tap0".to_owned(),
        queue_pairs: vec![pair],
        features: 0x1_7000_0000,
        protocol_features: 0x8_9009,
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: None,
        sndbuf: None,
        downscript: None,
        downscript_place: None,
        datapath: Datapath::Userspace,
        poll_us: 50,
        poll_auto: false,
    }
}

/// Every field has a value of its own somewhere.
fn session() -> SessionState {
    let receive = VringState {
        size: Some(256),
        addresses: Some(AddressesState {
            descriptors: 0x7000_1000,
            available: 0x7000_2000,
            used: 0x7000_3000,
        }),
        log_used: Some(0x3000),
        base: 17,
        base_is_given: true,
        kick: KickState::Fd,
        call: true,
        error: true,
        enabled: true,
        resumes: true,
        was_enabled: true,
        started: true,
        broken: true,
        paused: true,
        call_due: true,
    };
    let transmit = VringState { size: Some(512), kick: KickState::Polled, ..VringState::default() };
    let region = RegionState {
        guest_address: 0x1000,
        size: 0x10_0000,
        user_address: 0x7000_0000,
        file_offset: 0,
        count: 1,
    };
    SessionState {
        frontend: Some(FrontendState { begun: true, device_state_moved: None }),
        endpoint: EndpointState { kind: EndpointKind::Listening, path: Some("/run/baton.sock".to_owned()) },
        regions: vec![
            region,
            RegionState {
                guest_address: 0x1_0000_0000,
                user_address: 0x7f00_0000_0000,
                file_offset: 0x10_0000,
                count: 3,
                ..region
            },
        ],
        log: Some(LogState { offset: 0, size: 0x20_0000 }),
        inflight: Some(InflightState { offset: 4096, size: 16384, queues: 2, entries: 256 }),
        vrings: vec![receive, transmit],
    }
}

fn counters(first: u64) -> DirectionCounters {
    DirectionCounters {
        frames: first,
        bytes: first + 1,
        large_frames: first + 2,
        largest_frame: first + 3,
        dropped: first + 4,
        discarded: first + 5,
        kicks: first + 6,
        calls: first + 7,
    }
}

fn commit() -> Commit {
    Commit {
        epoch: 1,
        vrings: vec![
            VringNow { base: 65535, base_is_given: true, started: true, broken: true, call_due: true },
            VringNow { base: 3, ..VringNow::default() },
        ],
        pairs: vec![PairNow { frame: Some(1514), rx: counters(100).into(), tx: counters(1 << 40).into() }],
        times: FreezeTimes { freeze: 5_000_000_000, stopped: 5_000_050_000, sent: 5_000_060_000 },
    }
}

/// Every message, with the name of its file.
fn messages() -> Vec<(&'static str, Message)> {
    let hello = Hello {
        purpose: "session".to_owned(),
        program: "baton-backend 0.1.0".to_owned(),
        dry_run: false,
        wants_vhost: false,
    };
    let first = [FRONTEND_FD, LISTENER_FD, LOG_FD, INFLIGHT_FD, OWNERSHIP_FD, FRAMES_FD];
    let first = first.map(str::to_owned).into_iter().chain([memory_fd(0), memory_fd(1)]);
    let rest = [kick_fd(0), call_fd(0), error_fd(0), tap_fd(0), vhost_fd(0)];
    vec![
        ("hello", Message::Hello(hello.clone())),
        ("welcome", Message::Hello(Hello { wants_vhost: true, ..hello })),
        ("prepare", Message::Prepare(Prepare { device: device(), session: Some(Box::new(session())) })),
        (
            "stage",
            Message::Stage(Box::new(Stage {
                device: device(),
                session: session(),
                more: 1,
                fds: FdManifest::new(first),
            })),
        ),
        ("descriptors", Message::Descriptors(Descriptors { fds: FdManifest::new(rest) })),
        ("staged", Message::Staged(StagedAll {})),
        ("commit", Message::Commit(commit())),
        (
            "active",
            Message::Active(Active {
                epoch: 1,
                times: TakeTimes { received: 5_000_080_000, taken: 5_000_081_000, running: 5_000_090_000 },
            }),
        ),
    ]
}

#[test]
fn every_packet_is_written_as_it_was() {
    check_encoded("session", &messages());
}

#[test]
fn every_packet_of_every_version_so_far_is_read() {
    check_decoded("session", &messages());
}

/// Version 1 without it is what `stage.bin` holds.
#[test]
fn how_a_transfer_of_device_state_ended_is_told_where_there_was_one() {
    for moved in [Some(true), Some(false)] {
        let frontend = Some(FrontendState { begun: true, device_state_moved: moved });
        let session = SessionState { frontend, ..session() };
        let stage = Stage { device: device(), session, more: 0, fds: FdManifest::default() };
        let message = Message::Stage(Box::new(stage));
        assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
    }
}

#[test]
fn the_largest_session_fits_into_a_packet() {
    let most = |_| counters(u64::MAX - 7);
    let pair = QueuePairState {
        has_ufo: true,
        has_uso: true,
        has_tunnel: true,
        rx: most(0),
        tx: most(1),
        ..device().queue_pairs[0]
    };
    let device = DeviceState {
        queue_pairs: vec![pair; 128],
        mtu: Some(1500),
        sndbuf: Some(u32::MAX),
        downscript: Some(format!("/{}", "x".repeat(4095))),
        ..device()
    };
    let address = AddressesState { descriptors: u64::MAX, available: u64::MAX, used: u64::MAX };
    let vring = VringState {
        size: Some(32768),
        addresses: Some(address),
        log_used: Some(u64::MAX),
        base: u16::MAX,
        ..session().vrings[0]
    };
    let region = RegionState {
        guest_address: u64::MAX,
        size: u64::MAX,
        user_address: u64::MAX,
        file_offset: u64::MAX,
        count: u32::MAX,
    };
    let session = SessionState { regions: vec![region; 509], vrings: vec![vring; 256], ..session() };
    let fds = FdManifest::new((0..253).map(memory_fd));
    let stage = Message::Stage(Box::new(Stage { device, session, more: 9, fds })).encode().unwrap();
    // Unix sockets have room for as much, less 32 bytes.
    assert!(stage.len() < 212_992 - 32);
    let pair = PairNow { frame: Some(65_563), rx: most(0).into(), tx: most(1).into() };
    let commit = Commit {
        epoch: u64::MAX,
        vrings: vec![commit().vrings[0]; 256],
        pairs: vec![pair; 128],
        times: FreezeTimes { freeze: u64::MAX, stopped: u64::MAX, sent: u64::MAX },
    };
    assert!(Message::Commit(commit).encode().unwrap().len() < 64 * 1024);
}

#[test]
fn counters_travel_without_their_names() {
    let whole = counters(7);
    assert_eq!(DirectionCounters::from(&Counters::from(whole)), whole);
    let longer = Counters((7..20).collect());
    assert_eq!(DirectionCounters::from(&longer), whole);
    let shorter = DirectionCounters::from(&Counters(vec![7, 8]));
    assert_eq!(shorter, DirectionCounters { frames: 7, bytes: 8, ..DirectionCounters::default() });
}

fn target() -> Capabilities {
    let device = validate::Capabilities {
        features: u64::MAX,
        protocol_features: u64::MAX,
        same_user: true,
        ..validate::Capabilities::default()
    };
    Capabilities { device, max_regions: 509, has_frontend: false }
}

#[test]
fn each_thing_that_is_wrong_has_its_name() {
    type Case = (&'static str, fn(&mut SessionState, &mut DeviceState, &mut Capabilities));
    let cases: [Case; 32] = [
        ("", |_, _, _| {}),
        // Before a front-end has said anything.
        ("", |session, _, _| {
            *session = SessionState { vrings: vec![VringState::default(); 2], ..Default::default() }
        }),
        // Set up before its memory is there.
        ("", |session, _, _| {
            session.regions.clear();
            session.vrings[0].kick = KickState::None;
            session.vrings[0].started = false;
        }),
        ("features", |_, _, target| target.device.features = 0),
        ("front-end", |_, _, target| target.has_frontend = true),
        ("endpoint", |session, _, _| session.endpoint.kind = EndpointKind::Other),
        ("endpoint", |session, _, _| session.endpoint.path = None),
        ("endpoint", |session, _, _| session.endpoint.path = Some("run/baton.sock".to_owned())),
        ("endpoint", |session, _, _| session.endpoint.path = Some(format!("/{}", "x".repeat(107)))),
        ("endpoint", |session, _, _| session.endpoint.path = Some("/\0".to_owned())),
        ("endpoint", |session, _, _| session.endpoint.kind = EndpointKind::Listener),
        ("vrings", |session, _, _| session.vrings.push(VringState::default())),
        ("vrings", |session, _, _| session.vrings.truncate(1)),
        ("memory-regions", |_, _, target| target.max_regions = 1),
        ("memory-region", |session, _, _| session.regions[1].size = 0),
        ("memory-region", |session, _, _| session.regions[1].count = 0),
        ("memory-region", |session, _, _| session.regions[1].guest_address = u64::MAX),
        ("memory-region", |session, _, _| session.regions[1].file_offset = u64::MAX),
        ("memory-region", |session, _, _| session.regions[1].guest_address = 0x10_0fff),
        ("memory-region", |session, _, _| session.regions[1].user_address = 0x7000_0000 - 0xf_ffff),
        ("region", |session, _, _| session.log = Some(LogState { offset: 1, size: u64::MAX })),
        ("region", |session, _, _| session.log = Some(LogState::default())),
        ("region", |session, _, _| session.inflight = Some(InflightState::default())),
        ("vring-size", |session, _, _| session.vrings[1].size = Some(100)),
        ("vring-size", |session, _, _| session.vrings[1].size = Some(0)),
        ("vring-address", |session, _, _| session.regions.truncate(0)),
        ("vring-address", |session, _, _| {
            session.vrings[0].addresses =
                Some(AddressesState { descriptors: 0x7000_1008, available: 0x7000_2000, used: 0x7000_3000 });
        }),
        // The used ring ends two bytes behind the region.
        ("vring-address", |session, _, _| {
            session.vrings[0].addresses = Some(AddressesState {
                descriptors: 0x7000_1000,
                available: 0x7000_2000,
                used: 0x7010_0000 - 2052,
            });
        }),
        ("vring-kick", |session, _, _| session.vrings[1].kick = KickState::Other),
        ("vring-started", |session, _, _| session.vrings[0].kick = KickState::None),
        ("header-size", |_, device, _| device.queue_pairs[0].host_vnet_hdr_len = 20),
        ("tap-name", |_, device, _| device.tap.clear()),
    ];
    for (number, (name, change)) in cases.into_iter().enumerate() {
        let (mut session, mut device, mut target) = (session(), device(), target());
        change(&mut session, &mut device, &mut target);
        let refused: Vec<_> = match CheckedSession::try_from((device, session, &target)) {
            Ok(_) => Vec::new(),
            Err(reasons) => reasons.0.iter().map(|reason| reason.name.clone()).collect(),
        };
        let expected: Vec<&str> = Some(name).filter(|name| !name.is_empty()).into_iter().collect();
        assert_eq!(refused, expected, "case {number}");
    }
}

#[test]
fn all_reasons_are_told_at_once() {
    let mut session = session();
    session.regions[0].size = 0;
    session.vrings[1].size = Some(3);
    let device = DeviceState { mtu: Some(1), ..device() };
    let target = Capabilities { has_frontend: true, ..target() };
    let reasons = CheckedSession::try_from((device, session, &target)).unwrap_err();
    let names: Vec<_> = reasons.0.iter().map(|reason| reason.name.as_str()).collect();
    assert_eq!(names, ["front-end", "memory-region", "vring-address", "vring-size", "mtu"]);
}

#[test]
fn a_commit_goes_with_its_session() {
    type Case = (&'static str, fn(&mut Commit));
    let cases: [Case; 9] = [
        ("", |_| {}),
        ("commit", |commit| commit.epoch = 2),
        ("commit", |commit| commit.epoch = (1 << 56) + 1),
        ("commit", |commit| commit.pairs.push(PairNow::default())),
        ("commit", |commit| commit.pairs.clear()),
        ("commit", |commit| commit.vrings.truncate(1)),
        ("frame-in-hand", |commit| commit.pairs[0].frame = Some(10)),
        ("frame-in-hand", |commit| commit.pairs[0].frame = Some(65_564)),
        ("vring-started", |commit| commit.vrings[1].started = true),
    ];
    let mut session = session();
    session.vrings[1].kick = KickState::None;
    let session = CheckedSession::try_from((device(), session, &target())).unwrap();
    for (name, change) in cases {
        let mut commit = commit();
        change(&mut commit);
        let refused: Vec<_> = match CheckedCommit::try_from((commit, &session.shape())) {
            Ok(_) => Vec::new(),
            Err(reasons) => reasons.0.iter().map(|reason| reason.name.clone()).collect(),
        };
        let expected: Vec<&str> = Some(name).filter(|name| !name.is_empty()).into_iter().collect();
        assert_eq!(refused, expected);
    }
}

#[test]
fn each_frame_in_hand_has_a_place_of_its_own() {
    let device = DeviceState { queue_pairs: vec![device().queue_pairs[0]; 3], ..device() };
    let session = SessionState { vrings: vec![VringState::default(); 6], ..session() };
    let session = CheckedSession::try_from((device, session, &target())).unwrap();
    let frame = |frame| PairNow { frame, ..PairNow::default() };
    let pairs = vec![frame(Some(65_563)), frame(None), frame(Some(70))];
    let commit = Commit { epoch: 1, vrings: vec![VringNow::default(); 6], pairs, ..Commit::default() };
    let commit = CheckedCommit::try_from((commit, &session.shape())).unwrap();
    assert_eq!(commit.frames().collect::<Vec<_>>(), [(0, 0, 65_563), (2, 2 * 69_632, 70)]);
}

#[test]
fn every_descriptor_has_a_name() {
    let names = fd_names(&device(), &session(), true);
    let expected = [
        "ownership",
        "frames",
        "frontend",
        "listener",
        "memory/0",
        "memory/1",
        "log",
        "inflight",
        "kick/0",
        "call/0",
        "error/0",
        "tap/0",
        "vhost/0",
    ];
    assert_eq!(names, expected);
    let nothing = SessionState { vrings: vec![VringState::default(); 2], ..SessionState::default() };
    assert_eq!(fd_names(&device(), &nothing, false), ["ownership", "frames", "tap/0"]);
}

#[test]
fn lists_without_end_are_cut_short_and_refused() {
    let session = SessionState {
        vrings: vec![VringState::default(); 100_000],
        regions: vec![session().regions[0]; 1000],
        ..session()
    };
    let prepare = Message::Prepare(Prepare { device: device(), session: Some(Box::new(session)) });
    let Message::Prepare(read) = Message::decode(&prepare.encode().unwrap()).unwrap() else { panic!() };
    let session = *read.session.unwrap();
    assert_eq!((session.vrings.len(), session.regions.len()), (257, 510));
    let reasons = CheckedSession::try_from((device(), session, &target())).unwrap_err();
    let names: Vec<_> = reasons.0.iter().map(|reason| reason.name.as_str()).collect();
    assert_eq!(names, ["vrings", "memory-regions"]);
}
