//! `demo`: hands a session on from back-end to back-end on this machine, then boots a Linux guest on `baton-vmm` with its network on `baton-backend` and a TAP, shows it at work, replaces the
//! back-end under it, moves it to another pair of them, and sums up. In the lab where this machine's KVM cannot run Linux. With `--vhost` the kernel moves the frames.

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

/// Show a Linux guest's network at work.
#[derive(Debug, Parser)]
struct Args {
    /// Have the kernel's vhost-net move the frames
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

/// Whether all went well.
fn run(args: &Args) -> Result<bool> {
    // Not again in the lab.
    let here = match std::env::var_os(lab::PLACE) {
        Some(_) => None,
        None => {
            heading("Hand-overs on this machine itself")?;
            here::show()?
        }
    };
    let whole = here.as_ref().is_none_or(|here| here.wrong == 0);
    let shown = match Place::find()? {
        Place::Here => demonstrate(if args.vhost { Datapath::VhostNet } else { Datapath::Userspace })?,
        Place::Lab(lab) => {
            say(
                "KVM on this machine cannot run Linux, or vhost-net or root's rights are missing: going to the lab, an",
            )?;
            say("emulated machine that has them. All is real there but the speed.")?;
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
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;

    let mut link = Link::new(datapath, Meeting::BackendListens, QUEUE_PAIRS)?;
    let vmm_control = link.control().with_file_name("vmm");
    let vmm = Vmm::new(QUEUE_PAIRS, MEMORY)?.net(link.socket()?, MAC, QUEUE_PAIRS).control(&vmm_control);
    heading("What runs")?;
    say(&link.command_line())?;
    say(&vmm.command_line())?;
    say(match datapath {
        Datapath::Userspace => "The frames are moved by baton-backend's own threads.",
        Datapath::VhostNet => {
            "The frames are moved by the kernel: a vhost-net of baton-backend's for each queue pair."
        }
    })?;

    heading("The guest's console")?;
    let mut guest = vmm.start_with_logs("guest", &logs)?;
    guest.wait_for_shell()?;
    link.bring_up(&mut guest)?;
    for command in ["uname -a", "nproc", "ethtool -i eth0", "ip -o -f inet address", "ethtool -l eth0"] {
        say(&format!("guest# {command}"))?;
        say(guest.check(command)?.trim_end())?;
    }

    heading("Its network")?;
    let traffic = measure(&mut guest)?;
    say(&traffic.text)?;
    let seen = guest.queue_pairs("eth0")?;
    let stats = link.stats()?;
    say(&batonctl(link.control(), "status")?)?;
    say(&batonctl(link.control(), "stats")?)?;
    link.check_healthy()?;

    heading("Its back-end is replaced, while it is pinged")?;
    let handed_over = hand_over::show(&mut link, &mut guest)?;

    heading("The guest moves, with its TAP, while it is pinged")?;
    let moved = migrate(datapath, guest, &vmm_control, &logs)?;
    link.wait_backend_ended().context("the back-end that the guest has left")?;

    heading("Summary")?;
    say(&summary(&seen, &stats, &traffic)?)?;
    say(&handed_over.summary())?;
    say(&moved.summary())?;
    say(&format!("in {:.0} s, boot included", start.elapsed().as_secs_f64()))?;
    heading("The same by hand, as root where KVM can run Linux")?;
    say(&by_hand(datapath)?)?;
    Ok(traffic.lost == 0 && handed_over.lost == 0 && moved.lost == 0)
}

/// How the guest has moved.
struct Moved {
    pause_us: u64,
    pings: usize,
    lost: usize,
}

impl Moved {
    fn summary(&self) -> String {
        let Self { pause_us, pings, lost } = self;
        let stood = pause_us / 1000;
        format!("move: the guest stood still for {stood} ms, {lost} of {pings} pings were lost")
    }
}

/// Moves the guest to another baton-vmm and baton-backend, and switches it off there.
fn migrate(datapath: Datapath, guest: Guest, control: &Path, logs: &Path) -> Result<Moved> {
    let mut backend = Backend::waiting(datapath, &["--log-level=debug"])?;
    let socket = backend.socket.to_str().context("a path that is not UTF-8")?;
    let (incoming, there) = (backend.directory().join("vm"), backend.directory().join("vmm.ctl"));
    let target = Vmm::incoming(&incoming, QUEUE_PAIRS, MEMORY)?.net(socket, MAC, QUEUE_PAIRS).control(&there);
    let options = datapath::options(datapath).iter().map(|option| format!(" {option}")).collect::<String>();
    let taps = backend.incoming();
    say(&format!("baton-backend --socket-path={socket} --incoming-fds={}{options}", taps.display()))?;
    say(&target.command_line())?;
    let mut target = target.start_with_logs("target", logs)?;
    backend.process.connect(&there)?;

    let pings = ping::Endless::start(GUEST);
    let path = incoming.to_str().context("a path that is not UTF-8")?;
    let report = run_batonctl(control, &["migrate", path, "--local"])?;
    say(&format!("batonctl {} migrate {path} --local", control.display()))?;
    let report: MigrationReport = serde_json::from_str(report.trim()).context("what batonctl said")?;
    let MigrationReport::Completed { pause_us, phases } = report else { bail!("{report:?}") };
    say(&phases_of(pause_us, &phases))?;
    say(&batonctl(control, "status")?)?;
    run_batonctl(control, &["quit"])?;
    ensure!(guest.wait()?.success(), "the baton-vmm that the guest has left did not end well");
    say(&batonctl(&there, "status")?)?;
    say(&format!("guest# ping -c 3 {HOST}"))?;
    say(target.check(&format!("ping -c 3 -i 0.2 {HOST}"))?.trim_end())?;
    let (pings, lost) = pings.end()?;
    ensure!(target.power_off()?.success(), "baton-vmm did not end well");
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
        "{:>10}  before, while it ran\n{:>10}  it stood still, of that\n",
        ms(prepare_us),
        ms(pause_us)
    );
    for (us, what) in [
        (stop_vcpus_us, "its vCPUs stopped"),
        (stop_rings_us, "its rings stopped"),
        (device_state_us, "the back-end offered the TAP to the other one"),
        (save_us, "its state was taken"),
        (restore_us, "its state was put in at the other place"),
        (start_us, "the other back-end took the TAP, and the guest ran"),
    ] {
        text.push_str(&format!("{:>14}  {what}\n", ms(us)));
    }
    text.trim_end().to_owned()
}

/// What went through the network, as seen by those who sent and received it.
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
        let outcome: bulk::Outcome = serde_json::from_str(outcome.trim()).context("what traffic wrote")?;
        let (sums, mebibytes) = (outcome.sums.join(" "), outcome.bytes >> 20);
        let seconds = outcome.seconds;
        writeln!(text, "TCP   {way}   {mebibytes} MiB in {seconds:.1} s, CRC-32 {sums} at both ends")?;
        bytes += outcome.bytes;
    }
    Ok(Traffic { text: text.trim_end().to_owned(), lost: to_guest + from_guest, bytes })
}

