//! Transmitting many frames at once: with io_uring, and one by one.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::fs;

use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames;
use baton_tests::process::Process;

/// More frames than the back-end sends at once, and no more than the ring holds.
const FRAMES: u32 = 80;

/// Rounds in which the back-end gets many batches, more than it has before it uses io_uring.
const ROUNDS: u32 = 40;

/// Defines two tests for each of these functions, which take the argument of `--io-uring`.
macro_rules! on_both_paths {
    ($($body:ident),+ $(,)?) => {
        $(
            mod $body {
                #[test]
                fn io_uring() {
                    super::$body("--io-uring=auto");
                }

                #[test]
                fn one_by_one() {
                    super::$body("--io-uring=off");
                }
            }
        )+
    };
}

on_both_paths! {
    frames_sent_at_once_stay_in_order,
    odd_frames_neither_stop_nor_reorder_the_others,
    frames_sent_at_once_survive_hand_overs,
    a_deleted_tap_ends_the_back_end,
}

/// Returns the number of writes that a process has submitted to io_uring instances, or `None` if it has none.
fn submitted(process: &Process) -> Option<u32> {
    let directory = format!("/proc/{}", process.pid());
    let mut sum = None;
    for entry in fs::read_dir(format!("{directory}/fd")).unwrap() {
        let entry = entry.unwrap();
        // Another thread may have closed it meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if target.to_string_lossy().contains("[io_uring]") {
            let number = entry.file_name().into_string().unwrap();
            let info = fs::read_to_string(format!("{directory}/fdinfo/{number}")).unwrap();
            let tail = info.lines().find_map(|line| line.strip_prefix("SqTail:")).unwrap();
            *sum.get_or_insert(0) += tail.trim().parse::<u32>().unwrap();
        }
    }
    sum
}

/// Makes numbered frames available with one kick at most.
fn send_at_once(device: &mut Device, numbers: std::ops::Range<u32>) {
    for number in numbers {
        assert!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 100)).unwrap());
    }
    device.flush(0).unwrap();
}

/// Sends batches until the back-end uses io_uring, unless it must not.
fn warm_up(rig: &mut Rig, device: &mut Device) {
    for _ in 0..ROUNDS {
        send_at_once(device, 0..FRAMES);
        rig.expect_on_network(0..FRAMES).unwrap();
        device.wait_transmitted(0).unwrap();
    }
}

fn frames_sent_at_once_stay_in_order(io_uring: &str) {
    let plain = Options::default();
    let all = [
        plain.clone(),
        Options { features: plain.features | features::EVENT_IDX | features::IN_ORDER, ..plain.clone() },
        Options { transmit_pieces: vec![5, 7, 2048], ..plain },
    ];
    for options in all {
        let mut rig = Rig::new(Datapath::Userspace, 1, &[io_uring]).unwrap();
        let mut device = rig.device(options).unwrap();
        for round in 0..ROUNDS {
            let numbers = FRAMES * round..FRAMES * (round + 1);
            send_at_once(&mut device, numbers.clone());
            rig.expect_on_network(numbers).unwrap();
            device.wait_transmitted(0).unwrap();
        }
        let stats = rig.backend.pair_stats(0).unwrap().tx;
        assert_eq!((stats.frames, stats.dropped), (Some(u64::from(ROUNDS * FRAMES)), Some(0)));
        match (io_uring, submitted(&rig.backend.process)) {
            ("--io-uring=off", None) => {}
            ("--io-uring=auto", Some(count)) => assert!(count >= 32, "{count} frames"),
            (_, submitted) => panic!("{submitted:?} with {io_uring}"),
        }
    }
}

fn odd_frames_neither_stop_nor_reorder_the_others(io_uring: &str) {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[io_uring]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    warm_up(&mut rig, &mut device);
    let invalid = NetHeader { gso_type: 0x7f, ..NetHeader::default() };
    let beyond = NetHeader { hdr_len: 2000, ..NetHeader::default() };
    for place in [0, 1, 31, 32, 40, 63, 64, 79] {
        for position in 0..FRAMES {
            if position == place {
                // The kernel refuses the first, there is nothing to send of the second, and the third is mended.
                assert!(device.enqueue(0, &invalid, &frames::numbered(1000, 100)).unwrap());
                assert!(device.enqueue(0, &NetHeader::default(), &[]).unwrap());
                assert!(device.enqueue(0, &beyond, &frames::numbered(position, 100)).unwrap());
            } else {
                let frame = frames::numbered(position, 100);
                assert!(device.enqueue(0, &NetHeader::default(), &frame).unwrap());
            }
        }
        device.flush(0).unwrap();
        rig.expect_on_network(0..FRAMES).unwrap();
        device.wait_transmitted(0).unwrap();
    }
    assert_eq!(rig.backend.pair_stats(0).unwrap().tx.dropped, Some(16));
}

fn frames_sent_at_once_survive_hand_overs(io_uring: &str) {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[io_uring]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..10 {
        let target = Backend::waiting_for_session(Datapath::Userspace, &[io_uring]).unwrap();
        warm_up(&mut rig, &mut device);
        let numbers = FRAMES * round..FRAMES * (round + 1);
        send_at_once(&mut device, numbers.clone());
        rig.backend.become_target(target).unwrap();
        rig.expect_on_network(numbers).unwrap();
        device.wait_transmitted(0).unwrap();
    }
    let stats = rig.backend.pair_stats(0).unwrap().tx;
    assert_eq!((stats.frames, stats.dropped), (Some(u64::from(10 * (ROUNDS + 1) * FRAMES)), Some(0)));
}

fn a_deleted_tap_ends_the_back_end(io_uring: &str) {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[io_uring]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    warm_up(&mut rig, &mut device);
    baton_tests::link::ip(&["link", "delete", baton_tests::backend::TAP]).unwrap();
    send_at_once(&mut device, 0..FRAMES);
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(1));
    assert!(rig.backend.process.log().contains("the TAP was deleted"));
}

/// A frame that waits for room must not be overtaken.
#[test]
fn frames_for_a_limited_send_buffer_are_sent_one_by_one() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--sndbuf=1000000"]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    warm_up(&mut rig, &mut device);
    assert_eq!(submitted(&rig.backend.process), None);
}
