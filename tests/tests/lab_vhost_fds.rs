//! `--vhost-fds`: descriptors of `/dev/vhost-net` that the parent process opened.
#![expect(unsafe_code, reason = "an ioctl of vhost's")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, ensure};
use baton_protocol::control::Datapath;
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::fake_frontend::{NetHeader, Options};
use baton_tests::netns::Netns;
use baton_tests::packet_socket::PacketSocket;
use baton_tests::{frames, lab};

nix::ioctl_none!(
    /// `VHOST_SET_OWNER`.
    set_owner,
    0xaf,
    0x01
);

fn open_vhost_net() -> Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/vhost-net").context("/dev/vhost-net")
}

#[test]
fn unprivileged_back_end_serves_with_inherited_descriptors() -> Result<()> {
    lab::run(|| {
        let netns = Netns::enter()?;
        let taps = netns.create_tap(TAP, 2)?;
        let vhost = [open_vhost_net()?, open_vhost_net()?];
        let tap_fds = format!("--tap-fds={},{}", taps[0].as_raw_fd(), taps[1].as_raw_fd());
        let vhost_fds = format!("--vhost-fds={},{}", vhost[0].as_raw_fd(), vhost[1].as_raw_fd());
        let fds = [taps[0].as_fd(), taps[1].as_fd(), vhost[0].as_fd(), vhost[1].as_fd()];
        let mut backend = Backend::unprivileged(&[&tap_fds, &vhost_fds], &fds)?;
        ensure!(backend.status()?.datapath == Datapath::VhostNet);
        drop((taps, vhost));
        let mut network = PacketSocket::open(TAP)?;
        // The vhost-net instances are released at the end of each session and reused by the next.
        for _ in 0..3 {
            let mut device = backend.device(Options { queue_pairs: 2, ..Options::default() })?;
            for pair in 0..2 {
                let frame = frames::numbered(u32::try_from(pair)?, 100);
                device.send(pair, &NetHeader::default(), &frame)?;
                ensure!(network.receive()?.1 == frame);
            }
        }
        backend.check_healthy()
    })
}

#[test]
fn target_without_access_to_vhost_net_gets_it_with_the_session() -> Result<()> {
    lab::run(|| {
        for source in [Datapath::Userspace, Datapath::VhostNet] {
            let mut rig = Rig::new(source, 2, &[])?;
            let options = Options { queue_pairs: 2, ..Options::default() };
            let mut device = rig.device(options.clone())?;
            rig.check_traffic(&mut device)?;
            let (_outer, directory) = Backend::unprivileged_directory()?;
            let incoming = directory.join("incoming");
            let option = format!("--incoming-fds={}", incoming.display());
            let mut target = Backend::unprivileged(&["--vhost", &option], &[])?;
            target.status()?;
            let possible = rig.backend.hand_over_to(&incoming, true)?;
            ensure!(possible == serde_json::json!({"result": "possible"}), "{possible}");
            let done = rig.backend.hand_over_to(&incoming, false)?;
            ensure!(done["result"] == "completed", "{done}");
            let mut source_backend = std::mem::replace(&mut rig.backend, target);
            ensure!(source_backend.process.wait()?.code() == Some(0));
            ensure!(rig.backend.status()?.datapath == Datapath::VhostNet);
            rig.check_traffic(&mut device)?;
            rig.backend.check_healthy()?;
        }
        Ok(())
    })
}

#[test]
fn unusable_vhost_net_descriptor_is_refused_by_name() -> Result<()> {
    lab::run(|| {
        let _netns = Netns::enter()?;
        let owned = open_vhost_net()?;
        // SAFETY: the request has no argument.
        unsafe { set_owner(owned.as_raw_fd()) }?;
        let null = File::open("/dev/null")?;
        for (file, word) in [(&owned, "has an owner already"), (&null, "is not an open /dev/vhost-net")] {
            let option = format!("--vhost-fds={}", file.as_raw_fd());
            let mut backend =
                Backend::listening(Datapath::Userspace, &["--tap=tap0", &option], &[file.as_fd()])?;
            ensure!(backend.process.wait()?.code() == Some(1));
            let log = backend.process.log();
            ensure!(log.lines().count() == 1 && log.contains(word), "{log}");
            ensure!(log.contains(&format!("descriptor {}", file.as_raw_fd())), "{log}");
        }
        Ok(())
    })
}
