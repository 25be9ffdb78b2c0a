//! The ownership word and the messages of a device's hand-over where they disagree: offers that are read late, a word
//! that a peer overwrites, a source and a target that end at the same time. Also offers to a back-end that has offered
//! its own device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use baton_channel::ownership::SharedWord;
use baton_protocol::control::HandoverState;
use baton_protocol::handover::prologue::Purpose;
use baton_protocol::handover::wire::message::{Hello, Message, OWNERSHIP_FD, ReadyToTake};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::device_state::{
    ACCEPTED, REFUSED, check, negotiated, options, pair, set_state_fd, stopped, transfer,
};
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::{Connection, Device};
use baton_tests::frames;
use baton_tests::on_both_datapaths;
use baton_tests::process::{Process, is_stopped, until};
use baton_tests::session_peer::{FakeTarget, Link};
use nix::sys::signal::Signal;
use nix::sys::socket::SockType;

on_both_datapaths! {
    offer_read_after_it_was_retracted_is_ignored,
    last_of_several_late_offers_counts,
    back_end_with_an_offered_device_refuses_another_device,
}

/// Starts a device that works, and arms its hand-over to a waiting back-end.
fn armed(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    let target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    Ok((rig, device, target))
}

/// Stops a process, and waits until it is stopped.
fn stop(process: &Process) -> Result<()> {
    process.signal(Signal::SIGSTOP)?;
    until("the process was stopped", || is_stopped(process.pid()))
}

/// Makes the source offer its device and take it back, once for each epoch.
fn offer_and_take_back(rig: &mut Rig, device: &mut Device, epochs: std::ops::Range<u32>) -> Result<()> {
    for epoch in epochs {
        device.suspend()?;
        rig.backend.wait_handover(HandoverState::Offered)?;
        rig.network.send(&frames::numbered(epoch, 99))?;
        device.restart_rings()?;
        let armed = rig.backend.wait_handover(HandoverState::Armed)?;
        ensure!(armed.epoch == Some(u64::from(epoch)), "{armed:?}");
        let (_, received) = rig.receive_on_any(device)?;
        ensure!(frames::number_of(&received) == Some(epoch));
    }
    Ok(())
}

/// Moves the suspended device to the target.
fn hand_over(rig: &mut Rig, device: &mut Device, mut target: Backend) -> Result<()> {
    target.wait_handover(HandoverState::Adopted)?;
    let source_connection = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    drop(source_connection);
    let mut source = std::mem::replace(&mut rig.backend, target);
    ensure!(source.process.wait()?.success(), "{}", source.process.log());
    rig.check_traffic(device)?;
    rig.backend.check_healthy()
}

fn offer_read_after_it_was_retracted_is_ignored(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 2)?;
    stop(&target.process)?;
    offer_and_take_back(&mut rig, &mut device, 1..2)?;
    target.process.signal(Signal::SIGCONT)?;
    target.process.wait_until("it read the offer", |target| {
        let log = target.log();
        ensure!(!log.contains("refused an offered device"), "{log}");
        Ok(log.contains("retracted the offer before it was read").then_some(()))
    })?;
    rig.backend.wait_handover(HandoverState::Armed)?;
    device.suspend()?;
    hand_over(&mut rig, &mut device, target)
}

fn last_of_several_late_offers_counts(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, target) = armed(datapath, 2)?;
    stop(&target.process)?;
    offer_and_take_back(&mut rig, &mut device, 1..4)?;
    device.suspend()?;
    let offered = rig.backend.wait_handover(HandoverState::Offered)?;
    ensure!(offered.epoch == Some(4), "{offered:?}");
    target.process.signal(Signal::SIGCONT)?;
    hand_over(&mut rig, &mut device, target)
}

