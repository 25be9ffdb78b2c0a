//! Frames in hand: the source has read them from its TAP and not delivered them.
#![expect(unsafe_code, reason = "ignores a signal")]

use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{GSO_TCPV4, NetHeader, features};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames::{self, Network, Transport, segment};
use baton_tests::session_peer::STAGED;
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::{Held, hand_over};

#[test]
fn frame_in_hand_is_delivered_first() {
    let options = Options {
        features: Options::default().features | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..Options::default()
    };
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // One buffer, which is too small for the large frame.
    device.post_receive_buffers(0, 1).unwrap();
    device.ring(0).kick().unwrap();
    rig.network.send(&frames::numbered(1, 1400)).unwrap();
    rig.expect_in_guest(&mut device, 1..2).unwrap();
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    rig.network.send_with(&large.header(GSO_TCPV4, 1400), &large.bytes).unwrap();
    rig.network.send(&frames::numbered(2, 100)).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    // No back-end can deliver the frame, so each hand-over passes it on.
    for _ in 0..3 {
        hand_over(&mut rig, &[]).unwrap();
        rig.worker_rounds(&mut device, 0).unwrap();
    }
    device.post_receive_buffers(0, usize::MAX).unwrap();
    device.ring(0).kick().unwrap();
    let (_, first) = device.receive(0).unwrap();
    assert!(first == large.bytes, "the frame differs, {} bytes", first.len());
    rig.expect_in_guest(&mut device, 2..3).unwrap();
    // Each frame is counted once, by whichever back-end delivers it.
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(3)).unwrap();
}

#[test]
fn hand_over_rolls_back_when_a_frame_in_hand_cannot_be_saved() {
    // A write beyond RLIMIT_FSIZE raises SIGXFSZ unless it is ignored. The back-end inherits that.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    let options = Options {
        queue_pairs: 2,
        features: Options::default().features | features::MQ | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..Options::default()
    };
    // Few log lines, since the back-end cannot write its log either.
    let mut rig = Rig::new(Datapath::Userspace, 2, &["--log-level=error"]).unwrap();
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // As above, on whichever of the two queues the kernel chooses.
    for pair in 0..2 {
        device.post_receive_buffers(pair, 1).unwrap();
        device.ring(2 * u32::try_from(pair).unwrap()).kick().unwrap();
        device.send(pair, &NetHeader::default(), &frames::numbered(0, 60)).unwrap();
        rig.expect_on_network(0..1).unwrap();
    }
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    for _ in 0..2 {
        rig.network.send_with(&large.header(GSO_TCPV4, 1400), &large.bytes).unwrap();
    }
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.worker_rounds(&mut device, 1).unwrap();
    let held = Held::staged(&rig).unwrap();
    let pid = Pid::from_raw(i32::try_from(rig.backend.process.pid()).unwrap());
    let none = Rlimit { current: Some(0), maximum: None };
    let before = prlimit(pid, Resource::Fsize, none).unwrap();
    held.relay.source.say(&STAGED).unwrap();
    let (phase, reason) = held.asked.failure().unwrap();
    assert_eq!(phase, "freeze");
    assert!(reason.starts_with("source: the source cannot hand over a frame in hand"), "{reason}");
    prlimit(pid, Resource::Fsize, before).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.worker_rounds(&mut device, 1).unwrap();
    // No frame is lost.
    for pair in 0..2 {
        device.post_receive_buffers(pair, usize::MAX).unwrap();
        device.ring(2 * u32::try_from(pair).unwrap()).kick().unwrap();
    }
    for _ in 0..2 {
        let (_, frame) = rig.receive_on_any(&mut device).unwrap();
        assert!(frame == large.bytes, "the frame differs, {} bytes", frame.len());
    }
    rig.backend.check_healthy().unwrap();
}
