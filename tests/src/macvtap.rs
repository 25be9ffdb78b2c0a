//! A macvtap in the network namespace of a test, on a veth pair.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::link::ip;
use crate::netns::{Netns, wait_running};
use crate::packet_socket::PacketSocket;

/// The interface name of the macvtap.
pub const MACVTAP: &str = "mv0";

/// A macvtap. It exchanges frames with [`Self::network`].
#[derive(Debug)]
pub struct Macvtap {
    /// The far end of the veth pair.
    pub network: PacketSocket,
    /// The queues of the macvtap.
    pub queues: Vec<OwnedFd>,
}

impl Macvtap {
    /// Creates a macvtap with `queues` queues, opened like management software does.
    ///
    /// # Errors
    /// Returns an error if the interfaces cannot be set up.
    pub fn create(netns: &Netns, queues: usize) -> Result<Self> {
        netns.mount_sysfs()?;
        ip(&["link", "add", "near", "type", "veth", "peer", "name", "far"])?;
        let counts = ["numtxqueues", "8", "numrxqueues", "8"];
        ip(&[
            &["link", "add", "link", "near", "name", MACVTAP],
            &counts[..],
            &["type", "macvtap", "mode", "passthru"],
        ]
        .concat())?;
        for interface in ["near", "far", MACVTAP] {
            ip(&["link", "set", interface, "up"])?;
        }
        // The kernel notices a new carrier with a delay, and drops frames until then.
        ["near", "far", MACVTAP].into_iter().try_for_each(wait_running)?;
        let directory = tempfile::tempdir()?;
        let node = directory.path().join("macvtap");
        make_node(&node)?;
        let open = || File::options().read(true).write(true).open(&node).map(OwnedFd::from);
        let queues =
            (0..queues).map(|_| open()).collect::<std::io::Result<_>>().context("cannot open the macvtap")?;
        Ok(Self { network: PacketSocket::open("far")?, queues })
    }
}

/// Creates a device node. The one in `/dev` is named after the interface index, which namespaces may share.
fn make_node(path: &Path) -> Result<()> {
    let folder = format!("/sys/class/net/{MACVTAP}/macvtap");
    let entry = std::fs::read_dir(&folder)?.next().context("the macvtap has no device")??;
    let numbers = std::fs::read_to_string(entry.path().join("dev"))?;
    let (major, minor) = numbers.trim().split_once(':').context("the macvtap has no device number")?;
    let device = makedev(major.parse()?, minor.parse()?);
    mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, device)
        .context("cannot create the device node")
}
