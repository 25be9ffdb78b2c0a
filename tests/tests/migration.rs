//! QEMU moves a guest to another QEMU, back-end and TAP, with its memory copied, under traffic.

use anyhow::{Context, Result};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Accelerator;
use baton_tests::migration::{Kind, Load, Mover};
use baton_tests::on_both_datapaths;

on_both_datapaths! {
    ten_moves,
    the_log_misses_no_page,
}

/// Moves a guest so many times under bulk traffic and numbered datagrams both ways. At each move, before the guest
/// runs on, both memories must be the same, page by page; after all, what has become of the traffic is judged.
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

fn ten_moves(datapath: Datapath) -> Result<()> {
    moves(Kind { datapath, accelerator: Accelerator::with(datapath), queue_pairs: 1 }, 10)
}

#[test]
fn moves_of_four_pairs() -> Result<()> {
    moves(Kind { datapath: Datapath::Userspace, accelerator: Accelerator::Tcg, queue_pairs: 4 }, 3)
}

/// The guest's driver touches no buffer here, so what frames change is copied only if the back-end has noted it.
fn the_log_misses_no_page(datapath: Datapath) -> Result<()> {
    let mut mover = Mover::new(Kind { datapath, accelerator: Accelerator::with(datapath), queue_pairs: 1 })?;
    mover.check_log().with_context(|| mover.evidence())
}
