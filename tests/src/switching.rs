//! Switches the network device of a running guest off and on under traffic, in every way that a guest can: its link,
//! its driver, and the number of its queue pairs. Afterwards the device must work, and the back-end hold no more
//! resources than before.

use std::collections::HashSet;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::datapath::Datapath;
use crate::fake_frontend::{Device, Options, features};
use crate::guest::Guest;
use crate::link::{GUEST, HOST, Link, PORT};
use crate::process::Process;

/// How often to switch in each way.
const ROUNDS: u16 = 2;

/// Boots a guest, switches its device off and on, and switches the guest off.
///
/// # Errors
/// Returns an error if the device or the traffic fails, or the back-end holds more resources than before.
pub fn check(link: &mut Link, boot: impl FnOnce(&Link) -> Result<Guest>) -> Result<()> {
    serve_once(link)?;
    link.wait_left()?;
    let at_rest = Holdings::of(&link.backend)?;
    ensure!(at_rest.vhost_workers == 0, "vhost workers without a front-end: {at_rest:?}");

    let mut guest = boot(link)?;
    check_all_pairs(link, &mut guest)?;
    let serving = Holdings::of(&link.backend)?;
    let workers = match link.datapath() {
        Datapath::Userspace => 0,
        Datapath::VhostNet => usize::from(link.queue_pairs()),
    };
    ensure!(serving.vhost_workers == workers, "expected {workers} vhost workers: {serving:?}");

    for switch in [switch_link, switch_driver, switch_queue_pairs] {
        start_load(&mut guest)?;
        for _ in 0..ROUNDS {
            switch(link, &mut guest)?;
        }
        end_load(&mut guest)?;
        check_all_pairs(link, &mut guest)?;
        serving.wait(&mut link.backend)?;
    }

    link.check_flows(&mut guest, 2000, 16, 2000)?;
    ensure!(guest.power_off()?.success(), "the VMM failed when its guest was switched off");
    link.wait_left()?;
    at_rest.wait(&mut link.backend)?;
    link.check_healthy()
}

fn switch_link(_: &Link, guest: &mut Guest) -> Result<()> {
    guest.check("ip link set eth0 down && ip link set eth0 up")?;
    wait_traffic(guest)
}

fn switch_driver(_: &Link, guest: &mut Guest) -> Result<()> {
    rebind_driver(guest)?;
    wait_traffic(guest)
}

