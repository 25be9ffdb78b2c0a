//! Device state moved by a front-end (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`): over a Unix socket for
//! packets with the TAP, over a pipe or a stream without it; taken by whoever starts a ring first; and what bad or slow peers cost.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::time::Instant;

use anyhow::{Result, ensure};
use baton_protocol::codec::Message as _;
use baton_protocol::control::{BackendState, HandoverState};
use baton_protocol::handover;
use baton_protocol::handover::wire::message::StateOnly;
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, REFUSED, check, nearly_full_terminal, negotiated, options, pair, pipe, set_state_fd, stopped,
    transfer, wait_log,
};
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::fake_frontend::{Connection, Device, Options};
use baton_tests::frames;
use baton_tests::on_both_datapaths;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::process::{PATIENCE, Process, until};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, SockType, send};

on_both_datapaths! {
    a_device_moves_over_a_socket_for_packets,
    state_without_descriptors_moves_over_a_stream,
    the_sources_ring_takes_the_device_back,
    state_without_descriptors_moves_over_a_pipe,
    state_of_the_other_datapath_loads,
}

fn a_device_moves_over_a_socket_for_packets(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target, connection) = stopped(datapath, 2)?;
    transfer(&device, &connection)?;
    ensure!(target.status()?.tap.is_empty(), "the target has taken the device without a ring");
    ensure!(rig.backend.status()?.state == BackendState::HandingOver);
    rig.network.send(&frames::numbered(3, 99))?;
    let old = device.move_to(connection)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(frames::number_of(&received) == Some(3));
    drop(old);
    let status = rig.backend.process.wait()?;
    ensure!(status.success(), "{status}");
    rig.backend = target;
    rig.check_traffic(&mut device)?;
    ensure!(rig.backend.status()?.tap == TAP);
    // The second hop.
    device.suspend()?;
    let mut third = Backend::waiting(datapath, &[])?;
    let connection = negotiated(&mut third)?;
    transfer(&device, &connection)?;
    device.move_to(connection)?;
    rig.backend = third;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn the_sources_ring_takes_the_device_back(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target, connection) = stopped(datapath, 2)?;
    for number in 0..3 {
        transfer(&device, &connection)?;
        rig.network.send(&frames::numbered(number, 77))?;
        device.restart_rings()?;
        let (_, received) = rig.receive_on_any(&mut device)?;
        ensure!(frames::number_of(&received) == Some(number));
        rig.check_traffic(&mut device)?;
        device.suspend()?;
        target.wait_no_handover()?;
    }
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    target.check_healthy()
}

fn state_without_descriptors_moves_over_a_pipe(datapath: Datapath) -> Result<()> {
    state_without_descriptors_moves(datapath, pipe)
}

/// Cloud Hypervisor gives one end of a `UnixStream::pair`, and stores what it reads at the other.
fn state_without_descriptors_moves_over_a_stream(datapath: Datapath) -> Result<()> {
    state_without_descriptors_moves(datapath, || {
        let (ours, theirs) = pair(SockType::Stream)?;
        Ok((ours.into(), theirs.into()))
    })
}

fn save(device: &Device, channel: &impl Fn() -> Result<(File, File)>) -> Result<Vec<u8>> {
    let (mut read, write) = channel()?;
    ensure!(set_state_fd(&device.connection, true, &write)? == ACCEPTED);
    drop(write);
    let mut state = Vec::new();
    read.read_to_end(&mut state)?;
    ensure!(check(&device.connection)?);
    Ok(state)
}

fn load(connection: &Connection, state: &[u8], channel: &impl Fn() -> Result<(File, File)>) -> Result<()> {
    let (read, mut write) = channel()?;
    ensure!(set_state_fd(connection, false, &read)? == ACCEPTED);
    write.write_all(state)?;
    drop((read, write));
    ensure!(check(connection)?, "the state was not loaded");
    Ok(())
}

fn state_without_descriptors_moves(
    datapath: Datapath,
    channel: impl Fn() -> Result<(File, File)>,
) -> Result<()> {
    let (mut rig, mut device, mut target, _connection) = stopped(datapath, 1)?;
    // Without a hand-over, and beside one that the operator armed.
    save(&device, &channel)?;
    rig.backend.wait_no_handover()?;
    rig.backend.arm(&target.incoming())?;
    target.wait_handover(HandoverState::Adopted)?;
    let state = save(&device, &channel)?;
    rig.backend.wait_handover(HandoverState::Offered)?;
    // The source keeps everything.
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;

    // A back-end with a TAP of its own takes it, whatever the number of its queue pairs.
    for (tap, queue_pairs) in [("tap1", 1), ("tap2", 2)] {
        let (mut other, network) = with_tap(&rig, datapath, tap, queue_pairs)?;
        let connection = negotiated(&mut other)?;
        load(&connection, &state, &channel)?;
        other.wait_no_handover()?;
        device.move_to(connection)?;
        (rig.backend, rig.network) = (other, network);
        rig.check_traffic(&mut device)?;
        device.suspend()?;
    }
    Ok(())
}

