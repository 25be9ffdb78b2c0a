//! A Linux guest moves from one baton-vmm to another on the same host.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{MigrationReport, Request, VmmState};
use baton_tests::backend::Backend;
use baton_tests::datapath::Datapath;
use baton_tests::fake_target::{FakeTarget, Point, Then};
use baton_tests::guest::{Accelerator, Vmm};
use baton_tests::link::{GUEST, HOST, MAC, ip};
use baton_tests::local_migration::{Kind, Stay, Traveller, Wanted, Way};
use baton_tests::migration::{self, Load};
use baton_tests::netns::Netns;
use baton_tests::process::Process;
use baton_tests::{lab, on_both_datapaths, ping, switching};
use nix::sys::signal::Signal;

on_both_datapaths! {
    guest_loses_nothing_in_ten_moves_and_hand_overs,
    guest_moves_to_new_taps,
    guest_moves_with_its_tap,
}

/// By how much a lost ping may precede or follow a move: timing in the lab is imprecise.
const SLACK: Duration = Duration::from_secs(10);
/// By how much the guest's clock may differ from the host's.
const DRIFT: Duration = Duration::from_secs(2);

/// A reading of the guest's clock, between two readings of the host's.
struct Look {
    before: Instant,
    uptime: Duration,
    after: Instant,
}

fn look_at_clock(stay: &mut Stay) -> Result<Look> {
    let before = Instant::now();
    Ok(Look { before, uptime: stay.uptime()?, after: Instant::now() })
}

/// How often the back-end is replaced before each move with the TAP: more than 20 times in three moves.
const HAND_OVERS: usize = 7;

/// Moves a guest `times` times under pings. A ping may be lost only during a move to a new TAP.
fn moves(kind: Kind, way: Way, times: usize) -> Result<()> {
    let mut traveller = Traveller::new(kind)?;
    let body = |traveller: &mut Traveller| {
        traveller.check_pings(20)?;
        traveller.stay.guest.check("dmesg -c >/dev/null")?;
        let pings = ping::Endless::start(GUEST);
        let mut moves = Vec::new();
        for _ in 0..times {
            moves.push(match way {
                Way::NewTap => traveller.move_with_new_tap()?,
                Way::SameTap => {
                    for _ in 0..HAND_OVERS {
                        pings.wait_answered()?;
                        traveller.hand_over()?;
                    }
                    traveller.move_with_tap()?
                }
            });
            traveller.check_pings(20)?;
        }
        let (_, lost) = pings.end()?;
        let during = |time| moves.iter().any(|one| one.before <= time + SLACK && time <= one.after + SLACK);
        let expected = match way {
            Way::NewTap => lost.iter().all(|time| during(*time)),
            Way::SameTap => lost.is_empty(),
        };
        ensure!(expected, "{lost:?} were lost, moves were {moves:?}");
        traveller.check_dmesg()?;
        switching::rebind_driver(&mut traveller.stay.guest)?;
        traveller.check_pings(20)
    };
    let result = body(&mut traveller);
    result.with_context(|| traveller.evidence())?;
    traveller.end()
}

fn guest_moves_to_new_taps(datapath: Datapath) -> Result<()> {
    lab::run(|| moves(Kind { datapath, queue_pairs: 4 }, Way::NewTap, 3))
}

fn guest_moves_with_its_tap(datapath: Datapath) -> Result<()> {
    lab::run(|| moves(Kind { datapath, queue_pairs: 4 }, Way::SameTap, 3))
}