/// How many pings were lost, by the words of busybox' ping: `50 packets transmitted, 50 packets received`.
fn lost(text: &str) -> Result<u32> {
    let line = text.lines().find(|line| line.contains("packets transmitted"));
    let line = line.with_context(|| format!("ping said: {text}"))?;
    let mut numbers = line.split(", ").filter_map(|part| part.split_whitespace().next()?.parse::<u32>().ok());
    let (Some(sent), Some(received)) = (numbers.next(), numbers.next()) else { bail!("ping said: {line}") };
    Ok(sent.saturating_sub(received))
}

fn summary(seen: &[QueuePair], stats: &BackendStats, traffic: &Traffic) -> Result<String> {
    let mut text = String::new();
    for (pair, QueuePair { rx, tx }) in seen.iter().enumerate() {
        writeln!(
            text,
            "queue pair {pair}: the guest counted {} frames to it, {} from it",
            rx.frames, tx.frames
        )?;
    }
    for (pair, counters) in stats.queue_pairs.iter().enumerate() {
        writeln!(text, "queue pair {pair}: the back-end counted {}", counted(&counters.rx, &counters.tx))?;
    }
    writeln!(text, "lost pings: {} of {}", traffic.lost, 2 * PINGS)?;
    write!(text, "TCP: {} bytes, all sums equal", traffic.bytes)?;
    Ok(text)
}

/// What the back-end has counted of a queue pair: only what it has discarded where the kernel moves the frames.
fn counted(rx: &DirectionStats, tx: &DirectionStats) -> String {
    let both = |to: Option<u64>, from: Option<u64>| Some(to? + from?);
    let numbers = [
        (rx.frames, "frames to the guest"),
        (tx.frames, "from it"),
        (both(rx.large_frames, tx.large_frames), "of them larger than an Ethernet frame"),
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

/// What batonctl says for people, below its command line.
fn batonctl(control: &Path, command: &str) -> Result<String> {
    let said = ask(&[control.as_os_str(), command.as_ref()])?;
    Ok(format!("batonctl {} {command}\n{}", control.display(), said.trim_end()))
}

/// The reply as it came.
fn run_batonctl(control: &Path, command: &[&str]) -> Result<String> {
    let words = ["--json".as_ref(), control.as_os_str()].into_iter();
    ask(&words.chain(command.iter().map(AsRef::as_ref)).collect::<Vec<_>>())
}

fn ask(arguments: &[&OsStr]) -> Result<String> {
    let output =
        Command::new(programs::batonctl()?).args(arguments).output().context("cannot run batonctl")?;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // It also fails when it reports that something was tried and not done.
    ensure!(output.status.success() || !said.is_empty(), "batonctl: {errors}");
    Ok(said.into_owned())
}

fn heading(text: &str) -> Result<()> {
    say(&format!("\n=== {text}"))
}

fn say(text: &str) -> Result<()> {
    writeln!(io::stdout(), "{text}").context("cannot write to standard output")
}
