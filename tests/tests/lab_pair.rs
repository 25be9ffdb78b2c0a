//! A Linux guest on baton-vmm, with its network through baton-backend and a TAP.

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::lab;
use baton_tests::link::{Link, Meeting};
use baton_tests::{on_both_datapaths, switching};

on_both_datapaths! {
    one_pair_carries_everything,
    four_pairs_carry_everything,
    network_recovers_when_either_side_is_killed,
}

/// How often the session of one queue pair is handed over.
const HAND_OVERS: usize = 20;

/// Checks pings, frames of every size, numbered datagrams and bulk TCP: every queue pair is used, and frames larger
/// than the MTU go both ways. Then hands over the session under load (one queue pair only) and rebinds the driver.
fn check_carries_everything(datapath: Datapath, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, Meeting::BackendListens, queue_pairs)?;
    let mut body = || {
        let mut guest = link.boot_vmm("guest")?;
        link.check_pings(&mut guest, 100)?;
        link.check_sizes(&mut guest)?;
        link.check_flows(&mut guest, 10_000, 16, 2_000)?;
        link.check_bulk(&mut guest, (64 << 20) / u64::from(queue_pairs), queue_pairs)?;
        link.check_counters(&mut guest)?;
        if queue_pairs == 1 {
            link.check_hand_overs(&mut guest, Accelerator::Kvm, HAND_OVERS)?;
        }
        link.check_rebound(&mut guest)?;
        link.check_healthy()?;
        ensure!(guest.power_off()?.success(), "the VMM fails when the guest powers off");
        Ok(())
    };
    let result = body();
    result.with_context(|| link.evidence())
}

fn one_pair_carries_everything(datapath: Datapath) -> Result<()> {
    lab::run(|| check_carries_everything(datapath, 1))
}

fn four_pairs_carry_everything(datapath: Datapath) -> Result<()> {
    lab::run(|| check_carries_everything(datapath, 4))
}

fn network_recovers_when_either_side_is_killed(datapath: Datapath) -> Result<()> {
    lab::run(|| {
        let mut link = Link::new(datapath, Meeting::BackendListens, 4)?;
        let mut body = || {
            let mut guest = link.boot_vmm("first")?;
            link.check_pings(&mut guest, 20)?;
            // First while the link is idle, then under load.
            link.restart_backend()?;
            link.wait_serving()?;
            link.check_pings(&mut guest, 20)?;
            link.check_bulk(&mut guest, 1 << 20, 4)?;
            link.check_killed_under_load(&mut guest)?;
            // Kills the VMM.
            drop(guest);
            let mut guest = link.boot_vmm("second")?;
            link.check_pings(&mut guest, 20)?;
            link.check_healthy()
        };
        let result = body();
        result.with_context(|| link.evidence())
    })
}

// The QEMU test covers the user-space datapath in a tenth of the time.
#[test]
fn device_survives_being_switched_off_and_on_under_traffic() -> Result<()> {
    lab::run(|| {
        let mut link = Link::new(Datapath::VhostNet, Meeting::BackendListens, 4)?;
        let result = switching::check(&mut link, |link| link.boot_vmm("guest"));
        result.with_context(|| link.evidence())
    })
}
