//! Transfers that are refused, fail or hang, without any other effect.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Instant;

use baton_protocol::codec::Message as _;
use baton_protocol::handover;
use baton_protocol::handover::wire::message::StateOnly;
use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, REFUSED, check, nearly_full_terminal, negotiated, options, pair, pipe, set_state_fd, stopped,
    transfer, wait_log,
};
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::wire::{Message, request};
use baton_tests::process::{PATIENCE, Process};
use nix::sys::socket::{MsgFlags, SockType, send};

use super::{load, save};

#[test]
fn feature_that_the_target_does_not_offer_is_refused_by_name() {
    let (_rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let state = save(&device, &pipe).unwrap();
    let Ok(handover::wire::message::Message::Device(StateOnly { device: mut state })) =
        handover::wire::message::Message::decode(&state)
    else {
        panic!("the saved state is not a device message")
    };
    // `VIRTIO_NET_F_HASH_REPORT`.
    state.features |= 1 << 57;
    let state = handover::wire::message::Message::Device(StateOnly { device: state }).encode().unwrap();
    let error = load(&connection, &state, &pipe).unwrap_err();
    assert!(error.to_string().contains("was not loaded"), "{error}");
    wait_log(&mut target, "features: the target does not support the negotiated features 0x200000000000000")
        .unwrap();
}

#[test]
fn invalid_transfers_are_refused_without_side_effects() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let plain = Options { protocol_features: Options::default().protocol_features, ..options(1) };
    let mut device = rig.device(plain).unwrap();
    let (ours, _theirs) = pair(SockType::SeqPacket).unwrap();
    device.suspend().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), REFUSED);
    assert!(!check(&device.connection).unwrap());
    wait_log(&mut rig.backend, "DEVICE_STATE was not negotiated").unwrap();
    drop(device);

    device = rig.device(options(1)).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, "device state can be moved only while all rings are stopped").unwrap();
    device.suspend().unwrap();
    // No state has been moved yet.
    assert!(!check(&device.connection).unwrap());
    // A back-end with a TAP refuses another one.
    assert_eq!(set_state_fd(&device.connection, false, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, "has a TAP already and cannot receive one").unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn source_keeps_device_when_its_save_is_not_loaded() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, 1).unwrap();
    let mut at_rest = None;
    for _ in 0..3 {
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
        assert!(check(&device.connection).unwrap());
        // The front-end closes the other end: the offer is lost.
        drop(theirs);
        // The operator has armed no hand-over, so none is reported.
        rig.backend.wait_no_handover().unwrap();
        device.restart_rings().unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.suspend().unwrap();
        // The other end is closed before the save.
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        drop(theirs);
        assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
        assert!(!check(&device.connection).unwrap());
        device.restart_rings().unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.suspend().unwrap();
        // The back-end keeps the ownership word of the last hand-over, but of no earlier one.
        let open = rig.backend.process.open_fds().unwrap();
        assert_eq!(*at_rest.get_or_insert(open), open);
    }
}

#[test]
fn malformed_state_fails_only_the_transfer() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/tests/golden/handover-v1");
    let mut all: Vec<Vec<u8>> = vec![Vec::new(), vec![0xee; 500], vec![0; 200_000]];
    for entry in std::fs::read_dir(golden).unwrap() {
        let mut packet = std::fs::read(entry.unwrap().path()).unwrap();
        packet.truncate(packet.len() - 1);
        all.push(packet);
    }
    // A whole message, which names descriptors that are missing.
    all.push(std::fs::read(format!("{golden}/offer.bin")).unwrap());
    for bytes in all {
        let (read, mut write) = pipe().unwrap();
        assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
        drop(read);
        // The back-end may close the pipe before everything is written.
        let _ = write.write_all(&bytes);
        drop(write);
        assert!(!check(&connection).unwrap());
        for kind in [SockType::SeqPacket, SockType::Stream] {
            let (ours, theirs) = pair(kind).unwrap();
            assert_eq!(set_state_fd(&connection, false, ours).unwrap(), ACCEPTED);
            let _ = File::from(theirs).write_all(&bytes[..bytes.len().min(150_000)]);
            assert!(!check(&connection).unwrap());
        }
        target.process.wait_open_fds(at_rest).unwrap();
    }
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn hung_transfer_holds_up_neither_its_session_nor_the_next() {
    let (_rig, _device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
    // The session is served although no state arrives.
    connection.get_features().unwrap();
    // Only one transfer at a time.
    let (other, _end) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, &other).unwrap(), REFUSED);
    // The answer has to wait for the transfer. If the front-end leaves meanwhile, the next one is served at once.
    connection.send(&Message::empty(request::CHECK_DEVICE_STATE), &[]).unwrap();
    drop(connection);
    let connection = negotiated(&mut target).unwrap();
    assert!(!check(&connection).unwrap());
    let (next, _) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, &next).unwrap(), ACCEPTED);
    assert!(!check(&connection).unwrap());
    drop((read, write));
    target.check_healthy().unwrap();
}

/// So many that their state is larger than what a terminal accepts when it reports that it is writable.
const MANY_PAIRS: u16 = 32;

/// Both a transfer that waits for the descriptor, and one that blocks in the kernel although the descriptor is
/// writable.
#[test]
fn transfer_ends_when_its_front_end_leaves() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, MANY_PAIRS).unwrap();
    let (terminal, _terminal_end) = nearly_full_terminal().unwrap();
    let (_pipe_end, mut full) = pipe().unwrap();
    full.write_all(&[0; 1 << 16]).unwrap();
    let at_rest = rig.backend.process.open_fds().unwrap();
    let threads = rig.backend.process.threads().unwrap();
    for write in [terminal, full] {
        // More often than the back-end may have such threads.
        for _ in 0..10 {
            assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
            device.connection.send(&Message::empty(request::CHECK_DEVICE_STATE), &[]).unwrap();
            drop(device);
            device = rig.device(options(MANY_PAIRS)).unwrap();
            rig.check_traffic(&mut device).unwrap();
            device.suspend().unwrap();
            save(&device, &pipe).unwrap();
        }
    }
    let ended = |process: &Process| Ok((process.threads()? == threads).then_some(()));
    rig.backend.process.wait_until("the threads of its transfers ended", ended).unwrap();
    rig.backend.process.wait_open_fds(at_rest).unwrap();
}

#[test]
fn transfer_that_blocks_in_the_kernel_times_out() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, MANY_PAIRS).unwrap();
    let (write, _read) = nearly_full_terminal().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    assert!(!check(&device.connection).unwrap());
    wait_log(&mut rig.backend, "the transfer of device state took too long").unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn back_end_does_not_wait_for_a_full_socket() {
    let (mut rig, mut device, _target, _connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, _theirs) = pair(SockType::SeqPacket).unwrap();
    let fill = || send(ours.as_raw_fd(), &[0; 1000], MsgFlags::MSG_DONTWAIT);
    while fill().is_ok() {}
    // A wait of 100 ms per transfer would exceed PATIENCE.
    let begin = Instant::now();
    for number in 0..1500 {
        assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), ACCEPTED);
        assert!(!check(&device.connection).unwrap());
        assert!(begin.elapsed() < PATIENCE, "{number} transfers took too long");
    }
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}
