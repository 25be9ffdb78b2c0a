//! The device handed to another back-end when its front-end has stopped it, as the operator armed: taken, taken back,
//! refused and cancelled, and what becomes of it when a process dies on the way.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use baton_channel::bound_socket::BoundSocket;
use baton_control::ControlClient;
use baton_protocol::control::{BackendState, HandoverState, Request};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::downscript::Downscript;
use baton_tests::fake_frontend::net::{GSO_TCPV4, NetHeader, features};
use baton_tests::fake_frontend::wire::protocol;
use baton_tests::fake_frontend::{Connection, Device, Options};
use baton_tests::frames::{self, Network, Transport, segment};
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;
use baton_tests::session_peer::FakeTarget;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

on_both_datapaths! {
    the_targets_first_ring_takes_the_device,
    rings_that_start_first_wait_for_the_device,
    rings_that_start_while_the_source_works_go_on_where_it_stops,
    nothing_is_lost_doubled_or_reordered_over_many_hops,
    a_guest_that_reboots_keeps_its_device_and_it_can_still_be_handed_over,
    a_target_that_dies_leaves_the_device_to_its_source,
    a_source_that_dies_leaves_the_device_to_its_target,
    the_targets_own_datapath_counts,
    what_the_targets_datapath_cannot_do_is_refused,
}

fn options(queue_pairs: u16) -> Options {
    let features = Options::default().features | features::MQ;
    Options { queue_pairs, features, ..Options::default() }
}

/// A frame of the UDP flow with this source port.
fn flow(port: u16) -> Vec<u8> {
    let mut frame = segment(Network::V4, Transport::Udp, b"flow");
    let place = frame.transport_offset;
    frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
    frame.bytes
}

/// A device that works, with a back-end that waits for it, armed.
fn armed(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    let target = Backend::waiting(datapath, &[])?;
    let answer = rig.backend.arm(&target.incoming())?;
    ensure!(answer == serde_json::json!({"result": "armed"}), "{answer}");
    Ok((rig, device, target))
}

/// The same, with the device stopped and offered.
fn offered(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let (mut rig, device, mut target) = armed(datapath, queue_pairs)?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    rig.backend.wait_handover(HandoverState::Offered)?;
    Ok((rig, device, target))
}

/// Moves the device to the target, which is the rig's back-end then; gives the old one, its front-end gone.
fn take(rig: &mut Rig, device: &mut Device, mut target: Backend) -> Result<Backend> {
    let old = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    drop(old);
    Ok(std::mem::replace(&mut rig.backend, target))
}

fn expect_exit(backend: &mut Backend) -> Result<()> {
    let status = backend.process.wait()?;
    ensure!(status.code() == Some(0), "{status}; log:\n{}", backend.process.log());
    Ok(())
}

fn the_targets_first_ring_takes_the_device(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 4)?;
    let status = target.status()?;
    ensure!(status.state == BackendState::Waiting && status.tap.is_empty(), "{status:?}");
    ensure!(rig.backend.status()?.state == BackendState::HandingOver);
    // What comes meanwhile waits in the TAP, whichever queue the kernel chose.
    let flows: Vec<_> = (2000..2032).map(flow).collect();
    for frame in &flows {
        rig.network.send(frame)?;
    }

    let mut old = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    let mut received = Vec::new();
    for _ in &flows {
        received.push(rig.receive_on_any(&mut device)?.1);
    }
    received.sort();
    ensure!(received == flows, "the guest received something else");
    let mut source = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device)?;

    // A ring that the source's front-end starts now stays still.
    device.suspend()?;
    std::mem::swap(&mut device.connection, &mut old);
    device.restart_rings()?;
    source.wait_started(0)?;
    device.suspend()?;
    std::mem::swap(&mut device.connection, &mut old);
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    let status = rig.backend.status()?;
    ensure!((status.state, status.tap.as_str(), status.queue_pairs) == (BackendState::Serving, TAP, 4));
    ensure!(source.status()?.state == BackendState::HandedOver);
    // It stays for as long as its front-end does.
    ensure!(source.process.is_running()?);
    drop(old);
    expect_exit(&mut source)?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn rings_that_start_first_wait_for_the_device(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 2)?;
    // The source still has a ring, so it is not suspended.
    for index in 0..3 {
        device.stop_ring(index)?;
    }
    let frame = frames::numbered(6, 100);
    rig.network.send(&frame)?;
    let old = device.move_to(target.connect()?)?;
    for index in 0..4 {
        target.wait_started(index)?;
        // Of a ring that had been in use, when its call was set.
        device.ring(index).take_calls()?;
    }
    ensure!(target.status()?.tap.is_empty());
    ensure!(rig.backend.status()?.state == BackendState::Serving);
    old.get_vring_base(3)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    rig.backend = target;
    // The drivers hear of the new owner, whether or not there is anything for them.
    for index in 0..4 {
        let called = device.ring(index).wait_call(Instant::now() + PATIENCE)?;
        ensure!(called, "vring {index} was not called when the device was taken");
    }
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(received == frame, "the guest received something else");
    rig.check_traffic(&mut device)
}

