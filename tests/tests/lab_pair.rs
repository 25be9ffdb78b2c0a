//! The pair: a Linux guest on baton-vmm, its network through baton-backend and a TAP.

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::lab;
use baton_tests::link::{Link, Meeting};
use baton_tests::{on_both_datapaths, switching};

on_both_datapaths! {
    one_pair_carries_everything,
    four_pairs_carry_everything,
    goes_on_when_either_side_was_killed,
}

/// How often a session of one pair is handed over. More are handed over while a guest moves, with fewer processors.
const HAND_OVERS: usize = 20;

/// Pings, bulk TCP, frames of every size, numbered datagrams; every pair used, frames larger than the MTU both ways. Then the same while
/// the session is handed over, and the driver begins anew.
fn carries(datapath: Datapath, queue_pairs: u16) -> Result<()> {
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
        ensure!(guest.power_off()?.success(), "a guest that was switched off is no failure");
        Ok(())
    };
    let result = body();
    result.with_context(|| link.evidence())
}

fn one_pair_carries_everything(datapath: Datapath) -> Result<()> {
    lab::run(|| carries(datapath, 1))
}

fn four_pairs_carry_everything(datapath: Datapath) -> Result<()> {
    lab::run(|| carries(datapath, 4))
}

fn goes_on_when_either_side_was_killed(datapath: Datapath) -> Result<()> {
    lab::run(|| {
        let mut link = Link::new(datapath, Meeting::BackendListens, 4)?;
        let mut body = || {
            let mut guest = link.boot_vmm("first")?;
            link.check_pings(&mut guest, 20)?;
            // While nothing is under way, and then while much is.
            link.restart_backend()?;
            link.wait_serving()?;
            link.check_pings(&mut guest, 20)?;
            link.check_bulk(&mut guest, 1 << 20, 4)?;
            link.check_killed_under_load(&mut guest)?;
            // Killed, not switched off.
            drop(guest);
            let mut guest = link.boot_vmm("second")?;
            link.check_pings(&mut guest, 20)?;
            link.check_healthy()
        };
        let result = body();
        result.with_context(|| link.evidence())
    })
}

// With the user-space datapath QEMU's test has it, which takes a tenth of the time.
#[test]
fn survives_its_device_switched_off_and_on() -> Result<()> {
    lab::run(|| {
        let mut link = Link::new(Datapath::VhostNet, Meeting::BackendListens, 4)?;
        let result = switching::check(&mut link, |link| link.boot_vmm("guest"));
        result.with_context(|| link.evidence())
    })
}
