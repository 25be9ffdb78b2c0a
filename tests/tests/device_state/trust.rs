//! What a front-end may do with device state: it may move the TAP only if the operator allows that, and it can never
//! choose the program that a back-end runs.

use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use baton_channel::message_socket::{MessageSocket, Packet};
use baton_channel::ownership::SharedWord;
use baton_protocol::fd_manifest::NamedFds;
use baton_protocol::handover::wire::device::{DeviceState, QueuePairState};
use baton_protocol::handover::wire::message::{LINK_FD, Message, OWNERSHIP_FD, Offer, tap_fd};
use baton_protocol::ownership::{Owner, SwapOutcome, Word};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, REFUSED, check, negotiate, negotiated, options, pair, pipe, set_state_fd, transfer, wait_log,
};
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::wire::{self, protocol, request};
use baton_tests::fake_frontend::{Device, net::features};
use baton_tests::netns::Netns;
use baton_tests::session_peer::FakeTarget;
use baton_tests::users::{UNPRIVILEGED, as_user};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::SockType;

const LONG: Duration = Duration::from_secs(30);
const STATE_ONLY: &str = "may move device state only without the TAP";

/// Reads the offer that a back-end makes over a front-end's socket.
fn intercept_offer(device: &Device) -> Packet<Message> {
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    MessageSocket::try_from(theirs).unwrap().receive(LONG).unwrap()
}

/// A device that a front-end of another user has set up.
fn device_of_another_user(rig: &mut Rig) -> Device {
    let connection = rig.backend.connect_as(UNPRIVILEGED).unwrap();
    let mut device = Device::new(connection, options(1)).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    device
}

#[test]
fn front_end_of_another_user_may_move_state_only_without_the_tap() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = device_of_another_user(&mut rig);
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, STATE_ONLY).unwrap();
    let mut state = Vec::new();
    let (mut read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, write).unwrap(), ACCEPTED);
    read.read_to_end(&mut state).unwrap();
    assert!(check(&device.connection).unwrap());

    // It may not load a TAP either.
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let connection = negotiate(target.connect_as(UNPRIVILEGED).unwrap()).unwrap();
    assert_eq!(set_state_fd(&connection, false, &theirs).unwrap(), REFUSED);
    wait_log(&mut target, STATE_ONLY).unwrap();
    let (read, mut write) = pipe().unwrap();
    assert_eq!(set_state_fd(&connection, false, read).unwrap(), ACCEPTED);
    write.write_all(&state).unwrap();
    drop(write);
    assert!(check(&connection).unwrap());

    // After a hand-over the target knows the front-end's user, too.
    device.restart_rings().unwrap();
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    rig.backend.become_target(target).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, STATE_ONLY).unwrap();
}

#[test]
fn device_state_option_limits_what_a_front_end_may_move() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--device-state=pipe"]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    device.suspend().unwrap();
    let (ours, _theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &ours).unwrap(), REFUSED);
    wait_log(&mut rig.backend, STATE_ONLY).unwrap();
    let (_read, write) = pipe().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    device.restart_rings().unwrap();

    // The session continues at a target that does not offer the feature, which refuses its requests.
    let target = Backend::waiting_for_session(Datapath::Userspace, &["--device-state=off"]).unwrap();
    rig.backend.become_target(target).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &write).unwrap(), REFUSED);
    wait_log(&mut rig.backend, "--device-state=off").unwrap();
    drop(device);
    let connection = rig.backend.connect().unwrap();
    connection.get_features().unwrap();
    let offered = connection.ask_u64(&wire::Message::empty(request::GET_PROTOCOL_FEATURES)).unwrap();
    assert_eq!(offered & protocol::DEVICE_STATE, 0);
}

#[test]
fn device_state_on_lets_a_front_end_of_another_user_move_the_tap() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--device-state=on", "--downscript=/bin/true"]).unwrap();
    let mut device = device_of_another_user(&mut rig);
    device.suspend().unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &["--device-state=on"]).unwrap();
    let connection = negotiate(target.connect_as(UNPRIVILEGED).unwrap()).unwrap();
    // The sender of the offer counts, not the front-end that passes it on.
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

/// The credentials of an offer that a front-end has made itself.
#[derive(Clone, Copy, Debug)]
enum Credentials {
    None,
    Own,
    Kernels,
}