/// A back-end with another TAP, and the network's side of that.
fn with_tap(rig: &Rig, datapath: Datapath, tap: &str, queue_pairs: u16) -> Result<(Backend, PacketSocket)> {
    rig.netns.create_persistent_tap(tap, queue_pairs > 1)?;
    let options = [format!("--tap={tap}"), format!("--queue-pairs={queue_pairs}")];
    let mut backend = Backend::listening(datapath, &options.each_ref().map(String::as_str), &[])?;
    backend.status()?;
    Ok((backend, PacketSocket::open(tap)?))
}

/// What the source negotiated for its own connection is no business of a target with another datapath.
fn state_of_the_other_datapath_loads(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[])?;
    let mut options = options(2);
    options.protocol_features |= protocol::INFLIGHT_SHMFD;
    let mut device = rig.device(options)?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;
    let state = save(&device, &pipe)?;
    let (mut other, network) = with_tap(&rig, datapath, "tap1", 2)?;
    device.options.protocol_features &= !protocol::INFLIGHT_SHMFD;
    let connection = negotiated(&mut other)?;
    load(&connection, &state, &pipe)?;
    let _old = device.move_to(connection)?;
    (rig.backend, rig.network) = (other, network);
    rig.check_traffic(&mut device)
}

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
fn a_pipe_works_after_a_hand_over_on_suspend_too() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let (read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, &read).unwrap(), ACCEPTED);
    drop(write);
    assert!(check(&device.connection).unwrap());
    assert!(check(&connection).unwrap());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
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

/// The front-end does not know that it has another back-end now, and asks that how the transfer ended.
#[test]
fn how_a_transfer_ended_goes_along_with_the_session() {
    let (mut rig, mut device, ..) = stopped(Datapath::Userspace, 1).unwrap();
    // Once it is over, and not before.
    let hand_over = |rig: &mut Rig| {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
        let incoming = target.incoming();
        let over = |backend: &mut Backend| match backend.hand_over_to(&incoming, false) {
            Err(error) if error.to_string().contains("is moving device state") => Ok(false),
            answer => answer.map(|_| true),
        };
        until("the transfer was over, and the session handed over", || over(&mut rig.backend))?;
        rig.backend.is_succeeded_by(target)
    };
    let (mut read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    drop(write);
    read.read_to_end(&mut Vec::new()).unwrap();
    hand_over(&mut rig).unwrap();
    assert!(check(&device.connection).unwrap());
    // Once.
    assert!(!check(&device.connection).unwrap());

    let (read, write) = pipe().unwrap();
    drop(read);
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    hand_over(&mut rig).unwrap();
    hand_over(&mut rig).unwrap();
    assert!(!check(&device.connection).unwrap());
    wait_log(&mut rig.backend, "the transfer failed before the session was handed over").unwrap();

    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn a_source_that_dies_leaves_the_device_to_its_target() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    rig.backend.process.signal(Signal::SIGKILL).unwrap();
    rig.backend.process.wait().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_target_that_dies_leaves_the_device_to_its_source() {
    let (mut rig, mut device, target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.process.signal(Signal::SIGKILL).unwrap();
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_front_end_that_was_cut_off_finds_the_device_that_it_brought() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    // The descriptor that must come with it did not get through.
    connection.send(&Message::u64(request::SET_VRING_KICK, 0), &[]).unwrap();
    wait_log(&mut target, "front-end's session ended").unwrap();
    drop(connection);
    let connection = negotiated(&mut target).unwrap();
    // The source keeps its front-end, and so goes on to tell.
    let _old = device.move_to(connection).unwrap();
    rig.backend.wait_handover(HandoverState::HandedOver).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_device_is_dropped_when_the_front_end_that_brought_it_leaves() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    drop(connection);
    // Whoever had it has it again, and the target waits for another.
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    let connection = negotiated(&mut target).unwrap();
    target.process.wait_open_fds(at_rest).unwrap();
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_front_end_that_leaves_before_it_knows_leaves_the_device_behind() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // Without an answer to CHECK_DEVICE_STATE no VM moves, so it comes again.
    drop(device);
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();
    target.check_healthy().unwrap();
}

#[test]
fn a_source_that_is_told_to_end_leaves_the_device_to_its_target() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    target.wait_handover(HandoverState::Adopted).unwrap();
    // Whether the front-end knows of it or not: there is nobody else to have it.
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_front_end_that_leaves_with_an_answer_leaves_the_device_to_the_target() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    transfer(&device, &connection).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.connection.stream().shutdown(Shutdown::Both).unwrap();
    // Before the target's first ring.
    assert!(rig.backend.process.wait().unwrap().success());
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_source_that_wakes_to_both_ends_gone_has_the_device() {
    let (mut rig, device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    rig.backend.process.signal(Signal::SIGSTOP).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(check(&connection).unwrap());
    // The VM has not started there, and both front-ends give their back-ends up.
    drop(connection);
    target.wait_no_handover().unwrap();
    drop(device);
    rig.backend.process.signal(Signal::SIGCONT).unwrap();
    wait_log(&mut rig.backend, "front-end disconnected").unwrap();
    let mut device = rig.device(options(1)).unwrap();
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
