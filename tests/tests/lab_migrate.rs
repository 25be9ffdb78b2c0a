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
    loses_nothing_in_ten_moves_and_hand_overs,
    moves_to_new_taps,
    moves_with_its_tap,
}

/// How long before and after a move a ping may have been under way: in the lab time means little.
const SLACK: Duration = Duration::from_secs(10);
/// By how much the guest's clock may differ from the host's.
const DRIFT: Duration = Duration::from_secs(2);

/// The guest's clock, between two looks at the host's.
struct Look {
    before: Instant,
    uptime: Duration,
    after: Instant,
}

fn look_at_clock(stay: &mut Stay) -> Result<Look> {
    let before = Instant::now();
    Ok(Look { before, uptime: stay.uptime()?, after: Instant::now() })
}

/// How often its back-end is replaced before a guest moves with its TAP: in three moves more than 20 times.
const HAND_OVERS: usize = 7;

/// Moves a guest some times under pings, and looks at what it and they say.
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

fn moves_to_new_taps(datapath: Datapath) -> Result<()> {
    lab::run(|| moves(Kind { datapath, queue_pairs: 4 }, Way::NewTap, 3))
}

fn moves_with_its_tap(datapath: Datapath) -> Result<()> {
    lab::run(|| moves(Kind { datapath, queue_pairs: 4 }, Way::SameTap, 3))
}

/// The guest moves, and its back-end is replaced where it is. TCP streams and numbered datagrams both ways, on every queue pair, all the time; the guest's clock; the TAP's counters.
fn loses_nothing_in_ten_moves_and_hand_overs(datapath: Datapath) -> Result<()> {
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
            // Nothing may be lost, as there is no switch in which it could be.
            let balance = load.end(&[])?;
            ensure!(balance.bytes > 0 && balance.datagrams.iter().all(|count| *count > 0), "{balance:?}");
            ensure!(traveller.tap_counters()?.tx_dropped == 0, "{:?}", traveller.tap_counters()?);

            let ended = look_at_clock(&mut traveller.stay)?;
            // The looks take time: more than this has passed, and less than that.
            let (least, most) = (ended.before - began.after, ended.after - began.before);
            let guest = ended.uptime - began.uptime;
            ensure!(
                least < guest + DRIFT && guest < most + DRIFT,
                "in {least:?} to {most:?} the guest's clock went on by {guest:?}"
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

/// What a migration that was rolled back says, as one line.
fn rolled_back(report: &MigrationReport) -> Result<String> {
    match report {
        MigrationReport::RolledBack { phase, reason } => Ok(format!("{phase}: {reason}")),
        other => bail!("not rolled back: {other:?}"),
    }
}

/// A guest's command that sets EFER of its first processor: 0xd01 is Linux' own, with bit 12 SVM can be used.
fn set_efer(value: u16) -> String {
    let [low, high] = value.to_le_bytes();
    // `dd` counts in blocks of 8 bytes.
    let register = 0xc000_0080_u32 / 8;
    let bytes = format!(r"\x{low:02x}\x{high:02x}\x00\x00\x00\x00\x00\x00");
    format!("printf '{bytes}' | dd of=/dev/cpu/0/msr bs=8 seek={register} 2>&1")
}

#[test]
fn stays_where_it_cannot_move() -> Result<()> {
    lab::run(|| {
        let mut traveller = Traveller::new(Kind { datapath: Datapath::Userspace, queue_pairs: 1 })?;
        let body = |traveller: &mut Traveller| {
            let pings = ping::Endless::start(GUEST);
            // Another number of processors, and another wish for the device: both are said, and nothing is touched.
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
            // It has refused, and waits for another. What concerns the running guest is not for who waits.
            ensure!(other.status()?.state == VmmState::Incoming);
            for request in [Request::Pause, Request::Resume] {
                let refused = other.ask(&request).err().context("not refused")?.to_string();
                ensure!(refused.contains("has yet to come"), "{refused}");
            }
            drop(other);

            // Nobody there.
            let mut target = traveller.place(Way::SameTap, |wanted| wanted)?;
            let nowhere = target.incoming().with_extension("none");
            let request = Request::Migrate { path: nowhere, local: true, dry_run: false };
            let report = serde_json::from_value(traveller.stay.ask(&request)?)?;
            ensure!(rolled_back(&report)?.contains("--incoming"), "{report:?}");

            // A back-end that has a TAP refuses one, while the guest runs.
            let owner = traveller.place(Way::NewTap, |wanted| wanted)?;
            let text = rolled_back(&traveller.stay.migrate(&owner, Way::SameTap)?)?;
            ensure!(text.starts_with("prepare: the target refuses: tap: "), "{text}");
            ensure!(text.contains("start it with --incoming-fds"), "{text}");
            ensure!(traveller.stay.status()?.state == VmmState::Running);
            traveller.check_pings(5)?;
            drop(owner);

            // A guest that could have guests of its own.
            traveller.stay.guest.check(&set_efer(0x1d01))?;
            let report = traveller.stay.ask_migrate(&target, Way::SameTap)?;
            let MigrationReport::Refused { reasons } = &report else { bail!("{report:?}") };
            ensure!(reasons.len() == 1 && reasons[0].name == "nested", "{report:?}");
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text.starts_with("hello: the target refuses: nested: "), "{text}");
            traveller.stay.guest.check(&set_efer(0xd01))?;

            // A VMM that hangs, before and after its HELLO.
            target.signal_vmm(Signal::SIGSTOP)?;
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text == "hello: the target does not answer", "{text}");
            target.signal_vmm(Signal::SIGCONT)?;

            // A back-end that is not there.
            target.backend.process.signal(Signal::SIGKILL)?;
            target.backend.process.wait()?;
            let text = rolled_back(&traveller.stay.migrate(&target, Way::SameTap)?)?;
            ensure!(text.contains("back-end: "), "{text}");
            drop(target);

            // After all that it can.
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

/// A target that fails at each point in each way, with the guest's TAP on the way and without: the guest runs on, with
/// its network, and whoever asked is told where and why.
#[test]
fn runs_on_wherever_the_target_fails() -> Result<()> {
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
        (Point::Commit, Then::Lie, "commit: the target said that it had taken over, but had not"),
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
            // Not under pings: of so many at once a guest's kernel itself does not answer all.
            for (point, then, expected) in long {
                fails(point, then, expected)?;
            }
            traveller.check_pings(20)?;

            // One that stands still goes on standing still.
            traveller.stay.ask(&Request::Pause)?;
            let target = FakeTarget::start(&path, Point::State, Then::Leave)?;
            let request = Request::Migrate { path: path.clone(), local: true, dry_run: false };
            rolled_back(&serde_json::from_value(traveller.stay.ask(&request)?)?)?;
            target.end()?;
            ensure!(traveller.stay.status()?.state == VmmState::Paused);
            traveller.stay.ask(&Request::Resume)?;
            traveller.check_pings(20)?;

            // And one that was taken is gone, whatever is heard of the target.
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
        // What the guest has resolved stays right when the address goes from one TAP to the other.
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
        // The one has given its TAP away and ends; the other keeps it, and waits.
        let [mut local, mut other] = sources;
        ensure!(local.process.wait()?.success(), "{}", local.process.log());
        ensure!(other.status()?.tap == "tap1");
        target.check("true")?;
        ensure!(target.power_off()?.success());
        Ok(())
    })
}
