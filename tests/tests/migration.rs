//! QEMU migrates a guest to another QEMU, back-end and TAP under traffic, and copies its memory.

use anyhow::{Context, Result};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::migration::{Kind, Load, Mover};
use baton_tests::on_both_datapaths;

on_both_datapaths! {
    guest_moves_ten_times_under_traffic,
    dirty_log_misses_no_page,
}

/// Moves a guest `count` times under bulk traffic and numbered datagrams both ways. At each move, before the guest runs
/// on, the memories of source and target must be equal, page by page. Checks the traffic at the end.
fn moves(kind: Kind, count: usize) -> Result<()> {
    let mut mover = Mover::new(kind)?;
    moves_under_traffic(&mut mover, kind, count).with_context(|| mover.evidence())?;
    mover.end()
}

fn moves_under_traffic(mover: &mut Mover, kind: Kind, count: usize) -> Result<()> {
    let load = Load::start(kind);
    let mut switches = Vec::new();
    for number in 1..=count {
        let switch = mover.go(|| load.wait_flowing()).with_context(|| format!("move {number}"))?;
        eprintln!("move {number}: {switch:?}");
        switches.push(switch);
    }
    load.wait_flowing().context("after the last move")?;
    eprintln!("{:?}", load.end(&switches)?);
    Ok(())
}

fn guest_moves_ten_times_under_traffic(datapath: Datapath) -> Result<()> {
    moves(Kind { datapath, accelerator: Accelerator::with(datapath), queue_pairs: 1 }, 10)
}

#[test]
fn guest_moves_with_four_pairs() -> Result<()> {
    moves(Kind { datapath: Datapath::Userspace, accelerator: Accelerator::Tcg, queue_pairs: 4 }, 3)
}

/// The guest's driver touches no buffer here, so a page that a frame changes is copied only if the back-end logs it.
fn dirty_log_misses_no_page(datapath: Datapath) -> Result<()> {
    let mut mover = Mover::new(Kind { datapath, accelerator: Accelerator::with(datapath), queue_pairs: 1 })?;
    mover.check_log().with_context(|| mover.evidence())
}