/// Where such a ring stands is the source's to say, up to its end: the used index that the target saw first is long past.
fn rings_that_start_while_the_source_works_go_on_where_it_stops(datapath: Datapath) -> Result<()> {
    for restarted in [false, true] {
        let (mut rig, mut device, mut target) = armed(datapath, 1)?;
        let mut other = target.connect()?;
        std::mem::swap(&mut device.connection, &mut other);
        device.negotiate()?;
        device.connection.set_memory_table(&device.memory)?;
        for index in 0..2 {
            device.connection.set_vring_enable(index, true)?;
            device.set_up_ring(index, device.ring(index).queue.used_index())?;
        }
        std::mem::swap(&mut device.connection, &mut other);
        for _ in 0..20 {
            rig.check_traffic(&mut device)?;
        }
        if restarted {
            // As at a stop and a start of the VM: each ring gets the base that the target gave.
            std::mem::swap(&mut device.connection, &mut other);
            for index in 0..2 {
                let base = device.stop_ring(index)?;
                device.set_up_ring(index, base)?;
            }
            std::mem::swap(&mut device.connection, &mut other);
            for _ in 0..20 {
                rig.check_traffic(&mut device)?;
            }
        }
        device.suspend()?;
        rig.backend.wait_handover(HandoverState::HandedOver)?;
        std::mem::swap(&mut device.connection, &mut other);
        rig.backend = target;
        for _ in 0..20 {
            rig.check_traffic(&mut device)?;
        }
        device.wait_transmitted(0)?;
        for index in 0..2 {
            ensure!(device.stop_ring(index)? == device.ring(index).queue.used_index());
        }
    }
    Ok(())
}

fn nothing_is_lost_doubled_or_reordered_over_many_hops(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 1)?;
    let mut next = 0;
    for _ in 0..10 {
        // Some arrive before the stop, some while nobody has the device, some after.
        rig.inject(next..next + 40, 100)?;
        device.suspend()?;
        rig.inject(next + 40..next + 80, 1400)?;
        target.wait_handover(HandoverState::Adopted)?;
        for number in next..next + 40 {
            ensure!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 90))?);
        }
        device.pairs[0].transmit.queue.publish();
        let mut source = take(&mut rig, &mut device, target)?;
        rig.inject(next + 80..next + 120, 300)?;
        rig.expect_in_guest(&mut device, next..next + 120)?;
        rig.expect_on_network(next..next + 40)?;
        expect_exit(&mut source)?;
        next += 120;
        target = Backend::waiting(datapath, &[])?;
        rig.backend.arm(&target.incoming())?;
    }
    let dropped = netns::counters(TAP)?.tx_dropped;
    ensure!(dropped == 0, "the TAP dropped {dropped} frames");
    rig.backend.check_healthy()
}

