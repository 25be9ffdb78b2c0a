//! Hand-overs of a session to another back-end: the front-end and the guest notice nothing, whatever state the session
//! is in.

use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, ensure};
use baton_protocol::control::{BackendState, Frontend, SessionReport};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::features;
use baton_tests::fake_frontend::{Connection, Device, Options};
use baton_tests::load;
use baton_tests::netns;
use baton_tests::on_both_datapaths;

on_both_datapaths! {
    session_moves_under_load,
    session_moves_before_it_is_negotiated,
    session_moves_with_its_rings_stopped,
    device_moves_without_a_front_end,
}

/// Frames a second each way.
const RATE: u32 = 20_000;

fn options(queue_pairs: u16) -> Options {
    let features = Options::default().features | features::MQ;
    Options { queue_pairs, features, ..Options::default() }
}

/// Starts a back-end and a front-end, and checks their traffic.
fn serving(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    Ok((rig, device))
}

/// Hands the session over to a new back-end, which becomes the rig's.
fn hand_over(rig: &mut Rig) -> Result<SessionReport> {
    let target = Backend::waiting_for_session(rig.datapath, &[])?;
    rig.backend.become_target(target)
}

/// Checks that the TAP has dropped no frame.
fn check_nothing_dropped() -> Result<()> {
    let dropped = netns::counters(TAP)?.tx_dropped;
    ensure!(dropped == 0, "the TAP dropped {dropped} frames");
    Ok(())
}

fn session_moves_under_load(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(datapath, 4)?;
    let before = rig.backend.stats()?;
    let Rig { network, backend, .. } = &mut rig;
    let (report, sent) = load::run(&mut device, network, RATE, || {
        let target = Backend::waiting_for_session(datapath, &[])?;
        backend.become_target(target)
    })?;
    device.connection.check_quiet()?;
    check_nothing_dropped()?;
    let SessionReport::Completed { blackout_us, phases } = report else {
        unreachable!("become_target checks it")
    };
    let phases: u64 = ["stop", "commit", "pass", "take", "start"].map(|phase| phases[phase]).iter().sum();
    ensure!(blackout_us > 0 && phases <= blackout_us, "blackout of {blackout_us} µs, phases of {phases} µs");
    let status = rig.backend.status()?;
    ensure!((status.state, status.tap.as_str(), status.queue_pairs) == (BackendState::Serving, TAP, 4));
    if datapath == Datapath::Userspace {
        let frames = |stats: &baton_protocol::control::BackendStats| -> u64 {
            stats.queue_pairs.iter().filter_map(|pair| pair.rx.frames).sum()
        };
        ensure!(
            frames(&rig.backend.stats()?) == frames(&before) + sent.down,
            "the target does not continue the counters"
        );
    }
    // The session can still be suspended, and the next front-end is served.
    device.suspend()?;
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    drop(device);
    let mut device = rig.device(options(4))?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

#[test]
fn hundred_hand_overs_leak_nothing_with_one_queue_pair() {
    hundred_hand_overs_leak_nothing(1).unwrap();
}

#[test]
fn hundred_hand_overs_leak_nothing_with_four_queue_pairs() {
    hundred_hand_overs_leak_nothing(4).unwrap();
}

fn hundred_hand_overs_leak_nothing(queue_pairs: u16) -> Result<()> {
    let (mut rig, mut device) = serving(Datapath::Userspace, queue_pairs)?;
    let Rig { network, backend, .. } = &mut rig;
    let mut sizes = Vec::new();
    load::run(&mut device, network, RATE, || {
        for hop in 0..100 {
            let target = Backend::waiting_for_session(Datapath::Userspace, &[])?;
            backend.become_target(target).with_context(|| format!("hop {hop}"))?;
            if hop % 45 == 5 {
                backend.status()?;
                let process = &backend.process;
                sizes.push((process.open_fds()?, process.threads()?, process.resident_bytes()?));
            }
        }
        Ok(())
    })?;
    device.connection.check_quiet()?;
    check_nothing_dropped()?;
    let (fds, threads, resident) = sizes[0];
    for size in &sizes {
        ensure!((size.0, size.1) == (fds, threads) && size.2 < resident + (1 << 20), "{sizes:?}");
    }
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn session_moves_before_it_is_negotiated(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(datapath, 1, &[])?;
    let connection = rig.backend.connect()?;
    let offered = connection.get_features()?;
    hand_over(&mut rig)?;
    connection.check_quiet()?;
    ensure!(connection.get_features()? == offered);
    ensure!(rig.backend.status()?.frontend == Frontend::Connected);
    let mut device = Device::new(connection, options(1))?;
    device.negotiate()?;
    hand_over(&mut rig)?;
    device.set_up()?;
    hand_over(&mut rig)?;
    device.fill_receive_rings()?;
    rig.check_traffic(&mut device)?;
    hand_over(&mut rig)?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn session_moves_with_its_rings_stopped(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(datapath, 1)?;
    device.suspend()?;
    rig.inject(0..20, 100)?;
    hand_over(&mut rig)?;
    hand_over(&mut rig)?;
    device.restart_rings()?;
    rig.expect_in_guest(&mut device, 0..20)?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn device_moves_without_a_front_end(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(datapath, 2, &[])?;
    hand_over(&mut rig)?;
    ensure!(rig.backend.status()?.state == BackendState::Waiting);
    let mut device = rig.device(options(2))?;
    rig.check_traffic(&mut device)?;
    drop(device);
    hand_over(&mut rig)?;
    let mut device = rig.device(options(2))?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

#[test]
fn target_of_a_client_back_end_reconnects_to_the_front_end() {
    let netns = netns::Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("front-end");
    let listener = UnixListener::bind(&path).unwrap();
    let arguments =
        [format!("--socket-path={}", path.display()), "--client".to_owned(), format!("--tap={TAP}")];
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut backend = Backend::with_arguments(Datapath::Userspace, &arguments, &[]).unwrap();
    backend.status().unwrap();
    let accept = || Connection::new(listener.accept().unwrap().0).unwrap();
    let connection = accept();
    let features = connection.get_features().unwrap();
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    backend.become_target(target).unwrap();
    connection.check_quiet().unwrap();
    drop(connection);
    assert_eq!(accept().get_features().unwrap(), features);
    assert!(path.exists());
}
