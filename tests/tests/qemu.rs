//! QEMU as the front-end of a Linux guest: traffic, restarts of either side, and live hand-overs.

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::link::{GUEST, Link, Meeting};
use baton_tests::{on_both_datapaths, ping, switching};

on_both_datapaths! {
    one_pair_survives_restarts_with_listening_back_end,
    four_pairs_survive_restarts_with_client_back_end,
}

/// How often the session is handed over.
const HAND_OVERS: usize = 20;

/// Checks traffic, then again after the back-end is killed and replaced under the running guest, and again with a new
/// guest after QEMU is killed.
fn check_restarts(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, meeting, queue_pairs)?;
    check_restarts_of(&mut link, queue_pairs).with_context(|| link.evidence())
}

fn check_restarts_of(link: &mut Link, queue_pairs: u16) -> Result<()> {
    let accelerator = Accelerator::with(link.datapath());
    let mut guest = link.boot_qemu(accelerator, "first")?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (16 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_flows(&mut guest, 2000, 8, 2000)?;
    link.check_counters(&mut guest)?;

    link.restart_backend()?;
    link.wait_serving()?;
    // The guest's kernel drops what it sends until it notices, up to a second later, that its link is up again.
    ping::wait_answered(GUEST)?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (4 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_killed_under_load(&mut guest)?;

    // Kills QEMU.
    drop(guest);
    let mut guest = link.boot_qemu(accelerator, "second")?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (4 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_healthy()?;
    ensure!(guest.power_off()?.success());
    Ok(())
}

fn one_pair_survives_restarts_with_listening_back_end(datapath: Datapath) -> Result<()> {
    check_restarts(datapath, Meeting::BackendListens, 1)
}

#[test]
fn one_pair_survives_restarts_with_client_back_end() -> Result<()> {
    check_restarts(Datapath::Userspace, Meeting::FrontendListens, 1)
}

#[test]
fn four_pairs_survive_restarts_with_listening_back_end() -> Result<()> {
    check_restarts(Datapath::Userspace, Meeting::BackendListens, 4)
}

fn four_pairs_survive_restarts_with_client_back_end(datapath: Datapath) -> Result<()> {
    check_restarts(datapath, Meeting::FrontendListens, 4)
}

/// Hands the session over again and again under traffic: QEMU and the guest notice nothing. Then rebinds the driver and
/// reboots the guest.
fn check_hand_overs(meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(Datapath::Userspace, meeting, queue_pairs)?;
    let body = |link: &mut Link| {
        let mut guest = link.boot_qemu(Accelerator::Tcg, "guest")?;
        link.check_hand_overs(&mut guest, Accelerator::Tcg, HAND_OVERS)?;
        link.check_rebound(&mut guest)?;
        guest.type_line("reboot -f")?;
        guest.wait_for_shell()?;
        link.bring_up(&mut guest)?;
        switching::check_all_pairs(link, &mut guest)?;
        link.check_healthy()
    };
    body(&mut link).with_context(|| link.evidence())
}

#[test]
fn one_pair_is_handed_over_with_listening_back_end() -> Result<()> {
    check_hand_overs(Meeting::BackendListens, 1)
}

#[test]
fn four_pairs_are_handed_over_with_client_back_end() -> Result<()> {
    check_hand_overs(Meeting::FrontendListens, 4)
}

// The test of baton-vmm covers the kernel's datapath: in the lab each run takes minutes.
#[test]
fn device_survives_being_switched_off_and_on_under_traffic() -> Result<()> {
    let mut link = Link::new(Datapath::Userspace, Meeting::BackendListens, 4)?;
    let result = switching::check(&mut link, |link| link.boot_qemu(Accelerator::Tcg, "guest"));
    result.with_context(|| link.evidence())
}
