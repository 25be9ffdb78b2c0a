//! Migrates a guest from one QEMU, back-end and TAP to another of each, copying its memory.
//!
//! The host's address is on a bridge, and the guest's current TAP is a port of the bridge. [`Mover`] switches the
//! bridge to the next TAP. Each place has a new back-end: frames that are left in a TAP when the guest leaves are
//! dropped with that back-end, and not delivered when the guest comes back.

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

/// The bridge and its MAC address, which does not depend on its ports.
const BRIDGE: (&str, &str) = ("br0", "02:ba:70:00:00:01");

/// The TAPs, between which the guest alternates.
pub(crate) const TAPS: [&str; 2] = ["tap0", "tap1"];

/// The queue length of a TAP: enough for all frames that are sent while a guest moves.
const QUEUE: &str = "10000";

/// The guest's memory: 128 MiB less 8 KiB. If the size is a multiple of 256 KiB, QEMU before 9.0 takes a shortcut
/// through its dirty bitmap, on which it does not make emulated processors log their further writes.
const MEMORY: &str = "131064K";

/// The size of the pages that QEMU copies.
const PAGE: usize = 4096;

/// How much memory to read at once for a comparison.
const CHUNK: usize = 256 * PAGE;

/// The size of KVM's wall clock (`pvclock_wall_clock`), which Linux places at the start of a page.
const WALL_CLOCK: usize = 12;

/// The bandwidth limit (`max-bandwidth`, bytes a second) and the downtime limit (`downtime-limit`, ms).
type Limits = (u64, u64);

/// At first: the guest keeps running, because one copy of its memory takes a minute.
const SLOW: Limits = (1 << 20, 1);

/// Then: after the first copy QEMU looks for pages written meanwhile. The downtime limit allows it to stop any guest.
const CONVERGENT: Limits = (100 << 30, 5000);

/// Or: after the first copy QEMU stops the guest before it looks for written pages.
const AT_ONCE: Limits = (100 << 30, 0);

/// Until the end of the first copy.
const FAST: Limits = (16 << 20, 1);

/// Then: one page a second.
const CRAWLING: Limits = (PAGE as u64, 1);

/// How many frames to send while the guest's driver gets no interrupts: fewer than it has buffers for.
const FRAMES: u32 = 200;

/// The address on which `traffic serve` listens in the guest.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(GUEST), PORT);

/// The kind of guest that moves.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What moves its frames.
    pub datapath: Datapath,
    /// What executes its instructions.
    pub accelerator: Accelerator,
    /// How many queue pairs its network device has.
    pub queue_pairs: u16,
}

/// A guest with its network, which can move from place to place.
#[derive(Debug)]
pub struct Mover {
    kind: Kind,
    stay: Stay,
    stays: usize,
    _netns: Netns,
}

/// A place for the guest: a QEMU, a back-end and a TAP.
#[derive(Debug)]
struct Stay {
    guest: Guest,
    monitor: Qmp,
    backend: Backend,
    tap: &'static str,
}

/// The result of a move.
#[derive(Clone, Debug)]
pub struct Switch {
    /// When the guest was stopped at the source.
    pub stopped: SystemTime,
    /// When the guest was resumed at the target.
    pub running: SystemTime,
    /// How many frames the back-end read from the TAP while the guest's memory was copied.
    pub frames: u64,
    /// How often QEMU has synchronised its dirty bitmap.
    pub rounds: u64,
}

/// Creates a network namespace with the host's address on a bridge, and [`TAPS`], one for each of two places.
///
/// # Errors
/// Returns an error if the namespace, the bridge or a TAP cannot be set up.
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

/// Adds a TAP to the bridge.
pub(crate) fn plug(tap: &str) -> Result<()> {
    ip(&["link", "set", tap, "master", BRIDGE.0])
}

/// Removes a TAP from the bridge.
pub(crate) fn unplug(tap: &str) -> Result<()> {
    ip(&["link", "set", tap, "nomaster"])
}

impl Mover {
    /// Sets up the network and boots a guest at the first place.
    ///
    /// # Errors
    /// Returns an error if the network or the first place cannot be set up, or the guest does not boot.
    pub fn new(kind: Kind) -> Result<Self> {
        let netns = network(kind.queue_pairs)?;
        let mut stay = Stay::new(kind, 0, |qemu| qemu)?;
        plug(stay.tap)?;
        stay.guest.wait_for_shell()?;
        link::bring_up(&mut stay.guest, kind.queue_pairs)?;
        Ok(Self { kind, stay, stays: 1, _netns: netns })
    }

