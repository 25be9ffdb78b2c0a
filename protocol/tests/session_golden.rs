//! Every packet of a session's hand-over, byte for byte, as in `handover_golden`. `BATON_GOLDEN=write` writes the files
//! of the newest version anew.

use std::path::{Path, PathBuf};

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::message::{
    Active, Commit, Descriptors, FRAMES_FD, FRONTEND_FD, Hello, INFLIGHT_FD, LISTENER_FD, LOG_FD, Message,
    OWNERSHIP_FD, PROTOCOL, Prepare, SESSION, Stage, StagedAll, call_fd, error_fd, kick_fd, memory_fd,
    tap_fd, vhost_fd,
};
use baton_protocol::handover::state::{Datapath, DeviceState, DirectionCounters, QueuePairState};
use baton_protocol::session::state::{
    AddressesState, Counters, EndpointKind, EndpointState, FreezeTimes, FrontendState, InflightState,
    KickState, LogState, PairNow, RegionState, SessionState, TakeTimes, VringNow, VringState,
};

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
        datapath: Datapath::Userspace,
        poll_us: 50,
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
        frontend: Some(FrontendState { begun: true }),
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

/// With the name of its file.
fn messages() -> Vec<(&'static str, Message)> {
    let hello = Hello {
        purpose: SESSION.to_owned(),
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

fn folder(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/session-v{version}"))
}

fn file(version: u16, name: &str) -> PathBuf {
    folder(version).join(format!("{name}.bin"))
}

#[test]
fn every_packet_is_written_as_it_was() {
    let version = PROTOCOL.versions.newest;
    let write = std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write");
    for (name, message) in messages() {
        let path = file(version, name);
        let packet = message.encode().unwrap();
        if write {
            std::fs::create_dir_all(folder(version)).unwrap();
            std::fs::write(&path, &packet).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), packet, "{}", path.display());
    }
    let files = std::fs::read_dir(folder(version)).unwrap().count();
    assert_eq!(files, messages().len(), "a message has no golden file, or a file no message");
}

#[test]
fn every_packet_of_every_version_so_far_is_read() {
    for version in PROTOCOL.versions.oldest..=PROTOCOL.versions.newest {
        for (name, message) in messages() {
            let packet = std::fs::read(file(version, name)).unwrap();
            assert_eq!(Message::decode(&packet).unwrap(), message);
        }
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
