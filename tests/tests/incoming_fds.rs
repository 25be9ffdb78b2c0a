//! `--incoming-fds`: the options that it excludes, what a waiting back-end offers, and that it needs no privileges.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use baton_protocol::control::{BackendState, HandoverState};
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::features;
use baton_tests::fake_frontend::wire::protocol;
use baton_tests::fake_frontend::{Connection, Options};
use baton_tests::netns::Netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::Process;
use baton_tests::programs;

on_both_datapaths! {
    waiting_back_end_offers_every_feature,
    adopted_device_sets_queue_pairs_and_configuration,
}

/// Connects a front-end, and negotiates the protocol features that these tests need.
fn negotiated(target: &mut Backend) -> Connection {
    let connection = target.connect().unwrap();
    connection.get_features().unwrap();
    connection.set_protocol_features(protocol::MQ | protocol::CONFIG | protocol::REPLY_ACK).unwrap();
    connection
}

fn usage_error(arguments: &[&str]) -> String {
    let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
    let mut process = Process::start(&programs::backend().unwrap(), &arguments, &[]).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(2));
    process.log()
}

#[test]
fn one_error_names_every_excluded_option() {
    let error = usage_error(&[
        "--socket-path=s",
        "--incoming-fds=p",
        "--tap=tap0",
        "--sndbuf=0",
        "--mac=02:00:00:00:00:01",
        "--mtu=1500",
        "--script=/x",
        "--downscript=/y",
    ]);
    assert_eq!(
        error,
        "baton-backend: --incoming-fds receives the device with its settings: remove --tap, --sndbuf, --mac, --mtu, \
         --script, --downscript; see --help\n"
    );
    let error = usage_error(&["--socket-path=s", "--incoming-fds=p", "--tap-fds=5", "--downscript=/y"]);
    assert!(error.contains("remove --tap-fds, --downscript;"), "{error}");
}

#[test]
fn vhost_fds_must_match_the_number_of_queue_pairs() {
    let error = usage_error(&["--socket-path=s", "--incoming-fds=p", "--queue-pairs=3", "--vhost-fds=7,8"]);
    assert!(error.contains("--vhost-fds has 2 descriptors for 3 queue pairs"), "{error}");
}

fn waiting_back_end_offers_every_feature(datapath: Datapath) {
    let mut target = Backend::waiting(datapath, &[]).unwrap();
    let status = target.status().unwrap();
    assert_eq!((status.state, status.tap.as_str()), (BackendState::Waiting, ""));
    assert!(status.vrings.is_empty());
    let connection = negotiated(&mut target);
    let offer = connection.get_features().unwrap();
    for feature in [features::MAC, features::MTU, features::MQ, features::HOST_USO, features::GUEST_UFO] {
        assert_ne!(offer & feature, 0, "{feature:#x} is not offered");
    }
    assert_eq!(connection.get_queue_num().unwrap(), 256);
    let mut target = Backend::waiting(datapath, &["--queue-pairs=3"]).unwrap();
    assert_eq!(negotiated(&mut target).get_queue_num().unwrap(), 6);
}

fn adopted_device_sets_queue_pairs_and_configuration(datapath: Datapath) {
    let mac = "--mac=02:00:00:00:00:77";
    let mut rig = Rig::new(datapath, 3, &[mac, "--mtu=1400"]).unwrap();
    let options = Options {
        queue_pairs: 3,
        features: Options::default().features | features::MQ,
        ..Options::default()
    };
    let mut device = rig.device(options).unwrap();
    let mut target = Backend::waiting(datapath, &[]).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let connection = negotiated(&mut target);
    assert_eq!(connection.get_queue_num().unwrap(), 6);
    let config = connection.get_config(0, 12).unwrap();
    assert_eq!(config[..6], [2, 0, 0, 0, 0, 0x77]);
    assert_eq!(config[10..12], 1400u16.to_le_bytes());
    let _old = device.move_to(connection).unwrap();
    rig.backend.wait_handover(HandoverState::HandedOver).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn target_needs_no_privileges_and_no_access_to_the_tun_device() {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[]).unwrap();
    let options = Options {
        queue_pairs: 2,
        features: Options::default().features | features::MQ | features::GUEST_CSUM | features::GUEST_TSO4,
        ..Options::default()
    };
    let mut device = rig.device(options).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let (_outer, directory) = Backend::unprivileged_directory().unwrap();
    let incoming = directory.join("incoming");
    let option = format!("--incoming-fds={}", incoming.display());
    let mut target = Backend::unprivileged(&[&option], &[]).unwrap();
    target.status().unwrap();
    let text = std::fs::read_to_string(format!("/proc/{}/status", target.process.pid())).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Uid:\t65534"] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    rig.backend.arm(&incoming).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    let _old = device.move_to(target.connect().unwrap()).unwrap();
    rig.backend.wait_handover(HandoverState::HandedOver).unwrap();
    rig.backend = target;
    rig.check_traffic(&mut device).unwrap();
    rig.backend.check_healthy().unwrap();
}

#[test]
fn downscript_of_another_user_is_refused_by_name() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--downscript=/bin/true"]).unwrap();
    let (_outer, directory) = Backend::unprivileged_directory().unwrap();
    let incoming = directory.join("incoming");
    let option = format!("--incoming-fds={}", incoming.display());
    let mut target = Backend::unprivileged(&[&option], &[]).unwrap();
    target.status().unwrap();
    let error = rig.backend.arm(&incoming).unwrap_err().to_string();
    assert_eq!(
        error,
        "the target refuses: downscript-user: the downscript \"/bin/true\" comes from another user and would not be \
         run; start the source with --downscript=no"
    );
}

#[test]
fn downscript_in_another_namespace_is_refused_by_name() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &["--downscript=/bin/true"]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    let refuses = |rig: &mut Rig, target: &mut Backend, place: &str| {
        let refusal = format!("downscript-place: the downscript \"/bin/true\" would run in another {place}");
        let armed = rig.backend.arm(&target.incoming()).unwrap_err().to_string();
        assert!(armed.contains(&refusal), "{armed}");
        let report = rig.backend.hand_over_to(&target.incoming(), false).unwrap();
        let reason = report["reason"].as_str().unwrap();
        assert!(reason.contains(&refusal), "{reason}");
    };
    let network = Netns::enter().unwrap();
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    drop(network);
    refuses(&mut rig, &mut target, "network namespace");
    // In the same namespaces the path names the same script.
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    rig.backend.become_target(target).unwrap();
    rig.check_traffic(&mut device).unwrap();
    // From here on every process that this thread starts has another mount namespace.
    rig.netns.mount_sysfs().unwrap();
    let mut target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    refuses(&mut rig, &mut target, "mount namespace");
    rig.check_traffic(&mut device).unwrap();
}
