//! A guest on QEMU that moves: from one QEMU, back-end and TAP to another of each, its memory copied.
//!
//! The host's address is on a bridge. The TAP where the guest is, is a port of it: that is the network, which whoever
//! moves a guest switches. A back-end serves one stay of the guest, so that what its TAP still had when the guest left
//! goes with it and is not delivered when the guest comes back.

mod load;

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

pub use self::load::{Balance, Load};
use crate::backend::Backend;
use crate::datapath::Datapath;
use crate::frames;
use crate::guest::{Accelerator, Guest, PATIENCE, Qemu};
use crate::link::{self, GUEST, HOST, MAC, Meeting, PORT, ip};
use crate::netns::{self, Netns};
use crate::packet_socket::PacketSocket;
use crate::qmp::Qmp;

/// The bridge, and the address that it keeps whichever ports it has.
const BRIDGE: (&str, &str) = ("br0", "02:ba:70:00:00:01");

/// The guest is at one of them and goes to the other.
pub(crate) const TAPS: [&str; 2] = ["tap0", "tap1"];

/// How many frames wait in a TAP: all that are sent while a guest moves.
const QUEUE: &str = "10000";

/// The guest's memory, as QEMU is told: 128 MiB less 8 KiB. Where the size is a multiple of 256 KiB, QEMU before 9.0
/// takes a shorter way through its bitmap of what was written, on which emulated processors are not told to note what
/// they write from then on.
const MEMORY: &str = "131064K";

/// What QEMU copies at once.
const PAGE: usize = 4096;

/// How much of it is read for comparison at once.
const CHUNK: usize = 256 * PAGE;

/// KVM's wall clock (`pvclock_wall_clock`), which Linux has at a page's start: three words.
const WALL_CLOCK: usize = 12;

/// How fast memory is copied at most (`max-bandwidth`), and how long the guest may stand still (`downtime-limit`, ms).
type Limits = (u64, u64);

/// At first: the guest is not stopped, for it takes a minute to copy its memory once.
const SLOW: Limits = (1 << 20, 1);

/// Then: once everything was copied, QEMU looks what was written meanwhile, and any guest can be stopped.
const CONVERGENT: Limits = (100 << 30, 5000);

/// Or: once everything was copied the guest is stopped, before QEMU looks.
const AT_ONCE: Limits = (100 << 30, 0);

/// Until it was copied once.
const FAST: Limits = (16 << 20, 1);

/// Then: a page a second.
const CRAWLING: Limits = (PAGE as u64, 1);

/// Frames of which the guest's driver does not hear: not as many as it has buffers for.
const FRAMES: u32 = 200;

/// Where `traffic serve` listens in the guest.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(GUEST), PORT);

/// What moves.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Who moves its frames.
    pub datapath: Datapath,
    /// What runs its instructions.
    pub accelerator: Accelerator,
    /// How many queue pairs its network device has.
    pub queue_pairs: u16,
}

/// A guest with its network.
#[derive(Debug)]
pub struct Mover {
    kind: Kind,
    stay: Stay,
    stays: usize,
    _netns: Netns,
}

/// The guest at a place.
#[derive(Debug)]
struct Stay {
    guest: Guest,
    monitor: Qmp,
    backend: Backend,
    tap: &'static str,
}

/// How a move went.
#[derive(Clone, Debug)]
pub struct Switch {
    /// When the guest was stopped at the source.
    pub stopped: SystemTime,
    /// When it ran at the target.
    pub running: SystemTime,
    /// How many frames the network sent to the guest while its memory was copied.
    pub frames: u64,
    /// How often QEMU has looked which pages had been written.
    pub rounds: u64,
}