/// Moves the guest, and replaces its back-end between moves, under TCP streams and numbered datagrams both ways on
/// every queue pair. Checks the load, the guest's clock and the TAP's counters.
fn guest_loses_nothing_in_ten_moves_and_hand_overs(datapath: Datapath) -> Result<()> {
    lab::run(|| {
        let queue_pairs = 4;
        let mut traveller = Traveller::new(Kind { datapath, queue_pairs })?;
        let body = |traveller: &mut Traveller| {
            traveller.stay.guest.check("dmesg -c >/dev/null")?;
            traveller.stay.guest.check("traffic clock --until=/root/stop >/root/clock 2>&1 &")?;
            let load = Load::start(migration::Kind { datapath, accelerator: Accelerator::Kvm, queue_pairs });
            let began = look_at_clock(&mut traveller.stay)?;
            for _ in 0..10 {
                load.wait_flowing()?;
                traveller.move_with_tap()?;
                load.wait_moving()?;
                traveller.hand_over()?;
            }
            load.wait_flowing()?;
            // No datagram may be lost: there is no switch that could lose it.
            let balance = load.end(&[])?;
            ensure!(balance.bytes > 0 && balance.datagrams.iter().all(|count| *count > 0), "{balance:?}");
            ensure!(traveller.tap_counters()?.tx_dropped == 0, "{:?}", traveller.tap_counters()?);

            let ended = look_at_clock(&mut traveller.stay)?;
            // Reading the clocks takes time, so the elapsed time lies between these two.
            let (least, most) = (ended.before - began.after, ended.after - began.before);
            let guest = ended.uptime - began.uptime;
            ensure!(
                least < guest + DRIFT && guest < most + DRIFT,
                "the guest's clock advanced by {guest:?} in {least:?} to {most:?}"
            );
            let clock = traveller.stay.guest.check("touch /root/stop; wait; cat /root/clock")?;
            let clock: serde_json::Value =
                serde_json::from_str(clock.trim()).with_context(|| clock.clone())?;
            ensure!(clock["back"] == 0 && clock["looks"].as_u64() > Some(100), "{clock}");
            traveller.check_dmesg()
        };
        let result = body(&mut traveller);
        result.with_context(|| traveller.evidence())?;
        traveller.end()
    })
}

/// The phase and the reason of a rolled-back migration, as one line.
fn rolled_back(report: &MigrationReport) -> Result<String> {
    match report {
        MigrationReport::RolledBack { phase, reason } => Ok(format!("{phase}: {reason}")),
        other => bail!("not rolled back: {other:?}"),
    }
}

/// A guest command that sets EFER of the first processor. Linux sets 0xd01; bit 12 (SVME) enables SVM.
fn set_efer(value: u16) -> String {
    let [low, high] = value.to_le_bytes();
    // `dd` counts in blocks of 8 bytes.
    let register = 0xc000_0080_u32 / 8;
    let bytes = format!(r"\x{low:02x}\x{high:02x}\x00\x00\x00\x00\x00\x00");
    format!("printf '{bytes}' | dd of=/dev/cpu/0/msr bs=8 seek={register} 2>&1")
}

