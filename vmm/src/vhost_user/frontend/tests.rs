//! Tests of a connection to a back-end that records its messages.

use super::*;
use crate::vhost_user::fake_backend::{FakeBackend, Serving};

fn establish(backend: FakeBackend, rings: u16) -> (Result<Connection, ConnectionError>, Serving) {
    let (here, there) = UnixStream::pair().unwrap();
    let serving = backend.serve(there);
    (Connection::establish(here, rings), serving)
}

fn setup() -> QueueSetup {
    QueueSetup { size: 256, ready: true, descriptor_table: 0x1000, available_ring: 0x2000, used_ring: 0x3000 }
}

const GREETING: [&str; 6] = [
    "SET_OWNER",
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES 0x3209",
    "GET_QUEUE_NUM",
    "GET_CONFIG 0 12",
];

#[test]
fn device_is_started_and_stopped_in_the_standard_order() {
    let memory = crate::memory::allocate(64 << 20).unwrap();
    let (kick, call) = (event::new().unwrap(), event::new().unwrap());
    let (connection, serving) = establish(FakeBackend::new(4), 4);
    let mut connection = connection.unwrap();
    let ring =
        |index, base, enabled| RingStart { index, setup: setup(), base, enabled, kick: &kick, call: &call };

    let rings = [ring(0, 0, true), ring(3, 7, false)];
    connection.set_up(1 << 32 | 1 << 15, &memory, &mut None, &rings).unwrap();
    connection.set_bases(&rings).unwrap();
    connection.start_rings(&rings).unwrap();
    connection.enable_pairs(2).unwrap();
    connection.stop().unwrap();
    drop(connection);

    let backend = serving.finish();
    assert_eq!(backend.memory.iter().map(|region| region.1).collect::<Vec<_>>(), [64 << 20]);
    let started = [
        "SET_FEATURES 0x140008000",
        "SET_MEM_TABLE",
        "GET_INFLIGHT_FD 4 256",
        "SET_INFLIGHT_FD 4 256",
        "SET_VRING_NUM 0 256",
        "SET_VRING_ADDR 0 0x1000 0x2000 0x3000",
        "SET_VRING_CALL 0",
        "SET_VRING_ENABLE 0 1",
        "SET_VRING_NUM 3 256",
        "SET_VRING_ADDR 3 0x1000 0x2000 0x3000",
        "SET_VRING_CALL 3",
        "SET_VRING_ENABLE 3 0",
        "SET_VRING_BASE 0 0",
        "SET_VRING_BASE 3 7",
        "SET_VRING_KICK 0",
        "SET_VRING_KICK 3",
        "SET_VRING_ENABLE 0 1",
        "SET_VRING_ENABLE 3 1",
        "GET_VRING_BASE 0",
        "GET_VRING_BASE 3",
        "RESET_DEVICE",
    ];
    assert_eq!(backend.log, [&GREETING[..], &started].concat());
}

#[test]
fn stop_disables_rings_of_a_back_end_without_reset_device() {
    let memory = crate::memory::allocate(64 << 20).unwrap();
    let (kick, call) = (event::new().unwrap(), event::new().unwrap());
    let mut backend = FakeBackend::new(2);
    backend.protocol.remove(VhostUserProtocolFeatures::RESET_DEVICE);
    let (connection, serving) = establish(backend, 2);
    let mut connection = connection.unwrap();
    let ring = RingStart { index: 1, setup: setup(), base: 0, enabled: true, kick: &kick, call: &call };
    connection.set_up(1 << 32, &memory, &mut None, &[]).unwrap();
    connection.start_rings(&[ring]).unwrap();
    connection.stop().unwrap();
    drop(connection);
    let log = serving.finish().log;
    assert_eq!(log[log.len() - 2..], ["GET_VRING_BASE 1", "SET_VRING_ENABLE 1 0"]);
}

#[test]
fn inflight_region_is_passed_on_until_a_back_end_does_not_track_it() {
    let memory = crate::memory::allocate(64 << 20).unwrap();
    let (kick, call) = (event::new().unwrap(), event::new().unwrap());
    let mut inflight = None;
    let mut given = Vec::new();
    let mut asked = Vec::new();
    for tracks in [true, true, false, true] {
        let mut backend = FakeBackend::new(2);
        backend.protocol.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, tracks);
        let (connection, serving) = establish(backend, 2);
        let mut connection = connection.unwrap();
        let ring = RingStart { index: 1, setup: setup(), base: 0, enabled: true, kick: &kick, call: &call };
        connection.set_up(1 << 32, &memory, &mut inflight, &[ring]).unwrap();
        assert_eq!(inflight.is_some(), tracks);
        drop(connection);
        let backend = serving.finish();
        given.push(backend.inflight);
        asked.push(backend.log.iter().any(|entry| entry == "GET_INFLIGHT_FD 2 256"));
    }
    assert_eq!(asked, [true, false, false, true]);
    assert!(given[0].is_some() && given[0] == given[1], "{given:?}");
    assert_eq!(given[2], None);
    assert!(given[3].is_some() && given[3] != given[0], "{given:?}");
}

#[test]
fn back_end_without_protocol_features_serves_one_pair() {
    let mut backend = FakeBackend::new(2);
    backend.features &= !PROTOCOL_FEATURES;
    let (connection, serving) = establish(backend, 2);
    let mut connection = connection.unwrap();
    assert_eq!(connection.offer().config, None);
    connection.enable_pairs(1).unwrap();
    drop(connection);
    assert_eq!(serving.finish().log, ["SET_OWNER", "GET_FEATURES"]);
}

#[test]
fn unsuitable_back_end_is_rejected_with_a_reason() {
    let mut legacy = FakeBackend::new(2);
    legacy.features &= !feature(VIRTIO_F_VERSION_1);
    assert!(matches!(establish(legacy, 2).0, Err(ConnectionError::Legacy)));

    let too_few = establish(FakeBackend::new(4), 8).0.err().unwrap();
    assert!(matches!(too_few, ConnectionError::TooFewRings { offered: 4, needed: 8 }));
    assert!(too_few.to_string().contains("--queue-pairs=4"));
}

#[test]
fn error_names_the_refused_message() {
    let memory = crate::memory::allocate(64 << 20).unwrap();
    let mut backend = FakeBackend::new(2);
    backend.refuses = Some("SET_FEATURES");
    let (connection, _serving) = establish(backend, 2);
    let error = connection.unwrap().set_up(1 << 32, &memory, &mut None, &[]).unwrap_err();
    assert!(matches!(error, ConnectionError::Message { message: "SET_FEATURES", .. }));
}

#[test]
fn closed_connection_is_an_error() {
    let (here, there) = UnixStream::pair().unwrap();
    drop(there);
    let error = Connection::establish(here, 2).err().unwrap();
    assert!(matches!(error, ConnectionError::Message { .. }));
}

#[test]
fn missing_listener_is_reported_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    assert!(
        matches!(connect_to(&path), Err(ConnectionError::Connect(error)) if error.kind() == io::ErrorKind::NotFound)
    );
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let refused = connect_to(&path);
    assert!(
        matches!(refused, Err(ConnectionError::Connect(error)) if error.kind() == io::ErrorKind::ConnectionRefused)
    );
}
