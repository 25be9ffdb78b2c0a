//! The TAPs that the back-end creates, opens or inherits, and those that it refuses.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::Options;
use baton_tests::faults::Faults;
use baton_tests::link::ip;
use baton_tests::netns::{self, Netns, open_tun};
use baton_tests::on_both_datapaths;
use baton_tests::packet_socket::PacketSocket;
use nix::sys::signal::Signal;

use super::{TAP_OPTION, assert_refuses, check_traffic};

on_both_datapaths! {
    missing_tap_is_created_and_ends_with_the_back_end,
    existing_tap_is_used_with_its_own_queue_mode,
    back_end_keeps_foreign_flags_of_a_tap,
    filters_of_the_last_user_are_dropped,
    inherited_taps_are_used,
}

fn missing_tap_is_created_and_ends_with_the_back_end(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    for queue_pairs in [1, 2] {
        let option = format!("--queue-pairs={queue_pairs}");
        let mut backend = Backend::listening(datapath, &[TAP_OPTION, &option], &[]).unwrap();
        assert_eq!(backend.status().unwrap().queue_pairs, queue_pairs);
        // Addresses and link state are left to the operator.
        assert!(!netns::is_up(TAP).unwrap());
        netns::set_up(TAP).unwrap();
        let mut network = PacketSocket::open(TAP).unwrap();
        let mut device = backend.device(Options { queue_pairs, ..Options::default() }).unwrap();
        if queue_pairs == 1 {
            check_traffic(&mut device, &mut network);
        }
        backend.process.signal(Signal::SIGTERM).unwrap();
        backend.process.wait().unwrap();
        assert!(!netns::exists(TAP));
    }
    drop(netns);
}

fn existing_tap_is_used_with_its_own_queue_mode(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    // One pair on a multi-queue TAP, and on one of a single queue.
    for (name, multi_queue) in [("tap1", true), ("tap2", false)] {
        netns.create_persistent_tap(name, multi_queue).unwrap();
        let mut network = PacketSocket::open(name).unwrap();
        let option = format!("--tap={name}");
        let mut backend = Backend::listening(datapath, &[&option], &[]).unwrap();
        let mut device = backend.device(Options::default()).unwrap();
        check_traffic(&mut device, &mut network);
        assert_eq!(backend.status().unwrap().tap, name);
        drop((device, backend));
        assert!(netns::exists(name), "the back-end removed a TAP that it did not create");
    }
}

/// `IFF_NAPI`: the kernel processes frames written to the TAP in batches.
const IFF_NAPI: libc::c_int = 0x10;

fn back_end_keeps_foreign_flags_of_a_tap(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.mount_sysfs().unwrap();
    let flags = || std::fs::read_to_string(format!("/sys/class/net/{TAP}/tun_flags")).unwrap();
    for (queue_pairs, multi_queue) in [(1, 0), (1, libc::IFF_MULTI_QUEUE), (2, libc::IFF_MULTI_QUEUE)] {
        let own = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | IFF_NAPI | multi_queue;
        let tap = open_tun(TAP, own).unwrap();
        netns::set_persistent(&tap).unwrap();
        netns::set_up(TAP).unwrap();
        drop(tap);
        let before = flags();
        let mut network = PacketSocket::open(TAP).unwrap();
        let option = format!("--queue-pairs={queue_pairs}");
        let mut backend = Backend::listening(datapath, &[TAP_OPTION, &option], &[]).unwrap();
        let mut device = backend.device(Options::default()).unwrap();
        check_traffic(&mut device, &mut network);
        assert_eq!(flags(), before);
        drop((device, backend));
        assert_eq!(flags(), before);
        ip(&["link", "del", TAP]).unwrap();
    }
}

