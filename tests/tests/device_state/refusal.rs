//! Transfers that are refused, fail or hang, and cost nothing else.

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
fn a_feature_that_the_target_does_not_offer_is_refused_by_name() {
    let (_rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let state = save(&device, &pipe).unwrap();
    let Ok(handover::wire::message::Message::Device(StateOnly { device: mut state })) =
        handover::wire::message::Message::decode(&state)
    else {
        panic!("the state is something else")
    };
    // `VIRTIO_NET_F_HASH_REPORT`.
    state.features |= 1 << 57;
    let state = handover::wire::message::Message::Device(StateOnly { device: state }).encode().unwrap();
    let error = load(&connection, &state, &pipe).unwrap_err();
    assert!(error.to_string().contains("was not loaded"), "{error}");
    wait_log(&mut target, "features: negotiated features 0x200000000000000 are not the target's").unwrap();
}

#[test]
fn what_may_not_be_asked_is_refused_and_nothing_else_happens() {
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
    wait_log(&mut rig.backend, "device state moves only while all rings are stopped").unwrap();
    device.suspend().unwrap();
    // None was moved yet.
    assert!(!check(&device.connection).unwrap());
    // A back-end with a TAP gets no other.
    assert_eq!(set_state_fd(&device.connection, false, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, "has a TAP already and cannot receive one").unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_save_that_nobody_takes_leaves_the_device_with_its_source() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, 1).unwrap();
    let mut at_rest = None;
    for _ in 0..3 {
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
        assert!(check(&device.connection).unwrap());
        // The front-end closes the other end: what was in it is gone.
        drop(theirs);
        // Nobody asked for a hand-over, so none is reported.
        rig.backend.wait_no_handover().unwrap();
        device.restart_rings().unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.suspend().unwrap();
        // Nobody there at all.
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        drop(theirs);
        assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
        assert!(!check(&device.connection).unwrap());
        device.restart_rings().unwrap();
        rig.check_traffic(&mut device).unwrap();
        device.suspend().unwrap();
        // The last hand-over keeps its word, but no more of them than one.
        let open = rig.backend.process.open_fds().unwrap();
        assert_eq!(*at_rest.get_or_insert(open), open);
    }
}

#[test]
fn nonsense_costs_the_transfer_only() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/tests/golden/handover-v1");
    let mut all: Vec<Vec<u8>> = vec![Vec::new(), vec![0xee; 500], vec![0; 200_000]];
    for entry in std::fs::read_dir(golden).unwrap() {
        let mut packet = std::fs::read(entry.unwrap().path()).unwrap();
        packet.truncate(packet.len() - 1);
        all.push(packet);
    }
    // Whole, but it names descriptors that are not there.
    all.push(std::fs::read(format!("{golden}/offer.bin")).unwrap());
    for bytes in all {
        let (read, mut write) = pipe().unwrap();
        assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
        drop(read);
        // The back-end may close it before all is written.
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
fn a_peer_that_hangs_holds_up_neither_the_session_nor_the_next_one() {
    let (_rig, _device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
    // Served, though nothing comes.
    connection.get_features().unwrap();
    // Only one at a time.
    let (other, _end) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, &other).unwrap(), REFUSED);
    // The answer waits, and the front-end that asks may leave: nobody waits for its transfer any more.
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

/// So many that their state is longer than what a terminal takes that says it is writable.
const MANY_PAIRS: u16 = 32;

/// Neither a transfer that waits nor one that the kernel holds up, which no look at the descriptor foresees.
#[test]
fn a_front_end_that_leaves_keeps_no_place_for_its_transfer() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, MANY_PAIRS).unwrap();
    let (terminal, _terminal_end) = nearly_full_terminal().unwrap();
    let (_pipe_end, mut full) = pipe().unwrap();
    full.write_all(&[0; 1 << 16]).unwrap();
    let at_rest = rig.backend.process.open_fds().unwrap();
    let threads = rig.backend.process.threads().unwrap();
    for write in [terminal, full] {
        // More often than there may be threads.
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
    rig.backend.process.wait_until("the threads of its transfers have ended", ended).unwrap();
    rig.backend.process.wait_open_fds(at_rest).unwrap();
}

#[test]
fn a_transfer_that_the_kernel_holds_up_fails_in_time() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, MANY_PAIRS).unwrap();
    let (write, _read) = nearly_full_terminal().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    assert!(!check(&device.connection).unwrap());
    wait_log(&mut rig.backend, "the transfer of device state took too long").unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_socket_that_the_front_end_has_filled_is_not_waited_for() {
    let (mut rig, mut device, _target, _connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, _theirs) = pair(SockType::SeqPacket).unwrap();
    let fill = || send(ours.as_raw_fd(), &[0; 1000], MsgFlags::MSG_DONTWAIT);
    while fill().is_ok() {}
    // A wait of 100 ms for each of them would exhaust the patience.
    let begin = Instant::now();
    for number in 0..1500 {
        assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), ACCEPTED);
        assert!(!check(&device.connection).unwrap());
        assert!(begin.elapsed() < PATIENCE, "{number} transfers took too long");
    }
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}