#[test]
fn retracted_offer_over_device_state_fails_with_a_reason() {
    let (mut rig, mut device, mut target, connection) = stopped(Datapath::Userspace, 1).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
    assert_eq!(set_state_fd(&device.connection, true, ours).unwrap(), ACCEPTED);
    assert!(check(&device.connection).unwrap());
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    assert_eq!(set_state_fd(&connection, false, theirs).unwrap(), ACCEPTED);
    assert!(!check(&connection).unwrap());
    let log = target.process.log();
    assert!(log.contains("the source retracted its offer"), "{log}");
    target.wait_no_handover().unwrap();
    target.process.wait_open_fds(at_rest).unwrap();
    // The failure has changed neither side: the next transfer succeeds.
    device.suspend().unwrap();
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

/// Plays a target that is ready to take a device.
fn agree(source: &Link) -> Result<()> {
    let (Message::Hello(_), _) = source.hear()? else { bail!("no HELLO") };
    let hello = Hello {
        purpose: Purpose::Device.name().to_owned(),
        program: "test".to_owned(),
        dry_run: false,
        wants_vhost: false,
    };
    source.say(&Message::Hello(hello))?;
    let (Message::Prepare(_), _) = source.hear()? else { bail!("no PREPARE") };
    source.say(&Message::Ready(ReadyToTake {}))
}

/// Receives the next offer; returns its ownership word.
fn hear_word(source: &Link) -> Result<OwnedFd> {
    let (Message::Offer(mut offer), fds) = source.hear()? else { bail!("no OFFER") };
    Ok(std::mem::take(&mut offer.fds).pair(fds)?.claim(OWNERSHIP_FD)?)
}

fn garbage(word: &OwnedFd) -> Result<()> {
    Ok(File::from(word.try_clone()?).write_all_at(&[0xff; 8], 0)?)
}

fn aborted(word: &OwnedFd) -> Result<()> {
    let word = SharedWord::from_fd(word.try_clone()?)?;
    let now = word.load()?;
    Ok(word.swap(now, now.aborted().context("an offer")?).must_win()?)
}

/// How an offer ends without being taken.
#[derive(Clone, Copy, Debug)]
enum End {
    Ring,
    Cancel,
    Closed,
}

#[test]
fn invalid_ownership_word_leaves_device_with_source() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let place = FakeTarget::bind(&rig.backend.directory().join("fake")).unwrap();
    for scribble in [garbage, aborted] {
        for end in [End::Ring, End::Cancel, End::Closed] {
            let source = thread::scope(|scope| -> Result<Link> {
                let target = scope.spawn(|| {
                    let source = place.accept()?;
                    agree(&source)?;
                    Ok(source)
                });
                rig.backend.arm(place.path())?;
                target.join().unwrap()
            })
            .unwrap();
            device.suspend().unwrap();
            let word = hear_word(&source).unwrap();
            rig.backend.wait_handover(HandoverState::Offered).unwrap();
            scribble(&word).unwrap();
            let source = match end {
                End::Ring => Some(source),
                End::Cancel => {
                    rig.backend.cancel().unwrap();
                    Some(source)
                }
                End::Closed => {
                    drop(source);
                    None
                }
            };
            device.restart_rings().unwrap();
            let failed = rig.backend.wait_handover(HandoverState::Failed).unwrap();
            let reason = "unexpected ownership word";
            assert_eq!(failed.reason.as_deref(), Some(reason), "{end:?}");
            rig.check_traffic(&mut device).unwrap();
            drop(source);
        }
    }
    // The source still gives the device to an honest target.
    let target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    hand_over(&mut rig, &mut device, target).unwrap();
}