/// A network that a guest can be at two places of: a namespace with the host's address on a bridge, and [`TAPS`].
///
/// # Errors
/// If it cannot be set up.
pub(crate) fn network(queue_pairs: u16) -> Result<Netns> {
    let netns = Netns::enter()?;
    let (bridge, address) = BRIDGE;
    ip(&["link", "set", "lo", "up"])?;
    ip(&["link", "add", bridge, "address", address, "type", "bridge"])?;
    ip(&["addr", "add", &format!("{HOST}/24"), "dev", bridge])?;
    ip(&["link", "set", bridge, "up"])?;
    ip(&["neigh", "add", &GUEST.to_string(), "lladdr", MAC, "dev", bridge])?;
    for tap in TAPS {
        netns.create_persistent_tap(tap, queue_pairs > 1)?;
        ip(&["link", "set", tap, "txqueuelen", QUEUE])?;
    }
    Ok(netns)
}

/// Joins a TAP to the network.
pub(crate) fn plug(tap: &str) -> Result<()> {
    ip(&["link", "set", tap, "master", BRIDGE.0])
}

/// Parts a TAP from it.
pub(crate) fn unplug(tap: &str) -> Result<()> {
    ip(&["link", "set", tap, "nomaster"])
}

impl Mover {
    /// Sets up the network, and boots a guest at the first place.
    ///
    /// # Errors
    /// If anything cannot be set up.
    pub fn new(kind: Kind) -> Result<Self> {
        let netns = network(kind.queue_pairs)?;
        let mut stay = Stay::new(kind, 0, |qemu| qemu)?;
        plug(stay.tap)?;
        stay.guest.wait_for_shell()?;
        link::bring_up(&mut stay.guest, kind.queue_pairs)?;
        Ok(Self { kind, stay, stays: 1, _netns: netns })
    }