#[test]
fn guest_stays_when_migration_is_refused_or_fails() -> Result<()> {
    lab::run(|| {
        let mut traveller = Traveller::new(Kind { datapath: Datapath::Userspace, queue_pairs: 1 })?;
        let body = |traveller: &mut Traveller| {
            let pings = ping::Endless::start(GUEST);
            // Another number of processors and another setting of the device: the target names both, nothing changes.
            let mut other = traveller.place(Way::SameTap, |wanted| Wanted {
                cpus: 1,
                local_migration: false,
                ..wanted
            })?;
            let report = traveller.stay.ask_migrate(&other, Way::SameTap)?;
            let MigrationReport::Refused { reasons } = &report else { bail!("{report:?}") };
            let names: Vec<_> = reasons.iter().map(|reason| reason.name.as_str()).collect();
            ensure!(names == ["cpus", "local-migration"], "{report:?}");
            let text = rolled_back(&traveller.stay.migrate(&other, Way::SameTap)?)?;
            ensure!(text.starts_with("hello: the target refuses: cpus: "), "{text}");
            ensure!(traveller.stay.status()?.state == VmmState::Running);
            // The target waits for another source. It has no guest to pause or resume.
            ensure!(other.status()?.state == VmmState::Incoming);
            for request in [Request::Pause, Request::Resume] {
                let refused = other.ask(&request).err().context("not refused")?.to_string();
                ensure!(refused.contains("no VM has arrived yet"), "{refused}");
            }
            drop(other);

            // No target listens there.
            let mut target = traveller.place(Way::SameTap, |wanted| wanted)?;
            let nowhere = target.incoming().with_extension("none");
            let request = Request::Migrate { path: nowhere, local: true, dry_run: false };
            let report = serde_json::from_value(traveller.stay.ask(&request)?)?;
            ensure!(rolled_back(&report)?.contains("--incoming"), "{report:?}");

            // A back-end that has a TAP refuses another; the guest runs on.
            let mut owner = traveller.place(Way::NewTap, |wanted| wanted)?;
            let text = rolled_back(&traveller.stay.migrate(&owner, Way::SameTap)?)?;
            ensure!(text.starts_with("prepare: the target refuses: tap: "), "{text}");
            ensure!(text.contains("start it with --incoming-fds"), "{text}");
            ensure!(traveller.stay.status()?.state == VmmState::Running);
            traveller.check_pings(5)?;
            // It waits on, and would take the guest without the TAP.
            let report = traveller.stay.ask_migrate(&owner, Way::NewTap)?;
            ensure!(report == MigrationReport::Possible, "{report:?}\n{}", owner.guest.log());
            ensure!(owner.status()?.state == VmmState::Incoming);
            drop(owner);

            // A guest that can run nested guests.
            traveller.stay.guest.check(&set_efer(0x1d01))?;
            let report = traveller.stay.ask_migrate(&target, Way::SameTap)?;
            let MigrationReport::Refused { reasons } = &report else { bail!("{report:?}") };
            ensure!(reasons.len() == 1 && reasons[0].name == "nested", "{report:?}");
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text.starts_with("hello: the target refuses: nested: "), "{text}");
            traveller.stay.guest.check(&set_efer(0xd01))?;

            // A target VMM that hangs.
            target.signal_vmm(Signal::SIGSTOP)?;
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text == "hello: the target does not answer", "{text}");
            target.signal_vmm(Signal::SIGCONT)?;

            // A target whose back-end is gone.
            target.backend.process.signal(Signal::SIGKILL)?;
            target.backend.process.wait()?;
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text.contains("back-end: "), "{text}");
            drop(target);

            // After all these refusals the guest can still move.
            let target = traveller.place(Way::SameTap, |wanted| wanted)?;
            let report = traveller.stay.ask_migrate(&target, Way::SameTap)?;
            ensure!(report == MigrationReport::Possible, "{report:?}");
            traveller.stay.ask(&Request::Pause)?;
            traveller.stay.ask(&Request::Resume)?;
            let report = traveller.stay.migrate(&target, Way::SameTap)?;
            ensure!(report.is_success(), "{report:?}");
            for request in [
                Request::Resume,
                Request::Pause,
                Request::Migrate { path: target.incoming(), local: true, dry_run: false },
            ] {
                let refused = traveller.stay.ask(&request).err().context("not refused")?.to_string();
                ensure!(refused.contains("the target's"), "{refused}");
            }
            traveller.settle(target)?;
            traveller.check_pings(20)?;
            let (_, lost) = pings.end()?;
            ensure!(lost.is_empty(), "{lost:?} were lost");
            Ok(())
        };
        let result = body(&mut traveller);
        result.with_context(|| traveller.evidence())?;
        traveller.end()
    })
}