#[test]
fn source_or_target_runs_the_downscript_when_both_end_together() {
    for round in 0..12 {
        let downscript = Downscript::new().unwrap();
        let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
        let device = rig.device(options(1)).unwrap();
        let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
        rig.backend.arm(&target.incoming()).unwrap();
        device.suspend().unwrap();
        target.wait_handover(HandoverState::Adopted).unwrap();
        rig.backend.wait_handover(HandoverState::Offered).unwrap();
        let mut both = [&mut rig.backend.process, &mut target.process];
        if round % 2 == 0 {
            both.reverse();
        }
        for signal in [Signal::SIGSTOP, Signal::SIGTERM, Signal::SIGCONT] {
            for process in &both {
                process.signal(signal).unwrap();
            }
        }
        for process in both {
            assert!(process.wait().unwrap().success(), "{}", process.log());
        }
        assert_eq!(downscript.runs().unwrap(), [TAP], "round {round}");
    }
}

/// Moves a device with a downscript to a target by `SET_DEVICE_STATE_FD`. The target has adopted it.
fn adopted_over_device_state() -> Result<(Downscript, Rig, Device, Backend, Connection)> {
    let downscript = Downscript::new()?;
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()])?;
    let device = rig.device(options(1))?;
    device.suspend()?;
    let mut target = Backend::waiting(Datapath::Userspace, &[])?;
    let connection = negotiated(&mut target)?;
    transfer(&device, &connection)?;
    target.wait_handover(HandoverState::Adopted)?;
    Ok((downscript, rig, device, target, connection))
}

#[test]
fn last_holder_runs_the_downscript_of_a_device_moved_by_its_front_end() {
    let (downscript, mut rig, _device, mut target, _connection) = adopted_over_device_state().unwrap();
    for process in [&mut rig.backend.process, &mut target.process] {
        assert!(downscript.runs().unwrap().is_empty());
        process.signal(Signal::SIGTERM).unwrap();
        assert!(process.wait().unwrap().success(), "{}", process.log());
    }
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

/// The VM has not moved: it may run on at the source, whose next back-end needs the TAP.
#[test]
fn target_drops_device_when_its_front_end_leaves_after_source_ended() {
    for end in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
        let device = rig.device(options(1)).unwrap();
        device.suspend().unwrap();
        let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
        let connection = negotiated(&mut target).unwrap();
        transfer(&device, &connection).unwrap();
        target.wait_handover(HandoverState::Adopted).unwrap();
        rig.backend.process.signal(end).unwrap();
        rig.backend.process.wait().unwrap();
        drop(connection);
        target.wait_no_handover().unwrap();
        assert!(target.status().unwrap().tap.is_empty(), "{end}");
        rig.restart_backend().unwrap();
        let mut device = rig.device(options(1)).unwrap();
        rig.check_traffic(&mut device).unwrap();
    }
}

fn back_end_with_an_offered_device_refuses_another_device(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, target) = armed(datapath, 1)?;
    device.suspend()?;
    hand_over(&mut rig, &mut device, target)?;
    // The back-end still listens on the socket where it waited.
    let place = rig.backend.incoming();
    rig.netns.create_persistent_tap("tap1", true)?;
    let mut stranger = Backend::listening(datapath, &["--tap=tap1", "--queue-pairs=4"], &[])?;
    stranger.status()?;
    let mut refused = |why: &str| -> Result<()> {
        let error = stranger.arm(&place).err().context("the back-end accepts another device")?.to_string();
        ensure!(error == format!("the target refuses: {why}"), "{error}");
        Ok(())
    };
    const BUSY: &str = "busy: the target is in another hand-over";

    let mut target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    rig.backend.wait_handover(HandoverState::Offered)?;
    refused(BUSY)?;
    // It does not accept one from its front-end either.
    let (ours, _theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&device.connection, false, ours)? == REFUSED, "the back-end accepts another device");
    // Its own device is unchanged.
    ensure!(device.connection.get_queue_num()? == 2);
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;

    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    let source_connection = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    refused(BUSY)?;
    let (ours, _theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&source_connection, false, ours)? == REFUSED, "the back-end accepts another device");
    drop(source_connection);
    ensure!(rig.backend.process.wait()?.success(), "{}", rig.backend.process.log());
    let _old = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}
