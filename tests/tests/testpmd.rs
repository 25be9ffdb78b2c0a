//! DPDK's `dpdk-testpmd` as the front-end, with its `net_virtio_user` device: a virtio driver and vhost-user front-end
//! in one process, which answers pings.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::link::{GUEST, Link, MAC, Meeting};
use baton_tests::on_both_datapaths;
use baton_tests::ping;
use baton_tests::process::Process;

on_both_datapaths! {
    two_pairs_as_client,
}

/// Starts testpmd and waits until the back-end serves it.
fn start(link: &mut Link, meeting: Meeting, queue_pairs: u16) -> Result<Process> {
    let server = match meeting {
        Meeting::BackendListens => "",
        Meeting::FrontendListens => {
            // A testpmd that was killed leaves its socket, and the next one will not bind over it.
            let _ = std::fs::remove_file(link.socket()?);
            ",server=1"
        }
    };
    let device = format!(
        "--vdev=net_virtio_user0,path={},queues={queue_pairs},queue_size=1024,mac={MAC}{server}",
        link.socket()?
    );
    // Of its own, for several tests at once.
    let prefix = format!("--file-prefix=baton-{}", std::process::id());
    let queues = [format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")];
    let arguments: Vec<OsString> =
        ["--lcores=0@0,1@0", "--no-pci", "--no-telemetry", "--no-huge", "-m", "256"]
            .into_iter()
            .chain([device.as_str(), &prefix, "--", "--nb-cores=1", "--total-num-mbufs=8192"])
            .chain(["--rxd=1024", "--txd=1024", "--forward-mode=icmpecho", "--stats-period=3600"])
            // What comes before it forwards waits for it, rather than being thrown away.
            .chain(["--no-flush-rx"])
            .chain(queues.iter().map(String::as_str))
            .map(OsString::from)
            .collect();
    let program = Path::new("/usr/bin/dpdk-testpmd");
    let mut testpmd = Process::start(program, &arguments, &[])?;
    link.wait_serving().with_context(|| format!("testpmd:\n{}", testpmd.log()))?;
    ensure!(testpmd.is_running()?, "testpmd has ended:\n{}", testpmd.log());
    Ok(testpmd)
}

fn serves_on(link: &mut Link, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 100)?;

    // Another front-end, the same back-end.
    drop(testpmd);
    let mut testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 100)?;

    link.restart_backend()?;
    if meeting == Meeting::BackendListens {
        // As a client, virtio-user does not connect again.
        drop(testpmd);
        testpmd = start(link, meeting, queue_pairs)?;
    }
    link.wait_serving()?;
    ping::check(GUEST, 100)?;
    ensure!(testpmd.is_running()?, "testpmd has ended:\n{}", testpmd.log());
    link.check_healthy()
}

fn serves(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, meeting, queue_pairs)?;
    serves_on(&mut link, meeting, queue_pairs).with_context(|| link.evidence())
}

#[test]
fn one_pair_listening() -> Result<()> {
    serves(Datapath::Userspace, Meeting::BackendListens, 1)
}

#[test]
fn one_pair_as_client() -> Result<()> {
    serves(Datapath::Userspace, Meeting::FrontendListens, 1)
}

#[test]
fn two_pairs_listening() -> Result<()> {
    serves(Datapath::Userspace, Meeting::BackendListens, 2)
}

fn two_pairs_as_client(datapath: Datapath) -> Result<()> {
    serves(datapath, Meeting::FrontendListens, 2)
}
