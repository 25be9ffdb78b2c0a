//! All holders of an open file share its state. A target that receives a session's descriptors but does not take the
//! session must not hold up the source by changing that state (`O_NONBLOCK`: fcntl(2), `F_SETFL`).
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use baton_protocol::control::SessionReport;
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message, request};
use baton_tests::fake_frontend::{Device, NetHeader, Options};
use baton_tests::frames;
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use baton_tests::session_peer::{Asked, FakeTarget, Sent, set_peek_offset, take_stage};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, recv};

on_both_datapaths! {
    tap_made_blocking_by_a_target_does_not_hold_up_the_source,
    source_with_a_blocking_tap_ends_on_sigterm,
    source_with_a_blocking_tap_hands_over,
    tap_settings_changed_by_a_target_are_restored,
    interface_settings_changed_by_a_target_are_restored,
    target_that_reads_front_end_messages_does_not_hold_up_the_source,
    peek_offset_set_by_a_target_is_overridden,
}

/// Starts a device that works, and a hand-over whose target makes the TAP and the listening socket block and then
/// leaves. Returns the descriptors that the target received.
fn after_a_hostile_target(datapath: Datapath) -> Result<(Rig, Device, Sent)> {
    let mut rig = Rig::new(datapath, 1, &[])?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let place = FakeTarget::bind(&rig.backend.directory().join("hostile"))?;
    let asked = Asked::of(&rig.backend, place.path())?;
    let link = place.accept()?;
    let sent = take_stage(&link)?;
    make_block(&sent)?;
    drop(link);
    let (_, reason) = asked.failure()?;
    ensure!(reason == "the target closed the connection", "{reason}");
    Ok((rig, device, sent))
}

fn make_block(sent: &Sent) -> Result<()> {
    for name in ["tap/0", "listener"] {
        fcntl(sent.fd(name)?, FcntlArg::F_SETFL(OFlag::empty()))?;
    }
    Ok(())
}

/// Checks that frames go out while none come in: a read that blocks would stop them.
fn check_transmits(rig: &mut Rig, device: &mut Device, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        let frame = frames::numbered(number, 60);
        device.send(0, &NetHeader::default(), &frame)?;
        let (_, received) = rig.network.receive()?;
        ensure!(received == frame, "the network received another frame");
    }
    Ok(())
}

fn tap_made_blocking_by_a_target_does_not_hold_up_the_source(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    check_transmits(&mut rig, &mut device, 0..10).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    // Each of these messages parks the worker.
    for _ in 0..10 {
        check_transmits(&mut rig, &mut device, 0..1).unwrap();
        device.connection.set_vring_enable(0, true).unwrap();
        make_block(&sent).unwrap();
    }
    device.stop_ring(1).unwrap();
    // The next front-end is served.
    drop(device);
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn source_with_a_blocking_tap_ends_on_sigterm(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
}

fn source_with_a_blocking_tap_hands_over(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    let target = Backend::waiting_for_session(datapath, &[]).unwrap();
    let report = rig.backend.become_target(target).unwrap();
    assert!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
    rig.check_traffic(&mut device).unwrap();
}

fn tap_settings_changed_by_a_target_are_restored(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 2, &["--sndbuf=100000"]).unwrap();
    let options = Options { queue_pairs: 2, ..Options::default() };
    let mut device = rig.device(options).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let place = FakeTarget::bind(&rig.backend.directory().join("hostile")).unwrap();
    let asked = Asked::of(&rig.backend, place.path()).unwrap();
    let link = place.accept().unwrap();
    let sent = take_stage(&link).unwrap();
    let tap = |pair: usize| sent.fd(&format!("tap/{pair}")).unwrap();
    let before = netns::queue_settings(tap(0)).unwrap();
    netns::spoil_queue(tap(0)).unwrap();
    netns::spoil_queue(tap(1)).unwrap();
    assert_ne!(netns::queue_settings(tap(0)).unwrap(), before);
    drop(link);
    asked.failure().unwrap();
    for pair in [0, 1] {
        assert_eq!(netns::queue_settings(tap(pair)).unwrap(), before, "pair {pair}");
    }
    rig.check_traffic(&mut device).unwrap();
}

/// Filters, carrier, address and persistence of the TAP.
fn interface_settings_changed_by_a_target_are_restored(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let place = FakeTarget::bind(&rig.backend.directory().join("hostile")).unwrap();
    let asked = Asked::of(&rig.backend, place.path()).unwrap();
    let link = place.accept().unwrap();
    let sent = take_stage(&link).unwrap();
    let tap = sent.fd("tap/0").unwrap();
    let before = netns::tap_settings(tap).unwrap();
    netns::set_filters(tap, [2, 0, 0, 0, 0, 0x99]).unwrap();
    netns::spoil_tap(tap).unwrap();
    assert_ne!(netns::tap_settings(tap).unwrap(), before);
    drop(link);
    asked.failure().unwrap();
    assert_eq!(netns::tap_settings(tap).unwrap(), before);
    netns::wait_running(TAP).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn target_that_reads_front_end_messages_does_not_hold_up_the_source(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for round in 0..20 {
        let device = rig.device(Options::default()).unwrap();
        let place = FakeTarget::bind(&rig.backend.directory().join(format!("thief{round}"))).unwrap();
        let asked = Asked::of(&rig.backend, place.path()).unwrap();
        let link = place.accept().unwrap();
        let sent = take_stage(&link).unwrap();
        drop(link);
        asked.failure().unwrap();
        let socket = sent.fd("frontend").unwrap().as_raw_fd();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = recv(socket, &mut [0; 4096], MsgFlags::MSG_DONTWAIT);
                }
            });
            // Until the back-end notices, if it does.
            let message = Message::u64(request::SET_FEATURES, device.options.features);
            let _ = (0..1000).try_for_each(|_| device.connection.send(&message, &[]));
            over.store(true, Ordering::Relaxed);
        });
        rig.backend.status().unwrap();
    }
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
}

/// `SO_PEEK_OFF` is an option of the socket, which the target holds, too.
fn peek_offset_set_by_a_target_is_overridden(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    for _ in 0..10 {
        set_peek_offset(sent.fd("frontend").unwrap(), 1000).unwrap();
        device.connection.get_features().unwrap();
    }
    rig.check_traffic(&mut device).unwrap();
}