/// Unbinds the device from its driver, and binds it again.
///
/// # Errors
/// Returns an error if the driver does not come up again.
pub fn rebind_driver(guest: &mut Guest) -> Result<()> {
    let device = guest.check("basename $(readlink /sys/class/net/eth0/device)")?;
    let device = device.trim();
    let driver = "/sys/bus/virtio/drivers/virtio_net";
    guest.check(&format!("echo {device} > {driver}/unbind && ! [ -e /sys/class/net/eth0 ]"))?;
    guest.check(&format!("echo {device} > {driver}/bind"))?;
    guest.check(&format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"))?;
    Ok(())
}

fn switch_queue_pairs(link: &Link, guest: &mut Guest) -> Result<()> {
    for pairs in [1, 2, link.queue_pairs()] {
        guest.check(&format!("ethtool -L eth0 combined {pairs}"))?;
        ensure!(guest.queue_pairs("eth0")?.len() == usize::from(pairs));
        wait_traffic(guest)?;
    }
    Ok(())
}

/// Starts TCP transfers in the guest, alternating between both directions until [`end_load`].
fn start_load(guest: &mut Guest) -> Result<()> {
    let bulk = format!("traffic bulk {HOST}:{PORT} --direction=$way --bytes={} --streams=2", 1 << 20);
    guest.check(&format!(
        "touch /tmp/load; (while [ -e /tmp/load ]; do for way in up down; do {bulk}; done; done) \
         >/dev/null 2>>/tmp/errors &"
    ))?;
    wait_traffic(guest)
}

/// Ends the transfers and checks that no data was lost or damaged. Streams may only fail to connect, while there is no
/// network.
fn end_load(guest: &mut Guest) -> Result<()> {
    guest.check("rm /tmp/load; wait")?;
    let errors = guest.check("cat /tmp/errors")?;
    let broken: Vec<_> = errors.lines().filter(|line| !line.contains("cannot connect")).collect();
    ensure!(broken.is_empty(), "TCP streams broke: {broken:#?}");
    Ok(())
}

/// Waits until another 64 KiB have passed each way.
fn wait_traffic(guest: &mut Guest) -> Result<()> {
    for way in ["rx", "tx"] {
        let bytes = format!("$(cat /sys/class/net/eth0/statistics/{way}_bytes)");
        guest.check(&format!("end=$(({bytes} + 65536)); while [ {bytes} -lt $end ]; do sleep 0.1; done"))?;
    }
    Ok(())
}

/// Checks pings and TCP transfers with checksums, and that every queue pair carries frames both ways.
///
/// # Errors
/// Returns an error if the traffic fails, or a queue pair carries nothing one way.
pub fn check_all_pairs(link: &Link, guest: &mut Guest) -> Result<()> {
    let before = guest.queue_pairs("eth0")?;
    link.check_pings(guest, 10)?;
    link.check_bulk(guest, 1 << 18, link.queue_pairs())?;
    let after = guest.queue_pairs("eth0")?;
    ensure!(after.len() == usize::from(link.queue_pairs()), "{after:?}");
    for (before, after) in before.iter().zip(&after) {
        let used = after.rx.frames > before.rx.frames && after.tx.frames > before.tx.frames;
        ensure!(used, "a queue pair carried nothing one way: before {before:?}, after {after:?}");
    }
    Ok(())
}

/// Serves a front-end once, so that the back-end holds everything that it keeps from one session to the next.
fn serve_once(link: &mut Link) -> Result<()> {
    let features = Options::default().features | features::MQ;
    let options = Options { queue_pairs: link.queue_pairs(), features, ..Options::default() };
    let device = Device::connect(link.socket()?.as_ref(), options)?;
    // When the back-end answers, it has handled all messages and started its threads.
    link.status()?;
    drop(device);
    Ok(())
}

/// The system resources of a back-end.
#[derive(Clone, Copy, Debug)]
struct Holdings {
    threads: usize,
    fds: usize,
    vhost_workers: usize,
}

impl Holdings {
    fn of(backend: &Process) -> Result<Self> {
        Ok(Self {
            threads: backend.threads()?,
            fds: backend.open_fds()?,
            vhost_workers: vhost_workers(backend)?,
        })
    }

    /// Waits until the back-end has no more than this. It may have less, because this may include a control connection
    /// that had just been closed.
    fn wait(self, backend: &mut Process) -> Result<()> {
        let held = |backend: &Process| {
            let now = Self::of(backend)?;
            let no_more =
                now.threads <= self.threads && now.fds <= self.fds && now.vhost_workers <= self.vhost_workers;
            Ok(no_more.then_some(()))
        };
        let waited = backend.wait_until("it held no more than before", held);
        waited.with_context(|| format!("before: {self:?}, now: {:?}", Self::of(backend)))
    }
}

/// Counts the kernel's vhost workers of a back-end. They are named after the thread that owns the vhost device. Since
/// Linux 6.4 they are threads of the owner's process; before, they are kernel threads.
fn vhost_workers(backend: &Process) -> Result<usize> {
    let tasks = format!("/proc/{}/task", backend.pid());
    let owners: HashSet<String> = names_in(&tasks)?.map(|owner| format!("vhost-{owner}")).collect();
    let mut workers = 0;
    for folder in ["/proc", &tasks] {
        for thread in names_in(folder)? {
            // Entries that are not threads, and threads that have just ended, have no such file.
            let name = fs::read_to_string(format!("{folder}/{thread}/comm")).unwrap_or_default();
            workers += usize::from(owners.contains(name.trim_end()));
        }
    }
    Ok(workers)
}

fn names_in(folder: &str) -> Result<impl Iterator<Item = String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {folder}"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()))
}