fn a_guest_that_reboots_keeps_its_device_and_it_can_still_be_handed_over(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    for epoch in 1..4 {
        rig.network.send(&frames::numbered(epoch, 300))?;
        device.restart_rings()?;
        let (_, received) = rig.receive_on_any(&mut device)?;
        ensure!(frames::number_of(&received) == Some(epoch));
        rig.check_traffic(&mut device)?;
        ensure!(rig.backend.wait_handover(HandoverState::Armed)?.epoch == Some(u64::from(epoch)));
        target.wait_handover(HandoverState::Ready)?;
        ensure!(target.status()?.tap.is_empty());
        device.suspend()?;
        target.wait_handover(HandoverState::Adopted)?;
    }
    let mut source = take(&mut rig, &mut device, target)?;
    rig.check_traffic(&mut device)?;
    expect_exit(&mut source)
}

fn a_target_that_dies_leaves_the_device_to_its_source(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    target.process.signal(Signal::SIGKILL)?;
    target.process.wait()?;
    let failed = rig.backend.wait_handover(HandoverState::Failed)?;
    ensure!(failed.reason.as_deref() == Some("the target closed the connection"), "{failed:?}");
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    // Another one may come.
    let mut target = Backend::waiting(datapath, &[])?;
    rig.backend.arm(&target.incoming())?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    take(&mut rig, &mut device, target)?;
    rig.check_traffic(&mut device)
}

fn a_source_that_dies_leaves_the_device_to_its_target(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    rig.backend.process.signal(Signal::SIGKILL)?;
    rig.backend.process.wait()?;
    rig.network.send(&frames::numbered(9, 90))?;
    device.move_to(target.connect()?)?;
    rig.backend = target;
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(frames::number_of(&received) == Some(9));
    rig.check_traffic(&mut device)
}

fn the_targets_own_datapath_counts(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[])?;
    let mut device = rig.device(options(2))?;
    // There and back.
    for datapath in [datapath, Datapath::Userspace] {
        rig.check_traffic(&mut device)?;
        let mut target = Backend::waiting(datapath, &[])?;
        rig.backend.arm(&target.incoming())?;
        device.suspend()?;
        target.wait_handover(HandoverState::Adopted)?;
        let mut source = take(&mut rig, &mut device, target)?;
        expect_exit(&mut source)?;
        ensure!(rig.backend.status()?.datapath == datapath);
    }
    rig.check_traffic(&mut device)
}

fn what_the_targets_datapath_cannot_do_is_refused(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[])?;
    let options =
        Options { protocol_features: options(1).protocol_features | protocol::INFLIGHT_SHMFD, ..options(1) };
    let mut device = rig.device(options)?;
    let target = Backend::waiting(datapath, &[])?;
    let refused = rig.backend.arm(&target.incoming()).err().map(|error| error.to_string());
    let expected = match datapath {
        Datapath::Userspace => None,
        Datapath::VhostNet => Some(
            "the target refuses: protocol-features: negotiated protocol features 0x1000 are not the target's; use a \
             target with the same datapath and version"
                .to_owned(),
        ),
    };
    ensure!(refused == expected, "{refused:?}");
    rig.check_traffic(&mut device)
}

#[test]
fn a_source_whose_front_end_leaves_ends_and_leaves_the_device_to_the_target() {
    let (mut rig, mut device, mut target) = offered(Datapath::Userspace, 1).unwrap();
    let (end, _other) = UnixStream::pair().unwrap();
    let nobody = Connection::new(end).unwrap();
    drop(std::mem::replace(&mut device.connection, nobody));
    expect_exit(&mut rig.backend).unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    device.move_to(target.connect().unwrap()).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_frame_in_hand_is_delivered_first() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let options = Options {
        features: options(1).features | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..options(1)
    };
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // One buffer: the next frame begins there, and does not fit.
    device.post_receive_buffers(0, 1).unwrap();
    device.ring(0).kick().unwrap();
    rig.network.send(&frames::numbered(1, 1400)).unwrap();
    rig.expect_in_guest(&mut device, 1..2).unwrap();
    // Receiving posts nothing by itself but what was received, so there is one again.
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    let header = large.header(GSO_TCPV4, 1400);
    rig.network.send_with(&header, &large.bytes).unwrap();
    rig.network.send(&frames::numbered(2, 100)).unwrap();

    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.wait_handover(HandoverState::Offered).unwrap();
    let mut source = take(&mut rig, &mut device, target).unwrap();
    expect_exit(&mut source).unwrap();
    device.post_receive_buffers(0, usize::MAX).unwrap();
    device.ring(0).kick().unwrap();
    let (_, first) = device.receive(0).unwrap();
    assert_eq!(first.len(), large.bytes.len());
    rig.expect_in_guest(&mut device, 2..3).unwrap();
    // Counted once, wherever.
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(3)).unwrap();
}

