//! DPDK's `dpdk-testpmd` as the front-end: restarts of either side, and live hand-overs. Its `net_virtio_user` device
//! is virtio driver and vhost-user front-end in one process, which answers pings.

use std::ffi::OsString;
use std::io::{PipeWriter, Write, pipe};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::link::{GUEST, Link, MAC, Meeting};
use baton_tests::on_both_datapaths;
use baton_tests::ping;
use baton_tests::process::{self, Process};

on_both_datapaths! {
    two_pairs_survive_restarts_with_client_back_end,
    two_pairs_are_handed_over_with_client_back_end,
}

/// How often the session is handed over.
const HAND_OVERS: usize = 20;

/// A running testpmd, which executes the commands written to `input`.
struct Testpmd {
    process: Process,
    input: PipeWriter,
}

impl Testpmd {
    fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}").with_context(|| format!("cannot tell testpmd to {command}"))
    }
}

/// Starts testpmd and waits until it answers. Its rings run before that: until it is started, its driver discards
/// received frames (`virtqueue_rxvq_flush` in DPDK's `virtio_dev_start`), and with several pairs it waits for the
/// back-end meanwhile.
fn start(link: &mut Link, meeting: Meeting, queue_pairs: u16) -> Result<Testpmd> {
    let server = match meeting {
        Meeting::BackendListens => "",
        Meeting::FrontendListens => {
            // A killed testpmd leaves its socket behind, and the next one does not replace it.
            let _ = std::fs::remove_file(link.socket()?);
            ",server=1"
        }
    };
    let device = format!(
        "--vdev=net_virtio_user0,path={},queues={queue_pairs},queue_size=1024,mac={MAC}{server}",
        link.socket()?
    );
    // A separate prefix for each test, since several run at once.
    let prefix = format!("--file-prefix=baton-{}", std::process::id());
    let queues = [format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")];
    let arguments: Vec<OsString> =
        ["--lcores=0@0,1@0", "--no-pci", "--no-telemetry", "--no-huge", "-m", "256"]
            .into_iter()
            .chain([device.as_str(), &prefix, "--", "-i", "--nb-cores=1", "--total-num-mbufs=8192"])
            .chain(["--rxd=1024", "--txd=1024", "--forward-mode=icmpecho"])
            // Frames that arrive before it forwards wait instead of being discarded.
            .chain(["--no-flush-rx"])
            .chain(queues.iter().map(String::as_str))
            .map(OsString::from)
            .collect();
    let program = Path::new("/usr/bin/dpdk-testpmd");
    let (reader, input) = pipe()?;
    let process = Process::start_with_input(program, &arguments, &[], Stdio::from(reader))?;
    let mut testpmd = Testpmd { process, input };
    testpmd.tell("start")?;
    link.wait_serving().with_context(|| format!("testpmd:\n{}", testpmd.process.log()))?;
    ensure!(testpmd.process.is_running()?, "testpmd has ended:\n{}", testpmd.process.log());
    ping::wait_answered(GUEST)?;
    Ok(testpmd)
}

fn check_restarts_of(link: &mut Link, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 100)?;

    // Another front-end on the same back-end, which delivers to the first one until it notices that one has left.
    drop(testpmd);
    link.wait_left()?;
    let mut testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 100)?;

    link.restart_backend()?;
    if meeting == Meeting::BackendListens {
        // As a client, virtio-user does not reconnect.
        drop(testpmd);
        testpmd = start(link, meeting, queue_pairs)?;
    }
    link.wait_serving()?;
    ping::check(GUEST, 100)?;
    ensure!(testpmd.process.is_running()?, "testpmd has ended:\n{}", testpmd.process.log());
    link.check_healthy()
}

/// Hands the session over again and again under floods of pings: testpmd notices nothing. Then testpmd resets its
/// device and closes it, and another testpmd connects.
fn check_hand_overs_of(link: &mut Link, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 5)?;
    let before = (process::sockets_of(testpmd.process.pid())?, testpmd.process.log());
    let floods = [(); 2].map(|()| ping::Endless::start(GUEST));
    for hop in 0..HAND_OVERS {
        floods.iter().try_for_each(ping::Endless::wait_answered)?;
        link.hand_over().with_context(|| format!("hand-over {hop}"))?;
    }
    for flood in floods {
        flood.wait_answered()?;
        let (sent, lost) = flood.end()?;
        ensure!(lost.is_empty(), "of {sent} pings {} were lost", lost.len());
    }
    let after = (process::sockets_of(testpmd.process.pid())?, testpmd.process.log());
    ensure!(after == before, "sockets and log of testpmd changed from {before:?} to {after:?}");

    // The change of features makes testpmd reset the device.
    let features = link.status()?.features;
    for command in ["stop", "port stop 0", "port config 0 rx_offload tcp_cksum on", "port start 0", "start"] {
        testpmd.tell(command)?;
    }
    link.wait_status("the device was reset", |status| status.features != features)?;
    link.wait_serving()?;
    ping::wait_answered(GUEST)?;
    ping::check(GUEST, 100)?;
    link.hand_over()?;
    ping::check(GUEST, 100)?;

    for command in ["stop", "port stop 0", "port close 0"] {
        testpmd.tell(command)?;
    }
    link.wait_left()?;
    drop(testpmd);
    let _testpmd = start(link, meeting, queue_pairs)?;
    ping::check(GUEST, 100)?;
    link.check_healthy()
}

fn check_restarts(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, meeting, queue_pairs)?;
    check_restarts_of(&mut link, meeting, queue_pairs).with_context(|| link.evidence())
}

fn check_hand_overs(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, meeting, queue_pairs)?;
    check_hand_overs_of(&mut link, meeting, queue_pairs).with_context(|| link.evidence())
}

#[test]
fn one_pair_is_handed_over_with_listening_back_end() -> Result<()> {
    check_hand_overs(Datapath::Userspace, Meeting::BackendListens, 1)
}

fn two_pairs_are_handed_over_with_client_back_end(datapath: Datapath) -> Result<()> {
    check_hand_overs(datapath, Meeting::FrontendListens, 2)
}

#[test]
fn one_pair_survives_restarts_with_listening_back_end() -> Result<()> {
    check_restarts(Datapath::Userspace, Meeting::BackendListens, 1)
}

#[test]
fn one_pair_survives_restarts_with_client_back_end() -> Result<()> {
    check_restarts(Datapath::Userspace, Meeting::FrontendListens, 1)
}

#[test]
fn two_pairs_survive_restarts_with_listening_back_end() -> Result<()> {
    check_restarts(Datapath::Userspace, Meeting::BackendListens, 2)
}

fn two_pairs_survive_restarts_with_client_back_end(datapath: Datapath) -> Result<()> {
    check_restarts(datapath, Meeting::FrontendListens, 2)
}