fn filters_of_the_last_user_are_dropped(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    let tap = open_tun(TAP, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    netns::set_filters(&tap, [2, 0, 0, 0, 0, 99]).unwrap();
    drop(tap);
    let mut network = PacketSocket::open(TAP).unwrap();
    let mut backend = Backend::listening(datapath, &[TAP_OPTION], &[]).unwrap();
    let mut device = backend.device(Options::default()).unwrap();
    check_traffic(&mut device, &mut network);
}

fn inherited_taps_are_used(datapath: Datapath) {
    let netns = Netns::enter().unwrap();
    for queues in [1u16, 3] {
        let name = format!("tap{queues}");
        let taps = netns.create_tap(&name, usize::from(queues)).unwrap();
        let numbers: Vec<_> = taps.iter().map(|tap| tap.as_raw_fd().to_string()).collect();
        let option = format!("--tap-fds={}", numbers.join(","));
        let fds: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
        let mut backend = Backend::listening(datapath, &[&option], &fds).unwrap();
        let status = backend.status().unwrap();
        assert_eq!((status.tap, status.queue_pairs), (name.clone(), queues));
        drop(fds);
        drop(taps);
        let mut network = PacketSocket::open(&name).unwrap();
        let mut device = backend.device(Options::default()).unwrap();
        check_traffic(&mut device, &mut network);
    }
}

#[test]
fn unsuitable_tap_is_refused_by_name() {
    let netns = Netns::enter().unwrap();
    let tun = open_tun("tun5", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    let plain = open_tun("plain6", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    for (fd, name) in [(&tun, "tun5"), (&plain, "plain6"), (&file, "descriptor")] {
        let option = format!("--tap-fds={}", fd.as_raw_fd());
        assert_refuses(
            Backend::listening(Datapath::Userspace, &[&option], &[fd.as_fd()]).unwrap(),
            1,
            &[name],
        );
    }
    netns::set_persistent(&tun).unwrap();
    drop(tun);
    assert_refuses(Backend::listening(Datapath::Userspace, &["--tap=tun5"], &[]).unwrap(), 1, &["tun5"]);
    assert_refuses(Backend::listening(Datapath::Userspace, &["--tap=a/b"], &[]).unwrap(), 1, &["a/b"]);
    assert_refuses(Backend::listening(Datapath::Userspace, &["--tap-fds=77"], &[]).unwrap(), 1, &["77"]);
    drop(netns);
}

#[test]
fn tap_in_use_is_refused_by_name() {
    let netns = Netns::enter().unwrap();
    let _tap = netns.create_tap(TAP, 1).unwrap();
    assert_refuses(Backend::listening(Datapath::Userspace, &[TAP_OPTION], &[]).unwrap(), 1, &[TAP]);
}

#[test]
fn multi_queue_tap_of_another_process_is_refused_by_name() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, true).unwrap();
    for (first, second) in [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")] {
        let pairs = |number: &str| format!("--queue-pairs={number}");
        let mut holder = Backend::listening(Datapath::Userspace, &[TAP_OPTION, &pairs(first)], &[]).unwrap();
        holder.status().unwrap();
        let other = Backend::listening(Datapath::Userspace, &[TAP_OPTION, &pairs(second)], &[]).unwrap();
        assert_refuses(other, 1, &[TAP, "another process uses it"]);
        holder.check_healthy().unwrap();
        holder.process.signal(Signal::SIGTERM).unwrap();
        assert_eq!(holder.process.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn back_end_waits_for_a_killed_predecessor_to_release_the_tap() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, true).unwrap();
    // The back-end creates `tap1`: after each kill with another queue mode.
    for (tap, pairs) in [("--tap=tap0", ["1", "2"]), ("--tap=tap1", ["1", "2"])] {
        let pairs = pairs.map(|number| format!("--queue-pairs={number}"));
        let mut backend = Backend::listening(Datapath::Userspace, &[tap], &[]).unwrap();
        for round in 0..25 {
            backend.status().unwrap();
            let arguments = [tap, &pairs[round % 2]];
            backend.replace(Datapath::Userspace, &arguments, &Faults::default()).unwrap();
        }
        backend.check_healthy().unwrap();
    }
}

#[test]
fn queue_given_twice_is_refused_by_name() {
    let netns = Netns::enter().unwrap();
    let taps = netns.create_tap(TAP, 2).unwrap();
    let again = taps[0].try_clone().unwrap();
    let numbers = [taps[0].as_raw_fd(), taps[1].as_raw_fd(), again.as_raw_fd()].map(|fd| fd.to_string());
    let option = format!("--tap-fds={}", numbers.join(","));
    let fds = [taps[0].as_fd(), taps[1].as_fd(), again.as_fd()];
    let backend = Backend::listening(Datapath::Userspace, &[&option], &fds).unwrap();
    assert_refuses(backend, 1, &["--tap-fds", &numbers[0], &numbers[2], "same queue"]);
}

#[test]
fn mtu_above_that_of_the_tap_is_warned_about_once() {
    let netns = Netns::enter().unwrap();
    netns.create_persistent_tap(TAP, false).unwrap();
    for (mtu, warnings) in [("1500", 0), ("1501", 1), ("9000", 1)] {
        let option = format!("--mtu={mtu}");
        let mut backend = Backend::listening(Datapath::Userspace, &[TAP_OPTION, &option], &[]).unwrap();
        backend.status().unwrap();
        backend.process.signal(Signal::SIGTERM).unwrap();
        assert_eq!(backend.process.wait().unwrap().code(), Some(0));
        let log = backend.process.log();
        let named =
            |line: &&str| line.contains("WARN") && [mtu, "1500", TAP].iter().all(|word| line.contains(word));
        assert_eq!(log.lines().filter(named).count(), warnings, "{log}");
    }
}

#[test]
fn send_buffer_that_would_stay_full_is_refused() {
    let netns = Netns::enter().unwrap();
    for bytes in 1..=5 {
        let option = format!("--sndbuf={bytes}");
        let backend = Backend::listening(Datapath::Userspace, &[TAP_OPTION, &option], &[]).unwrap();
        assert_refuses(backend, 2, &["--sndbuf", "6"]);
    }
    // An inherited TAP keeps its opener's send buffer unless `--sndbuf` is given.
    let taps = netns.create_tap(TAP, 2).unwrap();
    netns::set_sndbuf(&taps[1], 5).unwrap();
    let option = format!("--tap-fds={},{}", taps[0].as_raw_fd(), taps[1].as_raw_fd());
    let fds = [taps[0].as_fd(), taps[1].as_fd()];
    assert_refuses(
        Backend::listening(Datapath::Userspace, &[&option], &fds).unwrap(),
        1,
        &[TAP, "5 bytes", "--sndbuf"],
    );
    let mut backend = Backend::listening(Datapath::Userspace, &[&option, "--sndbuf=6"], &fds).unwrap();
    backend.status().unwrap();
}

#[test]
fn renamed_tap_is_reported_and_handed_over_by_its_new_name() {
    let mut rig = Rig::new(Datapath::Userspace, 2, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    ip(&["link", "set", TAP, "down"]).unwrap();
    ip(&["link", "set", TAP, "name", "renamed"]).unwrap();
    ip(&["link", "set", "renamed", "up"]).unwrap();
    assert_eq!(rig.backend.status().unwrap().tap, "renamed");
    let target = Backend::waiting_for_session(Datapath::Userspace, &[]).unwrap();
    rig.backend.become_busy_target(target).unwrap();
    assert_eq!(rig.backend.status().unwrap().tap, "renamed");
    rig.network = PacketSocket::open("renamed").unwrap();
    rig.check_traffic(&mut device).unwrap();
}

#[test]
fn scripts_get_the_name_of_the_tap() {
    let netns = Netns::enter().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let record = directory.path().join("record");
    let mut options = vec![TAP_OPTION.to_owned()];
    for option in ["script", "downscript"] {
        let path = directory.path().join(option);
        std::fs::write(&path, format!("#!/bin/sh\necho {option} \"$1\" >> {}\n", record.display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        options.push(format!("--{option}={}", path.display()));
    }
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let mut backend = Backend::listening(Datapath::Userspace, &options, &[]).unwrap();
    backend.status().unwrap();
    assert_eq!(std::fs::read_to_string(&record).unwrap(), "script tap0\n");
    backend.process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(backend.process.wait().unwrap().code(), Some(0));
    assert_eq!(std::fs::read_to_string(&record).unwrap(), "script tap0\ndownscript tap0\n");
    drop(netns);
}