/// The target fails at each point in each way, with and without the TAP moving: the guest runs on with its network, and
/// the report says in which phase the migration failed and why.
#[test]
fn guest_runs_on_wherever_the_target_fails() -> Result<()> {
    let cells = [
        (Point::Hello, Then::Leave, "hello: the target closed"),
        (Point::Hello, Then::Hang, "hello: the target does not answer"),
        (Point::Hello, Then::Refuse, "hello: the target refuses: busy: "),
        (Point::Hello, Then::Babble, "hello: the target sent READY at the wrong time"),
        (Point::Prepare, Then::Leave, "prepare: the target closed"),
        (Point::Prepare, Then::Refuse, "prepare: the target refuses: busy: "),
        (Point::Prepare, Then::Lie, "prepare: the target sent ACTIVE at the wrong time"),
        (Point::State, Then::Leave, "restore: the target closed"),
        (Point::State, Then::Hang, "restore: the target does not answer"),
        (Point::State, Then::Refuse, "restore: the target refuses: busy: "),
        (Point::State, Then::Lie, "restore: the target sent ACTIVE at the wrong time"),
        (Point::State, Then::Scribble, "commit: unexpected ownership word"),
        (Point::Commit, Then::Leave, "commit: the target closed"),
        (Point::Commit, Then::Hang, "commit: the target does not answer"),
        (Point::Commit, Then::Refuse, "commit: the target refuses: busy: "),
        (Point::Commit, Then::Babble, "commit: the target sent READY at the wrong time"),
        (Point::Commit, Then::Scribble, "commit: unexpected ownership word"),
        (
            Point::Commit,
            Then::Lie,
            "commit: the target claims to have taken over, but the ownership word says otherwise",
        ),
    ];
    lab::run(|| {
        let mut traveller = Traveller::new(Kind { datapath: Datapath::Userspace, queue_pairs: 1 })?;
        let body = |traveller: &mut Traveller| {
            let directory = tempfile::tempdir()?;
            let path = directory.path().join("target");
            let mut fails = |point, then, expected: &str| {
                for local in [true, false] {
                    let target = FakeTarget::start(&path, point, then)?;
                    let request = Request::Migrate { path: path.clone(), local, dry_run: false };
                    let text = rolled_back(&serde_json::from_value(traveller.stay.ask(&request)?)?)?;
                    ensure!(text.starts_with(expected), "{point:?}, {then:?}: {text}");
                    target.end()?;
                    ensure!(traveller.stay.status()?.state == VmmState::Running);
                    ping::check(GUEST, 2)?;
                }
                Ok(())
            };
            let (short, long): (Vec<_>, Vec<_>) = cells.into_iter().partition(|cell| cell.1 != Then::Hang);
            let pings = ping::Endless::start(GUEST);
            for (point, then, expected) in short {
                fails(point, then, expected)?;
            }
            let (_, lost) = pings.end()?;
            ensure!(lost.is_empty(), "{lost:?} were lost");
            // Not under pings: the guest's kernel does not answer all pings that queue up during a hang.
            for (point, then, expected) in long {
                fails(point, then, expected)?;
            }
            traveller.check_pings(20)?;

            // A paused guest stays paused.
            traveller.stay.ask(&Request::Pause)?;
            let target = FakeTarget::start(&path, Point::State, Then::Leave)?;
            let request = Request::Migrate { path: path.clone(), local: true, dry_run: false };
            rolled_back(&serde_json::from_value(traveller.stay.ask(&request)?)?)?;
            target.end()?;
            ensure!(traveller.stay.status()?.state == VmmState::Paused);
            traveller.stay.ask(&Request::Resume)?;
            traveller.check_pings(20)?;

            // Once the target has swapped the word the guest is gone, whatever the target does next.
            let target = FakeTarget::start(&path, Point::Commit, Then::Take)?;
            let report = serde_json::from_value(traveller.stay.ask(&request)?)?;
            ensure!(matches!(report, MigrationReport::Completed { .. }), "{report:?}");
            target.end()?;
            ensure!(traveller.stay.status()?.state == VmmState::Postmigrate);
            traveller.stay.ask(&Request::Resume).err().context("resumed")?;
            Ok(())
        };
        let result = body(&mut traveller);
        result.with_context(|| traveller.evidence())
    })
}

