//! A macvtap in a network namespace of its own, and the far end of the line that it is on.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::link::ip;
use crate::netns::{Netns, wait_running};
use crate::packet_socket::PacketSocket;

/// Its name.
pub const MACVTAP: &str = "mv0";

/// The namespace's macvtap: what it sends arrives at [`Self::network`], and all that is sent there it receives.
#[derive(Debug)]
pub struct Macvtap {
    /// The far end of the line.
    pub network: PacketSocket,
    /// Its queues.
    pub queues: Vec<OwnedFd>,
}

impl Macvtap {
    /// Makes one with `queues` queues, opened as management does.
    ///
    /// # Errors
    /// The system's.
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
        // The kernel notices a carrier some time after it came, and drops frames until then.
        ["near", "far", MACVTAP].into_iter().try_for_each(wait_running)?;
        let directory = tempfile::tempdir()?;
        let node = directory.path().join("macvtap");
        make_node(&node)?;
        let open = || File::options().read(true).write(true).open(&node).map(OwnedFd::from);
        let queues = (0..queues).map(|_| open()).collect::<std::io::Result<_>>().context("open a macvtap")?;
        Ok(Self { network: PacketSocket::open("far")?, queues })
    }
}

/// The node in `/dev` is named by the interface's index, which two namespaces may share.
fn make_node(path: &Path) -> Result<()> {
    let folder = format!("/sys/class/net/{MACVTAP}/macvtap");
    let entry = std::fs::read_dir(&folder)?.next().context("a macvtap has no device")??;
    let numbers = std::fs::read_to_string(entry.path().join("dev"))?;
    let (major, minor) = numbers.trim().split_once(':').context("no device number")?;
    let device = makedev(major.parse()?, minor.parse()?);
    mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, device).context("mknod")
}
