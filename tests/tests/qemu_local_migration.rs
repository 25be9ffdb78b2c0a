//! QEMU migrates a guest to another QEMU on the same host, whose back-end takes over the TAP. Guest memory is in a
//! shared file, and the operator arms the hand-over. Nothing in the network changes, and nothing is lost.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use baton_protocol::control::{BackendState, HandoverState};
use baton_tests::backend::{Backend, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::guest::{Accelerator, Guest, Qemu};
use baton_tests::link::{self, GUEST, HOST, MAC, Meeting, ip};
use baton_tests::migration::{Kind, Load};
use baton_tests::netns::{self, Netns};
use baton_tests::on_both_datapaths;
use baton_tests::ping;
use baton_tests::process::PATIENCE;
use baton_tests::qmp::Qmp;
use serde_json::json;

on_both_datapaths! {
    guest_keeps_its_tap_and_loses_nothing,
    network_survives_a_migration_that_fails_after_the_guest_stops,
    network_survives_stop_reset_and_cancelled_migration,
}

const PAIRS: u16 = 2;
const MEMORY: &str = "128M";

/// A guest with its QEMU and its back-end.
struct Place {
    guest: Guest,
    monitor: Qmp,
    backend: Backend,
}

impl Place {
    /// Starts a QEMU with this back-end.
    fn new(
        datapath: Datapath,
        mut backend: Backend,
        memory: &Path,
        name: &str,
        how: impl FnOnce(Qemu) -> Qemu,
    ) -> Result<Self> {
        backend.status()?;
        let socket = backend.socket.to_str().context("a path that is not UTF-8")?;
        let qemu = Qemu::in_file(Accelerator::with(datapath), 2, MEMORY, memory)?;
        let qemu = how(qemu.vhost_user("net0", socket, Meeting::BackendListens, MAC, PAIRS));
        let (guest, mut monitor) = qemu.start_with_monitor(name)?;
        let enabled = ["events", "x-ignore-shared", "pause-before-switchover"]
            .map(|name| json!({ "capability": name, "state": true }));
        monitor.execute("migrate-set-capabilities", &json!({ "capabilities": enabled }))?;
        Ok(Self { guest, monitor, backend })
    }

    /// Starts a QEMU that waits for the guest, and a back-end that waits for the TAP.
    fn waiting(datapath: Datapath, memory: &Path, name: &str) -> Result<Self> {
        let backend = Backend::waiting(datapath, &["--log-level=debug"])?;
        Self::new(datapath, backend, memory, name, Qemu::incoming)
    }

    fn wait_migration(&mut self, wanted: &str) -> Result<()> {
        loop {
            let event = self.monitor.wait_event("MIGRATION").with_context(|| self.guest.log())?;
            match event.data["status"].as_str() {
                Some(status) if status == wanted => return Ok(()),
                Some("failed") => bail!("the migration failed: {}", self.guest.log()),
                _ => {}
            }
        }
    }

    /// Starts the migration and waits until the guest is stopped.
    fn begin(&mut self, target: &mut Self) -> Result<()> {
        let channel = target.backend.directory().join("migration");
        let channel = json!({ "uri": format!("unix:{}", channel.display()) });
        target.monitor.execute("migrate-incoming", &channel)?;
        self.monitor.execute("migrate", &channel)?;
        self.wait_migration("pre-switchover")
    }

    /// Completes the migration of the stopped guest.
    fn finish(&mut self, target: &mut Self) -> Result<()> {
        self.go_on()?;
        self.wait_migration("completed")?;
        target.wait_migration("completed")?;
        target.monitor.execute("cont", &json!({}))?;
        self.backend.wait_handover(HandoverState::HandedOver)?;
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        self.monitor.execute("migrate-continue", &json!({ "state": "pre-switchover" }))?;
        Ok(())
    }
}

/// Boots a guest whose network works. Its memory is in the file `memory` of the directory.
fn booted(datapath: Datapath) -> Result<(Netns, tempfile::TempDir, Place)> {
    let netns = Netns::enter()?;
    netns.create_persistent_tap(TAP, true)?;
    ip(&["addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
    ip(&["link", "set", TAP, "up"])?;
    ip(&["neigh", "add", &GUEST.to_string(), "lladdr", MAC, "dev", TAP])?;
    let directory = tempfile::tempdir()?;
    let arguments =
        [format!("--tap={TAP}"), format!("--queue-pairs={PAIRS}"), "--log-level=debug".to_owned()];
    let backend = Backend::listening(datapath, &arguments.each_ref().map(String::as_str), &[])?;
    let memory = directory.path().join("memory");
    let mut place = Place::new(datapath, backend, &memory, "source", Qemu::rebooting)?;
    place.guest.wait_for_shell()?;
    link::bring_up(&mut place.guest, PAIRS)?;
    ping::check(GUEST, 20)?;
    Ok((netns, directory, place))
}

/// Waits until the back-end is in this state.
fn wait_state(backend: &mut Backend, wanted: BackendState) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = backend.status()?;
        if status.state == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the back-end stays {status:?}");
    }
}

fn guest_keeps_its_tap_and_loses_nothing(datapath: Datapath) -> Result<()> {
    let (_netns, directory, mut here) = booted(datapath)?;
    let memory = directory.path().join("memory");
    let accelerator = Accelerator::with(datapath);
    let load = Load::start(Kind { datapath, accelerator, queue_pairs: PAIRS });
    for hop in 1..=3 {
        let mut there = Place::waiting(datapath, &memory, &format!("target-{hop}"))?;
        // First the session moves to another back-end, then the guest to another QEMU.
        load.wait_flowing()?;
        let successor = Backend::waiting_for_session(datapath, &["--log-level=debug"])?;
        here.backend.become_busy_target(successor)?;
        here.backend.arm(&there.backend.incoming())?;
        load.wait_flowing()?;
        let moved = std::thread::scope(|scope| -> Result<()> {
            let pings = scope.spawn(|| ping::check(GUEST, 400));
            here.begin(&mut there)?;
            there.backend.wait_handover(HandoverState::Adopted)?;
            ensure!(there.backend.status()?.tap.is_empty(), "the TAP was taken before the guest ran");
            here.finish(&mut there)?;
            pings.join().map_err(|_| anyhow::anyhow!("the pings panicked"))?
        });
        moved.with_context(|| {
            format!(
                "hop {hop}; source:\n{}\ntarget:\n{}",
                here.backend.process.log(),
                there.backend.process.log()
            )
        })?;
        here.monitor.execute("quit", &json!({}))?;
        ensure!(here.guest.wait()?.success(), "the source QEMU failed");
        let status = here.backend.process.wait()?;
        ensure!(status.code() == Some(0), "the source ended with {status}");
        here = there;
        here.guest.check(&format!("ping -c 3 -i 0.2 {HOST}"))?;
        ping::check(GUEST, 20)?;
        ensure!(here.backend.status()?.queue_pairs == PAIRS);
    }
    load.wait_flowing()?;
    let balance = load.end(&[])?;
    ensure!(balance.bytes > 0 && balance.datagrams.iter().all(|count| *count > 0), "{balance:?}");
    let dropped = netns::counters(TAP)?.tx_dropped;
    ensure!(dropped == 0, "the TAP dropped {dropped} frames");
    let messages = here.guest.check("dmesg | grep -c 'NETDEV WATCHDOG' || true")?;
    ensure!(messages.trim() == "0", "NETDEV WATCHDOG messages in the guest: {messages}");
    here.backend.check_healthy()
}

fn network_survives_a_migration_that_fails_after_the_guest_stops(datapath: Datapath) -> Result<()> {
    let (_netns, directory, mut here) = booted(datapath)?;
    let memory = directory.path().join("memory");
    let load = Load::start(Kind { datapath, accelerator: Accelerator::with(datapath), queue_pairs: PAIRS });
    let mut there = Place::waiting(datapath, &memory, "target")?;
    here.backend.arm(&there.backend.incoming())?;
    load.wait_flowing()?;
    let pings = ping::Endless::start(GUEST);
    here.begin(&mut there)?;
    there.backend.wait_handover(HandoverState::Adopted)?;
    // Ends the target's QEMU, but not its back-end.
    let Place { guest, monitor, backend } = there;
    drop((guest, monitor));
    here.go_on()?;
    here.wait_migration("failed")?;
    wait_state(&mut here.backend, BackendState::Serving)?;
    here.guest.check(&format!("ping -c 3 -i 0.2 {HOST}"))?;
    load.wait_flowing()?;

    // The source is still armed, and the target's back-end waits for another QEMU.
    let mut there = Place::new(datapath, backend, &memory, "second-target", Qemu::incoming)?;
    here.backend.wait_handover(HandoverState::Armed)?;
    here.begin(&mut there)?;
    here.finish(&mut there)?;
    there.guest.check(&format!("ping -c 3 -i 0.2 {HOST}"))?;
    load.wait_flowing()?;
    load.end(&[])?;
    let (_, lost) = pings.end()?;
    ensure!(lost.is_empty(), "{lost:?} were lost");
    there.backend.check_healthy()
}

fn network_survives_stop_reset_and_cancelled_migration(datapath: Datapath) -> Result<()> {
    let (_netns, directory, mut here) = booted(datapath)?;
    let mut there = Place::waiting(datapath, &directory.path().join("memory"), "target")?;
    here.backend.arm(&there.backend.incoming())?;
    for _ in 0..2 {
        here.monitor.execute("stop", &json!({}))?;
        wait_state(&mut here.backend, BackendState::HandingOver)?;
        here.monitor.execute("cont", &json!({}))?;
        wait_state(&mut here.backend, BackendState::Serving)?;
        ping::check(GUEST, 20)?;
    }
    here.monitor.execute("system_reset", &json!({}))?;
    here.guest.wait_for_shell()?;
    link::bring_up(&mut here.guest, PAIRS)?;
    ping::check(GUEST, 20)?;
    // Cancels the migration after the guest has stopped.
    here.begin(&mut there)?;
    there.backend.wait_handover(HandoverState::Adopted)?;
    here.monitor.execute("migrate_cancel", &json!({}))?;
    here.wait_migration("cancelled")?;
    wait_state(&mut here.backend, BackendState::Serving)?;
    ping::check(GUEST, 20)?;
    here.backend.wait_handover(HandoverState::Armed)?;
    ensure!(there.backend.status()?.tap.is_empty());
    here.backend.check_healthy()
}