/// A VMM's command line for two devices, of which only the first moves with its TAP.
fn two_devices(vmm: Vmm, backends: &[Backend; 2], control: &Path) -> Vmm {
    let mut vmm = vmm.args([format!("--control-socket={}", control.display()).as_str()]);
    for (backend, (mac, local)) in backends.iter().zip([(MAC, "on"), (MAC2, "off")]) {
        let socket = backend.socket.display();
        vmm = vmm.args(["--net", &format!("socket={socket},mac={mac},local-migration={local}")]);
    }
    vmm
}

const MAC2: &str = "02:ba:70:00:00:03";
const HOST2: &str = "192.168.78.1/24";
const GUEST2: Ipv4Addr = Ipv4Addr::new(192, 168, 78, 2);

#[test]
fn one_device_keeps_its_tap_and_another_does_not() -> Result<()> {
    lab::run(|| {
        let netns = Netns::enter()?;
        for tap in ["tap0", "tap1", "tap2"] {
            netns.create_persistent_tap(tap, false)?;
        }
        // One MAC address, so the guest's neighbour entry stays valid when the IP address moves between the TAPs.
        for tap in ["tap1", "tap2"] {
            ip(&["link", "set", tap, "address", "02:ba:70:00:00:01"])?;
            ip(&["link", "set", tap, "up"])?;
        }
        ip(&["addr", "add", &format!("{HOST}/24"), "dev", "tap0"])?;
        ip(&["link", "set", "tap0", "up"])?;
        ip(&["addr", "add", HOST2, "dev", "tap1"])?;
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let backend = |from: &str| Backend::listening(Datapath::Userspace, &[from], &[]);

        let mut sources = [backend("--tap=tap0")?, backend("--tap=tap1")?];
        sources.iter_mut().try_for_each(|backend| backend.status().map(drop))?;
        let mut source = two_devices(Vmm::new(1, "256M")?, &sources, &path("source.ctl")).start("source")?;
        source.wait_for_shell()?;
        source.check(&format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"))?;
        source.check(&format!("ip addr add {GUEST2}/24 dev eth1; ip link set eth1 up"))?;
        ping::check(GUEST, 5)?;
        ping::check(GUEST2, 5)?;

        let incoming = format!("--incoming-fds={}", path("taps").display());
        let mut targets = [backend(&incoming)?, backend("--tap=tap2")?];
        targets.iter_mut().try_for_each(|backend| backend.status().map(drop))?;
        let vmm = Vmm::incoming(&path("incoming"), 1, "256M")?.args(["--paused"]);
        let mut target = two_devices(vmm, &targets, &path("target.ctl")).start("target")?;
        let connect = |_: &Process| Ok(ControlClient::connect(&path("target.ctl")).ok());
        let mut target_control = targets[0].process.wait_until("the target answers", connect)?;
        target_control.call(&Request::Status)?;
        let mut source_control = ControlClient::connect(&path("source.ctl"))?;
        let request = Request::Migrate { path: path("incoming"), local: true, dry_run: false };
        let report: MigrationReport = serde_json::from_value(source_control.call(&request)?)?;
        ensure!(report.is_success(), "{report:?}\n{}", target.log());
        source_control.call(&Request::Quit)?;
        ensure!(source.wait()?.success());
        ip(&["addr", "del", HOST2, "dev", "tap1"])?;
        ip(&["addr", "add", HOST2, "dev", "tap2"])?;
        target_control.call(&Request::Resume)?;

        ping::check(GUEST, 20)?;
        ping::check(GUEST2, 20)?;
        ensure!(targets[0].status()?.tap == "tap0" && targets[1].status()?.tap == "tap2");
        // The source back-end that gave its TAP away ends; the other one keeps its TAP and waits.
        let [mut local, mut other] = sources;
        ensure!(local.process.wait()?.success(), "{}", local.process.log());
        ensure!(other.status()?.tap == "tap1");
        target.check("true")?;
        ensure!(target.power_off()?.success());
        Ok(())
    })
}
