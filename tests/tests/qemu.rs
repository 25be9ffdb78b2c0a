//! QEMU as the front-end of a Linux guest: traffic, restarts of either side, and live hand-overs.

use anyhow::{Context, Result, ensure};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::link::{Link, Meeting};
use baton_tests::{on_both_datapaths, switching};

on_both_datapaths! {
    one_pair_listening,
    four_pairs_as_client,
}

/// How often a session is handed over.
const HAND_OVERS: usize = 20;

/// Traffic; the same after the back-end was killed and another one took its place under the running guest; the same
/// for a new guest after QEMU was killed.
fn serves(datapath: Datapath, meeting: Meeting, queue_pairs: u16) -> Result<()> {
    let mut link = Link::new(datapath, meeting, queue_pairs)?;
    serves_on(&mut link, queue_pairs).with_context(|| link.evidence())
}

fn serves_on(link: &mut Link, queue_pairs: u16) -> Result<()> {
    let accelerator = Accelerator::with(link.datapath());
    let mut guest = link.boot_qemu(accelerator, "first")?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (16 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_flows(&mut guest, 2000, 8, 2000)?;
    link.check_counters(&mut guest)?;

    link.restart_backend()?;
    link.wait_serving()?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (4 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_killed_under_load(&mut guest)?;

    // Killed, not switched off.
    drop(guest);
    let mut guest = link.boot_qemu(accelerator, "second")?;
    link.check_pings(&mut guest, 50)?;
    link.check_bulk(&mut guest, (4 << 20) / u64::from(queue_pairs), queue_pairs)?;
    link.check_healthy()?;
    ensure!(guest.power_off()?.success());
    Ok(())
}

fn one_pair_listening(datapath: Datapath) -> Result<()> {
    serves(datapath, Meeting::BackendListens, 1)
}

#[test]
fn one_pair_as_client() -> Result<()> {
    serves(Datapath::Userspace, Meeting::FrontendListens, 1)
}

#[test]
fn four_pairs_listening() -> Result<()> {
    serves(Datapath::Userspace, Meeting::BackendListens, 4)
}

fn four_pairs_as_client(datapath: Datapath) -> Result<()> {
    serves(datapath, Meeting::FrontendListens, 4)
}

/// Its session goes from back-end to back-end under traffic. QEMU and the guest notice nothing, and then the driver begins
/// anew, and the guest.
fn is_handed_over(meeting: Meeting, queue_pairs: u16) -> Result<()> {
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
fn one_pair_is_handed_over_listening() -> Result<()> {
    is_handed_over(Meeting::BackendListens, 1)
}

#[test]
fn four_pairs_are_handed_over_as_client() -> Result<()> {
    is_handed_over(Meeting::FrontendListens, 4)
}

// With the kernel's datapath baton-vmm's test has it: in the lab each takes minutes.
#[test]
fn survives_its_device_switched_off_and_on() -> Result<()> {
    let mut link = Link::new(Datapath::Userspace, Meeting::BackendListens, 4)?;
    let result = switching::check(&mut link, |link| link.boot_qemu(Accelerator::Tcg, "guest"));
    result.with_context(|| link.evidence())
}