    /// The guest, where it is now.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.stay.guest
    }

    /// Moves the guest to another QEMU, back-end and TAP; the ones that it leaves end. It runs on at the source at
    /// least as long as `meanwhile` takes.
    ///
    /// # Errors
    /// If anything fails, and if the guest's memory is not the same at both places before it runs on.
    pub fn go(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<Switch> {
        let limits = match self.kind.accelerator {
            Accelerator::Kvm => CONVERGENT,
            // Of what emulated processors write it may lose some where it looks while they run.
            Accelerator::Tcg => AT_ONCE,
        };
        let frames = netns::counters(self.stay.tap)?.tx_packets;
        let (mut target, stopped) = self.copy(limits, |_| meanwhile())?;
        let frames = netns::counters(self.stay.tap)?.tx_packets - frames;
        let (source, copy) = (self.stay.guest.memory()?, target.guest.memory()?);
        let differing = differing_pages(self.kind.accelerator, &source, &copy)?;
        ensure!(
            differing.is_empty(),
            "{} pages were not copied as they are: {differing:x?}",
            differing.len()
        );

        // First the new port: what is sent to the guest waits there until it runs.
        plug(target.tap)?;
        unplug(self.stay.tap)?;
        target.monitor.execute("cont", &json!({}))?;
        let running = target.monitor.wait_event("RESUME")?.time;
        target.guest.check("true").context("the guest's shell after the move")?;

        let mut source = std::mem::replace(&mut self.stay, target);
        let rounds = source.rounds()?;
        source.end()?;
        Ok(Switch { stopped, running, frames, rounds })
    }

    /// Copies the memory of a guest whose driver does not hear of frames, and has its device receive some when all was
    /// copied once: what these change is copied again only if the back-end has noted it.
    ///
    /// # Errors
    /// If anything fails, and if a frame is not at both places.
    pub fn check_log(&mut self) -> Result<()> {
        // Something must remain to be copied always, else QEMU comes to an end by itself.
        let busy = "dd if=/dev/zero of=/dev/shm/busy bs=1M count=1 2>/dev/null";
        self.stay.guest.check(&format!("(while :; do {busy}; done) &"))?;
        self.stay.guest.take_interrupts("eth0")?;
        let memory = self.stay.guest.memory()?;
        let before = read(&memory)?;
        let (target, _) = self.copy(CONVERGENT, |source| {
            source.limit(FAST)?;
            source.wait_copied_once()?;
            source.limit(CRAWLING)?;
            source.receive_frames()
        })?;
        let (after, copy) = (read(&memory)?, read(&target.guest.memory()?)?);
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).zip(copy.chunks(PAGE));
        let (mut with_frames, mut lost) = (0, 0);
        for ((before, after), copy) in pages {
            if before != after && frames::appear_in(after) {
                with_frames += 1;
                lost += u32::from(after != copy);
            }
        }
        ensure!(with_frames > 50, "frames are in {with_frames} pages only");
        ensure!(lost == 0, "of {with_frames} pages that frames have changed, {lost} were not copied again");
        target.end()?;
        self.stay.backend.check_healthy()
    }

    /// Copies the guest's memory to another place, where it does not run yet. When `meanwhile` is over, `limits` say how
    /// to come to an end. Gives the place, and when the guest was stopped.
    fn copy(
        &mut self,
        limits: Limits,
        meanwhile: impl FnOnce(&mut Stay) -> Result<()>,
    ) -> Result<(Stay, SystemTime)> {
        let mut target = Stay::new(self.kind, self.stays, Qemu::incoming)?;
        self.stays += 1;
        let channel = target.backend.directory().join("migration");
        let channel = json!({ "uri": format!("unix:{}", channel.display()) });
        for monitor in [&mut target.monitor, &mut self.stay.monitor] {
            let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
            monitor.execute("migrate-set-capabilities", &events)?;
        }
        target.monitor.execute("migrate-incoming", &channel)?;
        self.stay.limit(SLOW)?;
        self.stay.monitor.execute("migrate", &channel)?;
        meanwhile(&mut self.stay)?;
        self.stay.limit(limits)?;
        let stopped = self.stay.wait_migrated()?;
        target.wait_migrated()?;
        Ok((target, stopped))
    }

    /// What to look at when something has failed.
    pub fn evidence(&mut self) -> String {
        let Stay { backend, guest, .. } = &mut self.stay;
        format!(
            "status: {:?}\nstats: {:?}\nlog:\n{}\nQEMU:\n{}",
            backend.status(),
            backend.stats(),
            backend.process.log(),
            guest.log()
        )
    }

    /// Switches the guest off; everything must end well.
    ///
    /// # Errors
    /// If it does not.
    pub fn end(self) -> Result<()> {
        let Stay { guest, backend, .. } = self.stay;
        ensure!(guest.power_off()?.success(), "QEMU failed");
        end(backend)
    }
}

impl Stay {
    /// A back-end on the TAP whose turn it is, and a QEMU with it.
    fn new(kind: Kind, number: usize, how: impl FnOnce(Qemu) -> Qemu) -> Result<Self> {
        let Kind { datapath, accelerator, queue_pairs } = kind;
        let tap = TAPS[number % TAPS.len()];
        let arguments =
            [format!("--tap={tap}"), format!("--queue-pairs={queue_pairs}"), "--log-level=debug".to_owned()];
        let mut backend = Backend::listening(datapath, &arguments.each_ref().map(String::as_str), &[])?;
        backend.status()?;
        // A bridge sends nothing to a port without a carrier, which this one has got from the back-end.
        netns::wait_running(tap)?;
        let socket = backend.socket.to_str().context("a path that is not UTF-8")?;
        let qemu = Qemu::new(accelerator, queue_pairs, MEMORY)?;
        let qemu = how(qemu.vhost_user("net0", socket, Meeting::BackendListens, MAC, queue_pairs));
        let (guest, monitor) = qemu.start_with_monitor(&format!("guest-{number}"))?;
        Ok(Self { guest, monitor, backend, tap })
    }

