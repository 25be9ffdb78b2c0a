//! Numbers that name no inherited descriptor. Each is refused, and never taken for a file that the back-end has opened.

use std::os::fd::{AsFd, AsRawFd};

use baton_tests::backend::{Backend, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::netns::{self, Netns};

use super::{TAP_OPTION, assert_refuses};

/// The lowest free numbers, which the files that a back-end opens get.
const NUMBERS: std::ops::Range<i32> = 3..9;

/// Checks that a back-end with these arguments refuses descriptor `fd` of `option`, and opens nothing before.
fn assert_not_open(option: &str, fd: i32, others: &[&str]) {
    let named = format!("{option}={fd}");
    let arguments = [others, &[&named]].concat();
    let backend = Backend::with_arguments(Datapath::Userspace, &arguments, &[]).unwrap();
    assert_refuses(backend, 1, &[&format!("{option}: descriptor {fd} is not open")]);
    assert!(!netns::exists(TAP), "the TAP was created");
}

#[test]
fn number_that_is_not_open_is_refused_whatever_else_is_opened() {
    let netns = Netns::enter().unwrap();
    netns.hide_devices().unwrap();
    // A file that opens, where the machine may have no vhost-net.
    std::fs::write("/dev/vhost-net", "").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |option: &str, name: &str| format!("{option}={}", directory.path().join(name).display());
    let (socket, incoming) = (path("--socket-path", "front-end"), path("--incoming-fds", "incoming"));
    for fd in NUMBERS {
        for others in [&[TAP_OPTION][..], &[TAP_OPTION, "--vhost"], &[&incoming], &[&incoming, "--vhost"]] {
            assert_not_open("--fd", fd, others);
        }
        for others in [&[&*socket][..], &[&socket, "--vhost"], &[&socket, "--client", "--vhost"]] {
            assert_not_open("--tap-fds", fd, others);
        }
        for others in [&[&*socket, TAP_OPTION][..], &[&socket, TAP_OPTION, "--vhost"], &[&incoming]] {
            assert_not_open("--vhost-fds", fd, others);
        }
    }
}

#[test]
fn number_that_is_not_open_is_refused_beside_inherited_descriptors() {
    let netns = Netns::enter().unwrap();
    let taps = netns.create_tap(TAP, 2).unwrap();
    let fds = [taps[0].as_fd(), taps[1].as_fd()];
    let [first, second] = [taps[0].as_raw_fd(), taps[1].as_raw_fd()];
    let closed = 900;
    for (arguments, error) in [
        (vec![format!("--tap-fds={first},{closed}")], format!("--tap-fds: descriptor {closed} is not open")),
        (
            vec![format!("--tap-fds={first},{second}"), format!("--vhost-fds={closed},901")],
            format!("--vhost-fds: descriptor {closed} is not open"),
        ),
        (
            vec![format!("--tap-fds={first},{first}")],
            format!("--tap-fds: descriptor {first} was given twice"),
        ),
        (vec!["--tap-fds=2".to_owned()], "--tap-fds: descriptor 2 is standard".to_owned()),
        (vec!["--tap-fds=-1".to_owned()], "--tap-fds: descriptor -1 is not open".to_owned()),
    ] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let backend = Backend::listening(Datapath::Userspace, &arguments, &fds).unwrap();
        assert_refuses(backend, 1, &[&error]);
    }
}
