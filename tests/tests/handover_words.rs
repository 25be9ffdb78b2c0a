//! The ownership word and the messages of a device's hand-over, where they do not agree: offers that are read late, a
//! word that a peer has scribbled in, two ends that go at the same time; and offers to a process whose own device is
//! out of its hands.

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
    an_offer_that_is_read_after_it_was_taken_back_ends_nothing,
    of_offers_that_are_read_late_the_last_counts,
    a_back_end_whose_device_is_given_takes_no_other,
}

/// A device that works, with a back-end that waits for it, armed.
fn armed(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    let target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    Ok((rig, device, target))
}

/// Stops a process: once this returns, it does nothing.
fn stop(process: &Process) -> Result<()> {
    process.signal(Signal::SIGSTOP)?;
    until("the process was stopped", || is_stopped(process.pid()))
}

/// The source offers its device, and takes it back, so many times.
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

/// The front-end stops the device, and the target gets it.
fn hand_over(rig: &mut Rig, device: &mut Device, mut target: Backend) -> Result<()> {
    target.wait_handover(HandoverState::Adopted)?;
    let old = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    drop(old);
    let mut source = std::mem::replace(&mut rig.backend, target);
    ensure!(source.process.wait()?.success(), "{}", source.process.log());
    rig.check_traffic(device)?;
    rig.backend.check_healthy()
}

fn an_offer_that_is_read_after_it_was_taken_back_ends_nothing(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 2)?;
    stop(&target.process)?;
    offer_and_take_back(&mut rig, &mut device, 1..2)?;
    target.process.signal(Signal::SIGCONT)?;
    target.process.wait_until("it had read the offer", |target| {
        let log = target.log();
        ensure!(!log.contains("is refused"), "{log}");
        Ok(log.contains("took the offer back before it was read").then_some(()))
    })?;
    rig.backend.wait_handover(HandoverState::Armed)?;
    device.suspend()?;
    hand_over(&mut rig, &mut device, target)
}

fn of_offers_that_are_read_late_the_last_counts(datapath: Datapath) -> Result<()> {
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
fn an_offer_that_a_front_end_brings_too_late_fails_by_name() {
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
    assert!(log.contains("the source took its offer back"), "{log}");
    target.wait_no_handover().unwrap();
    target.process.wait_open_fds(at_rest).unwrap();
    // The next one finds both as they were.
    device.suspend().unwrap();
    transfer(&device, &connection).unwrap();
    device.move_to(connection).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

/// A target of the test's own says that it would take a device.
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

/// The ownership word of the next offer.
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

/// What ends an offer, other than its being taken.
#[derive(Clone, Copy, Debug)]
enum End {
    Ring,
    Cancel,
    Closed,
}

#[test]
fn a_word_that_cannot_be_leaves_the_device_to_its_source() {
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
    // An honest target gets it.
    let target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    hand_over(&mut rig, &mut device, target).unwrap();
}

#[test]
fn of_a_source_and_a_target_that_end_together_one_runs_the_downscript() {
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

/// A device with a downscript that front-ends have brought to a target, which has adopted it.
fn brought() -> Result<(Downscript, Rig, Device, Backend, Connection)> {
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
fn who_is_left_with_a_device_runs_the_downscript_whoever_brought_it() {
    let (downscript, mut rig, _device, mut target, _connection) = brought().unwrap();
    for process in [&mut rig.backend.process, &mut target.process] {
        assert!(downscript.runs().unwrap().is_empty());
        process.signal(Signal::SIGTERM).unwrap();
        assert!(process.wait().unwrap().success(), "{}", process.log());
    }
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

/// Its VM has not moved: it may run on at the source, whose next back-end needs the TAP.
#[test]
fn a_front_end_that_leaves_leaves_no_device_with_the_target_whatever_became_of_the_source() {
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

fn a_back_end_whose_device_is_given_takes_no_other(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, target) = armed(datapath, 1)?;
    device.suspend()?;
    hand_over(&mut rig, &mut device, target)?;
    // It still listens where it once waited.
    let place = rig.backend.incoming();
    rig.netns.create_persistent_tap("tap1", true)?;
    let mut stranger = Backend::listening(datapath, &["--tap=tap1", "--queue-pairs=4"], &[])?;
    stranger.status()?;
    let mut refused = |why: &str| -> Result<()> {
        let error = stranger.arm(&place).err().context("it would take another device")?.to_string();
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
    // Nor from its front-end, which brings what would be that of four queue pairs.
    let (ours, _theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&device.connection, false, ours)? == REFUSED, "it would take another device");
    // What it has of its own is as it was.
    ensure!(device.connection.get_queue_num()? == 2);
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;

    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    let old = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    refused(BUSY)?;
    let (ours, _theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&old, false, ours)? == REFUSED, "it would take another device");
    drop(old);
    ensure!(rig.backend.process.wait()?.success(), "{}", rig.backend.process.log());
    let _old = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}