    /// Waits until a migration has come to its end here, and returns when the guest was stopped, or was begun to be.
    fn wait_migrated(&mut self) -> Result<SystemTime> {
        let mut stopped = None;
        loop {
            let event = self.monitor.next_event().with_context(|| self.guest.log())?;
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("STOP", _) => stopped = Some(event.time),
                ("MIGRATION", Some("completed")) => return Ok(stopped.unwrap_or(event.time)),
                ("MIGRATION", Some("failed")) => {
                    bail!("the migration failed: {}; {}", self.migration()?, self.guest.log())
                }
                _ => (),
            }
        }
    }

    /// Waits until all memory was copied, and QEMU has looked what was written meanwhile.
    fn wait_copied_once(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.migration()?["ram"]["dirty-sync-count"].as_u64() < Some(2) {
            ensure!(Instant::now() < deadline, "the memory was not copied");
        }
        Ok(())
    }

    /// Sends frames to the guest, and waits until its device has them.
    fn receive_frames(&mut self) -> Result<()> {
        let network = PacketSocket::open(self.tap)?;
        let before = netns::counters(self.tap)?.tx_packets;
        for number in 0..FRAMES {
            network.send(&frames::numbered(number, 1400))?;
        }
        let tap = self.tap;
        self.backend.process.wait_until("the frames were received", |_| {
            let received = netns::counters(tap)?.tx_packets - before;
            Ok((received >= u64::from(FRAMES)).then_some(()))
        })
    }

    fn limit(&mut self, (bandwidth, downtime): Limits) -> Result<()> {
        let limits = json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime });
        self.monitor.execute("migrate-set-parameters", &limits)?;
        Ok(())
    }

    fn migration(&mut self) -> Result<Value> {
        self.monitor.execute("query-migrate", &json!({}))
    }

    /// How often QEMU has looked which pages were written.
    fn rounds(&mut self) -> Result<u64> {
        let migration = self.migration()?;
        let rounds = migration["ram"]["dirty-sync-count"].as_u64();
        rounds.with_context(|| format!("no count of rounds: {migration}"))
    }

    /// Ends a QEMU whose guest does not run, and its back-end.
    fn end(mut self) -> Result<()> {
        self.monitor.execute("quit", &json!({}))?;
        ensure!(self.guest.wait()?.success(), "a QEMU whose guest does not run failed");
        end(self.backend)
    }
}

/// Ends a back-end, which must be well.
fn end(mut backend: Backend) -> Result<()> {
    backend.check_healthy()?;
    backend.process.signal(Signal::SIGTERM)?;
    let status = backend.process.wait()?;
    ensure!(status.success(), "the back-end ended with {status}:\n{}", backend.process.log());
    Ok(())
}

fn read(memory: &File) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(memory.metadata()?.len())?];
    memory.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The addresses at which two guests' memories differ, by page.
///
/// Under KVM one page may: the host writes the wall clock as soon as the target's QEMU has told it where that is.
fn differing_pages(accelerator: Accelerator, a: &File, b: &File) -> Result<Vec<u64>> {
    let length = a.metadata()?.len();
    ensure!(length == b.metadata()?.len() && length > 0, "the guests' memories differ in size");
    let mut clocks = u32::from(accelerator == Accelerator::Kvm);
    let mut chunks = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut differing = Vec::new();
    for start in (0..length).step_by(CHUNK) {
        let size = usize::try_from(length - start)?.min(CHUNK);
        let (a_chunk, b_chunk) = (&mut chunks.0[..size], &mut chunks.1[..size]);
        a.read_exact_at(a_chunk, start)?;
        b.read_exact_at(b_chunk, start)?;
        let pages = a_chunk.chunks(PAGE).zip(b_chunk.chunks(PAGE)).zip((start..).step_by(PAGE));
        for ((a, b), address) in pages.filter(|((a, b), _)| a != b) {
            if a[WALL_CLOCK..] == b[WALL_CLOCK..] && clocks > 0 {
                clocks -= 1;
            } else {
                differing.push(address);
            }
        }
    }
    Ok(differing)
}