#[test]
fn a_cancelled_hand_over_leaves_the_device_where_it_is() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    // With a client.
    rig.backend.status().unwrap();
    let open = rig.backend.process.open_fds().unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    assert_eq!(rig.backend.cancel().unwrap(), serde_json::json!({"result": "cancelled"}));
    rig.backend.wait_handover(HandoverState::Cancelled).unwrap();
    rig.backend.process.wait_open_fds(open).unwrap();
    device.suspend().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();

    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.cancel().unwrap();
    let connection = target.connect().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();
    drop(connection);

    let error = rig.backend.cancel().unwrap_err();
    assert_eq!(error.to_string(), "no hand-over is under way");
}

#[test]
fn a_dry_run_changes_nothing() {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[]).unwrap();
    let mut device = rig.device(options(2)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let request = |path: PathBuf| Request::Handover {
        path: Some(path.display().to_string()),
        on_suspend: true,
        dry_run: true,
        cancel: false,
    };
    let answer = rig.backend.ask(&request(target.incoming())).unwrap();
    assert_eq!(answer, serde_json::json!({"result": "possible"}));
    device.suspend().unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    target.wait_no_handover().unwrap();

    let other = Backend::waiting(Datapath::Userspace, &["--queue-pairs=3"]).unwrap();
    let error = rig.backend.ask(&request(other.incoming())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the target refuses: queue-pairs: the source has 2 queue pairs, the target 3; give it the same \
         --queue-pairs, or none"
    );
}

#[test]
fn refusals_say_why_and_leave_the_source_serving() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let refused = |backend: &mut Backend, path: &Path| backend.arm(path).unwrap_err().to_string();

    let nobody = rig.backend.directory().join("nobody");
    let why = refused(&mut rig.backend, &nobody);
    assert!(why.starts_with(&format!("cannot connect to {}: ", nobody.display())), "{why}");

    let wrong = rig.backend.control.clone();
    let why = refused(&mut rig.backend, &wrong);
    assert!(why.contains("cannot connect to"), "{why}");

    let mut waiting = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let to_itself = waiting.incoming();
    assert_eq!(refused(&mut waiting, &to_itself), "this back-end has no TAP to hand over");

    rig.backend.arm(&to_itself).unwrap();
    let why = refused(&mut rig.backend, &to_itself);
    assert_eq!(
        why,
        format!("a hand-over to {} is under way; end it with handover --cancel", to_itself.display())
    );
    // A second source.
    let tap = rig.netns.create_tap("tap1", 1).unwrap();
    drop(tap);
    let mut second = Backend::listening(Datapath::Userspace, &["--tap=tap1"], &[]).unwrap();
    second.status().unwrap();
    assert_eq!(
        refused(&mut second, &to_itself),
        "the target refuses: busy: the target is in another hand-over"
    );

    // A target that has its device, and one that is told to hand it to itself.
    device.suspend().unwrap();
    waiting.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, waiting).unwrap();
    assert_eq!(
        refused(&mut second, &to_itself),
        "the target refuses: already-initialised: the target has a TAP already and cannot receive another; start \
         one with --incoming-fds"
    );
    assert_eq!(
        refused(&mut rig.backend, &to_itself),
        "this is the same back-end: it cannot hand anything over to itself"
    );
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn only_the_last_owner_runs_the_downscript() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let mut source = take(&mut rig, &mut device, target).unwrap();
    expect_exit(&mut source).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the source has run the downscript");
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut rig.backend).unwrap();
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn a_target_that_a_source_has_left_the_device_to_cleans_up_for_it() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.wait_handover(HandoverState::Offered).unwrap();
    rig.backend.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut rig.backend).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the source has run the downscript");
    target.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut target).unwrap();
    assert_eq!(downscript.runs().unwrap(), [TAP]);
}

