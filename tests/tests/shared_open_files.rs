//! What belongs to an open file is everybody's who holds it: a target that was given a session's descriptors, and then
//! does not take it, must not hold up the source by what it does to them (`O_NONBLOCK`: fcntl(2), `F_SETFL`).
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
    a_target_that_makes_the_tap_block_does_not_hold_up_the_source,
    a_source_whose_tap_blocks_ends_when_told_to,
    a_source_whose_tap_blocks_hands_over,
    what_a_target_did_to_the_tap_is_undone,
    what_a_target_did_to_the_interface_is_undone,
    a_target_that_reads_the_front_ends_messages_holds_up_nothing,
    a_target_that_misleads_looks_at_the_front_ends_messages_is_overruled,
}

/// A device that works, and what a target was given that has gone: of it the TAP is made to block.
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

/// That frames go out while none come in, so that a read which blocks would be seen.
fn transmits(rig: &mut Rig, device: &mut Device, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        let frame = frames::numbered(number, 60);
        device.send(0, &NetHeader::default(), &frame)?;
        let (_, received) = rig.network.receive()?;
        ensure!(received == frame, "the network received something else");
    }
    Ok(())
}

fn a_target_that_makes_the_tap_block_does_not_hold_up_the_source(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    transmits(&mut rig, &mut device, 0..10).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    // Every one of these parks the worker.
    for _ in 0..10 {
        transmits(&mut rig, &mut device, 0..1).unwrap();
        device.connection.set_vring_enable(0, true).unwrap();
        make_block(&sent).unwrap();
    }
    device.stop_ring(1).unwrap();
    // The next front-end is served.
    drop(device);
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn a_source_whose_tap_blocks_ends_when_told_to(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(rig.backend.process.wait().unwrap().code(), Some(0));
}

fn a_source_whose_tap_blocks_hands_over(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    rig.check_traffic(&mut device).unwrap();
    make_block(&sent).unwrap();
    let target = Backend::waiting_for_session(datapath, &[]).unwrap();
    let report = rig.backend.become_target(target).unwrap();
    assert!(matches!(report, SessionReport::Completed { .. }), "{report:?}");
    rig.check_traffic(&mut device).unwrap();
}

fn what_a_target_did_to_the_tap_is_undone(datapath: Datapath) {
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

/// Filters, the carrier, the address, and whether the TAP outlives its holders.
fn what_a_target_did_to_the_interface_is_undone(datapath: Datapath) {
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

fn a_target_that_reads_the_front_ends_messages_holds_up_nothing(datapath: Datapath) {
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
            // Until the back-end finds out, if it does.
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

/// `SO_PEEK_OFF` belongs to the socket.
fn a_target_that_misleads_looks_at_the_front_ends_messages_is_overruled(datapath: Datapath) {
    let (mut rig, mut device, sent) = after_a_hostile_target(datapath).unwrap();
    for _ in 0..10 {
        set_peek_offset(sent.fd("frontend").unwrap(), 1000).unwrap();
        device.connection.get_features().unwrap();
    }
    rig.check_traffic(&mut device).unwrap();
}