/// A front-end of another user offers its own TAP and ownership word with a program to run. Its link is connected to a
/// listener of the back-end's user, since `SO_PEERCRED` names the process that listens, not the one that writes.
#[test]
fn offer_made_by_a_front_end_runs_no_program() {
    let netns = Netns::enter().unwrap();
    let tap = netns.create_tap(TAP, 1).unwrap().remove(0);
    fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let downscript = Downscript::new().unwrap();
    let program = downscript.option().split_once('=').unwrap().1.to_owned();
    let directory = tempfile::tempdir().unwrap();
    let listener = FakeTarget::bind(&directory.path().join("listener")).unwrap();
    let mut loaded = Vec::new();
    for credentials in [Credentials::None, Credentials::Own, Credentials::Kernels] {
        let mut target = Backend::waiting(Datapath::Userspace, &["--device-state=on"]).unwrap();
        let connection = negotiate(target.connect_as(UNPRIVILEGED).unwrap()).unwrap();
        let word = SharedWord::create().unwrap();
        let offered = Word { epoch: 1, owner: Owner::Offered };
        assert_eq!(word.swap(Word::INITIAL, offered), SwapOutcome::Won);
        let queue = QueuePairState {
            using_vnet_hdr: true,
            enabled: true,
            host_vnet_hdr_len: 10,
            ..QueuePairState::default()
        };
        let device = DeviceState {
            tap: TAP.to_owned(),
            queue_pairs: vec![queue],
            features: options(1).features & !features::MQ,
            downscript: Some(program.clone()),
            ..DeviceState::default()
        };
        let link = OwnedFd::from(MessageSocket::connect(listener.path()).unwrap());
        let fds = [
            (tap_fd(0), tap.try_clone().unwrap()),
            (OWNERSHIP_FD.to_owned(), word.as_fd().try_clone_to_owned().unwrap()),
            (LINK_FD.to_owned(), link),
        ];
        let (manifest, fds) = fds.into_iter().collect::<NamedFds<OwnedFd>>().unzip();
        let message = Message::Offer(Offer { epoch: 1, device, fds: manifest });
        let (ours, theirs) = MessageSocket::pair().unwrap();
        if matches!(credentials, Credentials::Kernels) {
            theirs.enable_credentials().unwrap();
        }
        as_user(UNPRIVILEGED, move || {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match credentials {
                Credentials::Own => ours.send_with_credentials(&message, &fds, LONG)?,
                Credentials::None | Credentials::Kernels => ours.send(&message, &fds, LONG)?,
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(set_state_fd(&connection, false, &theirs).unwrap(), ACCEPTED);
        loaded.push(check(&connection).unwrap());
        // The first ring takes the device if it was loaded.
        let mut device = Device::new(connection, options(1)).unwrap();
        device.negotiate().unwrap();
        device.set_up().unwrap();
        device.fill_receive_rings().unwrap();
        target.wait_started(0).unwrap();
        target.process.signal(Signal::SIGTERM).unwrap();
        assert!(target.process.wait().unwrap().success());
        assert_eq!(target.process.log().contains("downscript-user"), !loaded.ends_with(&[true]));
        let none: [&str; 0] = [];
        assert_eq!(downscript.runs().unwrap(), none, "the front-end's program was run ({credentials:?})");
    }
    assert_eq!(loaded, [false; 3]);
}

#[test]
fn offer_replayed_by_a_front_end_runs_no_program() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    device.suspend().unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let connection = negotiated(&mut target).unwrap();
    // The front-end reads the offer and sends it again. Its link still has the source as its peer.
    let offer = intercept_offer(&device);
    let fds: Vec<_> = offer.fds.iter().map(AsFd::as_fd).collect();
    let (ours, theirs) = MessageSocket::pair().unwrap();
    ours.send(&offer.message, &fds, LONG).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(!check(&connection).unwrap());
    wait_log(&mut target, "downscript-user").unwrap();
    drop(offer);
    rig.backend.wait_no_handover().unwrap();

    // An offer that the source itself sends carries the program, and the last owner runs it.
    transfer(&device, &connection).unwrap();
    drop(device.move_to(connection).unwrap());
    assert!(rig.backend.process.wait().unwrap().success());
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert!(rig.backend.process.wait().unwrap().success());
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn offer_without_credentials_is_attributed_to_its_sender_by_the_kernel() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--downscript=/bin/true"]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    device.suspend().unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let connection = negotiated(&mut target).unwrap();
    // As a source of an earlier version and of the same user sends it.
    let offer = intercept_offer(&device);
    let fds: Vec<_> = offer.fds.iter().map(AsFd::as_fd).collect();
    let (ours, theirs) = MessageSocket::pair().unwrap();
    theirs.enable_credentials().unwrap();
    ours.send(&offer.message, &fds, LONG).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(check(&connection).unwrap());
    drop(offer);
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn state_without_the_tap_reveals_nothing_about_its_host() {
    let mut rig =
        Rig::new(Datapath::Userspace, 1, &["--downscript=/bin/true", "--mac=02:00:00:00:00:77"]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.suspend().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(set_state_fd(&device.connection, true, &file).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    for text in [TAP, "/bin/true"] {
        assert!(!bytes.windows(text.len()).any(|window| window == text.as_bytes()), "{text}");
    }
}
