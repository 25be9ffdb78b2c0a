//! Workers that busy-poll before they sleep (`--poll-us`).
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::thread::sleep;
use std::time::Duration;

use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::fake_frontend::net::{NetHeader, features};
use baton_tests::frames;

const TX: u32 = 1;

/// Sends one frame from the guest, with a kick only if the device asks for it, and expects it on the network.
fn pass(rig: &mut Rig, device: &mut baton_tests::fake_frontend::Device, number: u32) {
    device.send(0, &NetHeader::default(), &frames::numbered(number, 60)).unwrap();
    rig.expect_on_network(number..number + 1).unwrap();
}

fn check_asks_for_kicks(poll: &str, more: u64) {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[poll]).unwrap();
    let options = Options::default();
    let mut device = rig.device(Options { features: options.features | more, ..options }).unwrap();
    for round in 0..1000 {
        // The worker parks and resumes. It finds a frame and suppresses kicks, then polls in vain and sleeps.
        device.connection.set_vring_enable(TX, true).unwrap();
        pass(&mut rig, &mut device, 2 * round);
        sleep(Duration::from_millis(1));
        pass(&mut rig, &mut device, 2 * round + 1);
    }
}

#[test]
fn worker_asks_for_kicks_before_it_sleeps() {
    check_asks_for_kicks("--poll-us=300", 0);
}

#[test]
fn worker_asks_for_kicks_before_it_sleeps_with_event_idx() {
    check_asks_for_kicks("--poll-us=300", features::EVENT_IDX);
}

#[test]
fn adaptive_worker_asks_for_kicks_before_it_sleeps() {
    check_asks_for_kicks("--poll-us=auto", 0);
}

#[test]
fn adaptive_worker_asks_for_kicks_before_it_sleeps_with_event_idx() {
    check_asks_for_kicks("--poll-us=auto", features::EVENT_IDX);
}

#[test]
fn busy_worker_polls_and_needs_no_kicks() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--poll-us=1000000"]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    // Long enough for the worker to stop polling and sleep.
    sleep(Duration::from_millis(1500));
    pass(&mut rig, &mut device, 0);
    let before = rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap();
    for number in 1..100 {
        pass(&mut rig, &mut device, number);
    }
    // One for the first frame: the worker asked for kicks before it slept.
    assert!(rig.backend.pair_stats(0).unwrap().tx.kicks.unwrap() <= before + 1);
}