    /// The guest at its current place.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.stay.guest
    }

    /// Moves the guest to another QEMU, back-end and TAP, and ends those that it left. The guest keeps running at the
    /// source at least until `meanwhile` returns.
    ///
    /// # Errors
    /// Returns an error if the migration fails, or the guest's memory differs between source and target before the
    /// guest is resumed.
    pub fn go(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<Switch> {
        let limits = match self.kind.accelerator {
            Accelerator::Kvm => CONVERGENT,
            // With emulated processors, QEMU may miss writes if it looks for them while the guest runs.
            Accelerator::Tcg => AT_ONCE,
        };
        let frames = netns::counters(self.stay.tap)?.tx_packets;
        let (mut target, stopped) = self.copy(limits, |_| meanwhile())?;
        let frames = netns::counters(self.stay.tap)?.tx_packets - frames;
        let (source, copy) = (self.stay.guest.memory()?, target.guest.memory()?);
        let differing = differing_pages(self.kind.accelerator, &source, &copy)?;
        ensure!(differing.is_empty(), "{} pages differ after the copy: {differing:x?}", differing.len());

        // Adds the new port first: frames for the guest wait there until it runs.
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

    /// Checks that the back-end logs its writes. After all memory of the guest was copied once, sends frames to its
    /// device while its driver gets no interrupts: QEMU copies the changed pages again only if the back-end has logged
    /// them.
    ///
    /// # Errors
    /// Returns an error if the migration fails, or a frame is missing in the copy.
    pub fn check_log(&mut self) -> Result<()> {
        // Keeps some memory dirty: otherwise QEMU would complete the migration by itself.
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
        ensure!(with_frames > 50, "only {with_frames} pages contain frames");
        ensure!(lost == 0, "{lost} of {with_frames} pages that contain frames were not copied again");
        target.end()?;
        self.stay.backend.check_healthy()
    }

    /// Copies the guest's memory to another place, where the guest does not run yet. Sets `limits` after `meanwhile`
    /// returns, so that the migration completes. Returns the place, and the time when the guest was stopped.
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

    /// Status, counters and logs, for the message of a failed test.
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

    /// Switches the guest off and ends the back-end.
    ///
    /// # Errors
    /// Returns an error if QEMU or the back-end fails.
    pub fn end(self) -> Result<()> {
        let Stay { guest, backend, .. } = self.stay;
        ensure!(guest.power_off()?.success(), "QEMU failed");
        end(backend)
    }
}

impl Stay {
    /// Starts a back-end on the TAP whose turn it is, and a QEMU that connects to it.
    fn new(kind: Kind, number: usize, how: impl FnOnce(Qemu) -> Qemu) -> Result<Self> {
        let Kind { datapath, accelerator, queue_pairs } = kind;
        let tap = TAPS[number % TAPS.len()];
        let arguments =
            [format!("--tap={tap}"), format!("--queue-pairs={queue_pairs}"), "--log-level=debug".to_owned()];
        let mut backend = Backend::listening(datapath, &arguments.each_ref().map(String::as_str), &[])?;
        backend.status()?;
        // A bridge sends nothing to a port without a carrier, which the back-end sets.
        netns::wait_running(tap)?;
        let socket = backend.socket.to_str().context("socket path is not UTF-8")?;
        let qemu = Qemu::new(accelerator, queue_pairs, MEMORY)?;
        let qemu = how(qemu.vhost_user("net0", socket, Meeting::BackendListens, MAC, queue_pairs));
        let (guest, monitor) = qemu.start_with_monitor(&format!("guest-{number}"))?;
        Ok(Self { guest, monitor, backend, tap })
    }

    /// Waits until a migration completes at this QEMU. Returns when the guest was stopped, or, without such an event,
    /// when the migration completed.
    fn wait_migrated(&mut self) -> Result<SystemTime> {
        let mut stopped = None;
        loop {
            let event = self.monitor.next_event().with_context(|| self.guest.log())?;
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("STOP", _) => stopped = Some(event.time),
                ("MIGRATION", Some("completed")) => return Ok(stopped.unwrap_or(event.time)),
                ("MIGRATION", Some("failed")) => {
                    bail!("the migration failed: {}; log:\n{}", self.migration()?, self.guest.log())
                }
                _ => (),
            }
        }
    }

    /// Waits until QEMU has copied all memory and looked for pages written meanwhile.
    fn wait_copied_once(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.migration()?["ram"]["dirty-sync-count"].as_u64() < Some(2) {
            ensure!(Instant::now() < deadline, "QEMU did not copy the memory");
        }
        Ok(())
    }

    /// Sends frames to the guest and waits until its device has received them.
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

    /// How often QEMU has synchronised its dirty bitmap.
    fn rounds(&mut self) -> Result<u64> {
        let migration = self.migration()?;
        let rounds = migration["ram"]["dirty-sync-count"].as_u64();
        rounds.with_context(|| format!("no dirty-sync-count: {migration}"))
    }

    /// Ends a QEMU whose guest does not run, and its back-end.
    fn end(mut self) -> Result<()> {
        self.monitor.execute("quit", &json!({}))?;
        ensure!(self.guest.wait()?.success(), "a QEMU whose guest does not run failed");
        end(self.backend)
    }
}

/// Ends a back-end, which must be healthy.
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

/// Returns the addresses of the pages in which the memories of two guests differ.
///
/// With KVM the page of the wall clock may differ: the host writes the clock as soon as the target's QEMU sets its
/// address.
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
