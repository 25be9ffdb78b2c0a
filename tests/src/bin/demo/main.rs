//! `demo`: shows hand-overs on this machine, then a Linux guest on `baton-vmm` and `baton-backend`: its network, the
//! replacement of its back-end, and its migration to another VMM and back-end. The guest runs in the lab if this
//! machine cannot run it. With `--vhost` the kernel moves the frames.

mod hand_over;
mod here;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use baton_protocol::control::{BackendStats, DirectionStats, MigrationPhases, MigrationReport};
use baton_tests::backend::Backend;
use baton_tests::datapath::{self, Datapath};
use baton_tests::guest::{Guest, QueuePair, Vmm};
use baton_tests::lab::{self, Job, Outcome, Place};
use baton_tests::link::{GUEST, HOST, Link, MAC, Meeting, PORT, TAP};
use baton_tests::traffic::bulk;
use baton_tests::{images, paths, ping, programs};
use clap::Parser;

const QUEUE_PAIRS: u16 = 2;
const PINGS: u16 = 50;
const BULK: u64 = 32 << 20;
const MEMORY: &str = "512M";

/// Demonstrate hand-overs between back-ends, with and without a Linux guest
#[derive(Debug, Parser)]
struct Args {
    /// Let the kernel move the guest's frames, through /dev/vhost-net
    #[arg(long)]
    vhost: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all parts. Returns whether nothing was lost.
fn run(args: &Args) -> Result<bool> {
    // The variable is set in the lab, where this part is not repeated.
    let here = match std::env::var_os(lab::PLACE) {
        Some(_) => None,
        None => {
            heading("Hand-overs on this machine")?;
            here::show()?
        }
    };
    let whole = here.as_ref().is_none_or(|here| here.wrong == 0);
    let shown = match Place::find()? {
        Place::Here => demonstrate(if args.vhost { Datapath::VhostNet } else { Datapath::Userspace })?,
        Place::Lab(lab) => {
            heading("Starting the lab")?;
            say(
                "The guest needs root privileges, a KVM that can run Linux, /dev/vhost-net and /dev/net/tun.\n\
                 This machine lacks one of them. So the guest runs in the lab: an emulated machine that has\n\
                 them, but is much slower.",
            )?;
            let arguments = std::env::args().skip(1);
            let outcome = lab.run(&Job::here(std::env::current_exe()?, arguments)?, &mut |_| ())?;
            outcome == Outcome::Exited(0)
        }
    };
    if let Some(here) = here {
        say(&here.summary())?;
    }
    Ok(shown && whole)
}

fn demonstrate(datapath: Datapath) -> Result<bool> {
    let start = Instant::now();
    let logs = paths::logs()?.join("demo");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;

    let mut link = Link::new(datapath, Meeting::BackendListens, QUEUE_PAIRS)?;
    let vmm_control = link.control().with_file_name("vmm");
    let vmm = Vmm::new(QUEUE_PAIRS, MEMORY)?.net(link.socket()?, MAC, QUEUE_PAIRS).control(&vmm_control);
    heading("The back-end and the VMM")?;
    say(&link.command_line())?;
    say(&vmm.command_line())?;
    say(match datapath {
        Datapath::Userspace => "The threads of baton-backend move the frames.",
        Datapath::VhostNet => {
            "The kernel moves the frames: baton-backend has one vhost-net instance for each queue pair."
        }
    })?;

    heading("The guest")?;
    let mut guest = vmm.start_with_logs("guest", &logs)?;
    guest.wait_for_shell()?;
    link.bring_up(&mut guest)?;
    for command in ["uname -a", "nproc", "ethtool -i eth0", "ip -o -f inet address", "ethtool -l eth0"] {
        say(&format!("guest# {command}"))?;
        say(guest.check(command)?.trim_end())?;
    }

    heading("The network of the guest")?;
    let traffic = measure(&mut guest)?;
    say(&traffic.text)?;
    let seen = guest.queue_pairs("eth0")?;
    let stats = link.stats()?;
    say(&batonctl(link.control(), "status")?)?;
    say(&batonctl(link.control(), "stats")?)?;
    link.check_healthy()?;

    heading("Replacing the back-end, under a flood of pings")?;
    let handed_over = hand_over::show(&mut link, &mut guest)?;

    heading("Migrating the guest with its TAP, under a flood of pings")?;
    let moved = migrate(datapath, guest, &vmm_control, &logs)?;
    link.wait_backend_ended().context("the source back-end did not end cleanly")?;

    heading("Summary")?;
    say(&summary(&seen, &stats, &traffic)?)?;
    say(&handed_over.summary())?;
    say(&moved.summary())?;
    say(&format!("total time: {:.0} s, including the boot", start.elapsed().as_secs_f64()))?;
    heading("The same by hand, as root on a machine whose KVM can run Linux")?;
    say(&by_hand(datapath)?)?;
    Ok(traffic.lost == 0 && handed_over.lost == 0 && moved.lost == 0)
}

/// The result of the migration.
struct Moved {
    pause_us: u64,
    pings: usize,
    lost: usize,
}

impl Moved {
    fn summary(&self) -> String {
        let Self { pause_us, pings, lost } = self;
        let stopped = pause_us / 1000;
        format!("migration: guest stopped for {stopped} ms; {lost} of {pings} pings lost")
    }
}

/// Migrates the guest to another baton-vmm and baton-backend, and powers it off there.
fn migrate(datapath: Datapath, guest: Guest, control: &Path, logs: &Path) -> Result<Moved> {
    let mut backend = Backend::waiting(datapath, &["--log-level=debug"])?;
    let socket = backend.socket.to_str().context("the back-end's socket path is not UTF-8")?;
    let (incoming, there) = (backend.directory().join("vm"), backend.directory().join("vmm.ctl"));
    let target = Vmm::incoming(&incoming, QUEUE_PAIRS, MEMORY)?.net(socket, MAC, QUEUE_PAIRS).control(&there);
    let options = datapath::options(datapath).iter().map(|option| format!(" {option}")).collect::<String>();
    let taps = backend.incoming();
    say(&format!("baton-backend --socket-path={socket} --incoming-fds={}{options}", taps.display()))?;
    say(&target.command_line())?;
    let mut target = target.start_with_logs("target", logs)?;
    backend.process.connect(&there)?;

    let pings = ping::Endless::start(GUEST);
    let path = incoming.to_str().context("the target's socket path is not UTF-8")?;
    let report = run_batonctl(control, &["migrate", path, "--local"])?;
    say(&format!("batonctl {} migrate {path} --local", control.display()))?;
    let report: MigrationReport = serde_json::from_str(report.trim())
        .with_context(|| format!("unexpected output of batonctl: {report:?}"))?;
    let MigrationReport::Completed { pause_us, phases } = report else {
        bail!("the migration failed: {report:?}")
    };
    say(&phases_of(pause_us, &phases))?;
    say(&batonctl(control, "status")?)?;
    run_batonctl(control, &["quit"])?;
    ensure!(guest.wait()?.success(), "the source baton-vmm failed");
    say(&batonctl(&there, "status")?)?;
    say(&format!("guest# ping -c 3 {HOST}"))?;
    say(target.check(&format!("ping -c 3 -i 0.2 {HOST}"))?.trim_end())?;
    let (pings, lost) = pings.end()?;
    ensure!(target.power_off()?.success(), "the target baton-vmm failed");
    backend.check_healthy()?;
    Ok(Moved { pause_us, pings, lost: lost.len() })
}

fn phases_of(pause_us: u64, phases: &MigrationPhases) -> String {
    let MigrationPhases {
        prepare_us,
        stop_vcpus_us,
        stop_rings_us,
        device_state_us,
        save_us,
        restore_us,
        start_us,
    } = *phases;
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    let mut text = format!(
        "{:>10}  preparation, while the guest runs\n{:>10}  guest stopped, of which\n",
        ms(prepare_us),
        ms(pause_us)
    );
    for (us, what) in [
        (stop_vcpus_us, "the source stops the vCPUs"),
        (stop_rings_us, "the source stops the rings"),
        (device_state_us, "the source back-end offers the TAP to the target back-end"),
        (save_us, "the source saves the state of the VM"),
        (restore_us, "the target restores it"),
        (start_us, "the target back-end takes the TAP, and the guest runs"),
    ] {
        text.push_str(&format!("{:>14}  {what}\n", ms(us)));
    }
    text.trim_end().to_owned()
}

/// The traffic that went through the network, as measured at both ends.
struct Traffic {
    text: String,
    lost: u32,
    bytes: u64,
}

fn measure(guest: &mut Guest) -> Result<Traffic> {
    let to_guest = u32::try_from(ping::lost(GUEST, PINGS)?.len())?;
    let from_guest = lost(&guest.run(&format!("ping -q -A -W 30 -c {PINGS} {HOST}"))?.output)?;
    let mut text = String::new();
    writeln!(text, "ping  network -> guest   {PINGS} sent, {to_guest} lost")?;
    writeln!(text, "ping  guest -> network   {PINGS} sent, {from_guest} lost")?;
    let mut bytes = 0;
    for (direction, way) in [("up", "guest -> network"), ("down", "network -> guest")] {
        let command = format!("traffic bulk {HOST}:{PORT} --direction={direction} --bytes={BULK}");
        let outcome = guest.check(&command)?;
        let outcome: bulk::Outcome =
            serde_json::from_str(outcome.trim()).context("unexpected output of traffic")?;
        let (sums, mebibytes) = (outcome.sums.join(" "), outcome.bytes >> 20);
        let seconds = outcome.seconds;
        writeln!(text, "TCP   {way}   {mebibytes} MiB in {seconds:.1} s, CRC-32 {sums} at both ends")?;
        bytes += outcome.bytes;
    }
    Ok(Traffic { text: text.trim_end().to_owned(), lost: to_guest + from_guest, bytes })
}

/// Parses how many pings were lost from the output of busybox' ping: `50 packets transmitted, 50 packets received`.
fn lost(text: &str) -> Result<u32> {
    let line = text.lines().find(|line| line.contains("packets transmitted"));
    let line = line.with_context(|| format!("unexpected output of ping: {text}"))?;
    let mut numbers = line.split(", ").filter_map(|part| part.split_whitespace().next()?.parse::<u32>().ok());
    let (Some(sent), Some(received)) = (numbers.next(), numbers.next()) else {
        bail!("unexpected output of ping: {line}")
    };
    Ok(sent.saturating_sub(received))
}

fn summary(seen: &[QueuePair], stats: &BackendStats, traffic: &Traffic) -> Result<String> {
    let mut text = String::new();
    for (pair, QueuePair { rx, tx }) in seen.iter().enumerate() {
        writeln!(text, "queue pair {pair}: guest received {} frames, sent {}", rx.frames, tx.frames)?;
    }
    for (pair, counters) in stats.queue_pairs.iter().enumerate() {
        writeln!(text, "queue pair {pair}: back-end counted {}", counted(&counters.rx, &counters.tx))?;
    }
    writeln!(text, "ping: {} of {} lost", traffic.lost, 2 * PINGS)?;
    write!(text, "TCP: {} bytes, all checksums equal", traffic.bytes)?;
    Ok(text)
}

/// Formats the counters of a queue pair. Where the kernel moves the frames, the back-end counts only discarded ones.
fn counted(rx: &DirectionStats, tx: &DirectionStats) -> String {
    let both = |to: Option<u64>, from: Option<u64>| Some(to? + from?);
    let numbers = [
        (rx.frames, "frames to the guest"),
        (tx.frames, "from the guest"),
        (both(rx.large_frames, tx.large_frames), "of them larger than 1518 bytes"),
        (both(rx.dropped, tx.dropped), "dropped"),
        (Some(tx.discarded), "discarded"),
    ];
    let known = numbers.iter().filter_map(|(number, what)| Some(format!("{} {what}", (*number)?)));
    known.collect::<Vec<_>>().join(", ")
}

fn by_hand(datapath: Datapath) -> Result<String> {
    let (backend, vmm, batonctl) = (programs::backend()?, programs::vmm()?, programs::batonctl()?);
    let (kernel, initramfs) = (images::guest_kernel()?, images::guest_initramfs()?);
    let mut text = String::new();
    let mut command = backend.display().to_string();
    for option in datapath::options(datapath) {
        write!(command, " {option}")?;
    }
    writeln!(text, "{command} --socket-path=/tmp/net.sock --tap={TAP} --control-socket=/tmp/backend.sock &")?;
    writeln!(text, "ip address add {HOST}/24 dev {TAP} && ip link set {TAP} up")?;
    writeln!(
        text,
        "{} --kernel={} --initrd={} --net socket=/tmp/net.sock,mac={MAC}",
        vmm.display(),
        kernel.display(),
        initramfs.display()
    )?;
    writeln!(text, "  guest# ip address add {GUEST}/24 dev eth0 && ip link set eth0 up && ping {HOST}")?;
    writeln!(text, "{} /tmp/backend.sock stats", batonctl.display())?;
    writeln!(text, "{command} --incoming-fds=/tmp/next.sock --control-socket=/tmp/next-backend.sock &")?;
    writeln!(text, "{} /tmp/backend.sock handover /tmp/next.sock", batonctl.display())?;
    write!(text, "  guest# poweroff -f")?;
    Ok(text)
}

/// Runs batonctl and returns its command line, followed by its output for people.
fn batonctl(control: &Path, command: &str) -> Result<String> {
    let said = ask(&[control.as_os_str(), command.as_ref()])?;
    Ok(format!("batonctl {} {command}\n{}", control.display(), said.trim_end()))
}

/// Runs batonctl and returns the reply as JSON.
fn run_batonctl(control: &Path, command: &[&str]) -> Result<String> {
    let words = ["--json".as_ref(), control.as_os_str()].into_iter();
    ask(&words.chain(command.iter().map(AsRef::as_ref)).collect::<Vec<_>>())
}

fn ask(arguments: &[&OsStr]) -> Result<String> {
    let output =
        Command::new(programs::batonctl()?).args(arguments).output().context("cannot run batonctl")?;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // batonctl also fails if it prints that the request was rolled back or refused.
    ensure!(output.status.success() || !said.is_empty(), "batonctl failed: {errors}");
    Ok(said.into_owned())
}

fn heading(text: &str) -> Result<()> {
    say(&format!("\n=== {text}"))
}

fn say(text: &str) -> Result<()> {
    writeln!(io::stdout(), "{text}").context("cannot write to standard output")
}