#[test]
fn a_target_that_ends_leaves_device_and_downscript_to_its_source() {
    let downscript = Downscript::new().unwrap();
    let mut rig = Rig::new(Datapath::Userspace, 1, &[&downscript.option()]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    target.process.signal(Signal::SIGTERM).unwrap();
    expect_exit(&mut target).unwrap();
    assert!(downscript.runs().unwrap().is_empty(), "the target has run the downscript");
    rig.backend.wait_handover(HandoverState::Failed).unwrap();
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_target_that_is_waited_for_holds_up_no_other_request() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let silent = FakeTarget::bind(&rig.backend.directory().join("silent")).unwrap();
    let mut operator = ControlClient::connect(&rig.backend.control).unwrap();
    let path = Some(silent.path().display().to_string());
    let request = Request::Handover { path, on_suspend: true, dry_run: false, cancel: false };
    let asked = std::thread::spawn(move || operator.call(&request));
    let link = silent.accept().unwrap();
    let state = rig.backend.status().unwrap().handover.map(|handover| handover.state);
    assert_eq!(state, Some(HandoverState::Checking));
    let answer = rig.backend.cancel().unwrap();
    assert_eq!(answer, serde_json::json!({"result": "cancelled"}));
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("cancel"), "{error}");
    drop(link);
}

#[test]
fn a_silent_peer_is_given_up() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let silent = BoundSocket::bind_packets(&rig.backend.directory().join("silent")).unwrap();
    let error = rig.backend.arm(silent.path()).unwrap_err();
    assert_eq!(error.to_string(), "the target does not answer");
    rig.check_traffic(&mut device).unwrap();

    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let stranger = stranger(&target);
    target.wait_handover(HandoverState::Checking).unwrap();
    // Until its time is over nobody else is heard.
    let error = rig.backend.arm(&target.incoming()).unwrap_err();
    assert_eq!(error.to_string(), "the target refuses: busy: the target is in another hand-over");
    target.wait_no_handover().unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    drop(stranger);
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, target).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

/// A source that has said nothing yet.
fn stranger(target: &Backend) -> OwnedFd {
    let kind = SockType::SeqPacket;
    let stranger = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    let address = UnixAddr::new(&target.incoming()).expect("a short path");
    connect(stranger.as_raw_fd(), &address).expect("somebody who listens");
    stranger
}

#[test]
fn strangers_cost_a_waiting_target_nothing() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let mut device = rig.device(options(1)).unwrap();
    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    let at_rest = target.process.open_fds().unwrap();
    let mut packets: Vec<Vec<u8>> = vec![vec![0; 40], vec![0xff; 16], b"BATH".to_vec()];
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/tests/golden/handover-v1");
    for entry in std::fs::read_dir(golden).unwrap() {
        packets.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    for packet in packets {
        let stranger = stranger(&target);
        send(stranger.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
        // It is answered, or its connection closed: either way it was heard.
        let _ = recv(stranger.as_raw_fd(), &mut [0; 1000], MsgFlags::empty());
        drop(stranger);
        target.wait_no_handover().unwrap();
        target.process.wait_open_fds(at_rest).unwrap();
    }
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    take(&mut rig, &mut device, target).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn a_target_without_descriptors_to_spare_leaves_the_device_to_its_source() {
    let (mut rig, mut device, mut target) = armed(Datapath::Userspace, 4).unwrap();
    // Room for two of the six that come.
    let pid = Pid::from_raw(i32::try_from(target.process.pid()).unwrap());
    let limit = target.process.open_fds().unwrap() + 2;
    let maximum = Some(limit as u64);
    prlimit(pid, Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    device.suspend().unwrap();
    let failed = rig.backend.wait_handover(HandoverState::Failed).unwrap();
    assert_eq!(failed.reason.as_deref(), Some("the target closed the connection"));
    device.restart_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    // Those that had come are closed.
    let open = target.process.open_fds().unwrap();
    assert!(open < limit, "{:?}", target.process.fd_targets());
    target.check_healthy().unwrap();
    assert!(target.process.log().contains("not all descriptors of a message could be taken"));
}
