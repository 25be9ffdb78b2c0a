//! The kernel's datapath: one vhost-net instance a queue pair, which moves the frames between a TAP's queue and the
//! vrings by itself (Linux: `drivers/vhost/net.c`).
//!
//! The kernel works in the address space of the process that owns the instance. So while a ring runs, the memory it
//! was told of stays mapped, and nothing about it changes: whoever wants a change stops the ring first, which gives
//! its place back, and starts it anew. An instance has an owner, and with it a kernel thread, only during a session.

mod ioctl;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use baton_control::limited;
use vhost::VhostBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_VRING_F_LOG, vhost_vring_addr};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::ioctl::{Kernel, Wire, io_error};
use crate::dataplane::ring::Side;
use crate::dirty_log::DirtyLog;
use crate::features::{Features, LOG_ALL};
use crate::inherited::claim;
use crate::memory::GuestMemory;
use crate::notify::Notifier;
use crate::tap::TapQueue;
use crate::vring::Vring;

const DEVICE: &str = "/dev/vhost-net";
/// Where the kernel says how many memory regions it takes.
const MAX_REGIONS: &str = "/sys/module/vhost/parameters/max_mem_regions";
/// What it takes unless it says otherwise.
const USUAL_MAX_REGIONS: usize = 64;
/// The features that whoever moves the frames must know of; the TAP and the guest settle the others.
const RING_FEATURES: [u32; 6] = [
    LOG_ALL,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
    VIRTIO_F_IN_ORDER,
];

/// Why there is no vhost-net.
#[derive(Debug, thiserror::Error)]
pub enum VhostNetError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}{hint}")]
    Open {
        /// What to do.
        hint: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Not open, given twice, or one of the standard three.
    #[error("--vhost-fds: descriptor {0} is not open, or was given twice")]
    NotOpen(RawFd),
    /// Something else.
    #[error("--vhost-fds: descriptor {0} is not an open {DEVICE}")]
    NotVhostNet(RawFd),
    /// Somebody has made it his.
    #[error("--vhost-fds: descriptor {0} has an owner already; open {DEVICE} anew for each back-end")]
    Owned(RawFd),
    /// It cannot be asked.
    #[error("{DEVICE}: {operation} failed")]
    Ioctl {
        /// Which request.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// One instance of vhost-net: a queue pair of the kernel's.
#[derive(Debug)]
pub struct VhostNet {
    kernel: Kernel,
    /// What the kernel can do.
    features: Features,
    owned: bool,
    /// What the kernel reads and writes while a ring runs.
    mapped: Option<(Arc<GuestMemory>, Option<Arc<DirtyLog>>)>,
    running: [bool; 2],
    /// Rings that the kernel has been told of, but for where they are.
    prepared: [bool; 2],
}

/// What a ring is started with, beside the ring itself.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// What the front-end acknowledged.
    pub features: Features,
    /// The TAP's queue.
    pub tap: &'a TapQueue,
    /// The driver's notifications.
    pub kick: &'a Notifier,
    /// Where errors of the driver's are told.
    pub error: Option<&'a Notifier>,
    /// How long to look for work before waiting for it.
    pub poll: Duration,
}

impl VhostNet {
    /// Opens an instance.
    ///
    /// # Errors
    /// [`VhostNetError::Open`], [`VhostNetError::Ioctl`].
    pub fn open() -> Result<Self, VhostNetError> {
        Self::from_file(open()?)
    }

    /// An instance that another process opened for this one.
    ///
    /// # Errors
    /// [`VhostNetError::Ioctl`] where it is none.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, VhostNetError> {
        Self::from_file(File::from(fd))
    }

    fn from_file(file: File) -> Result<Self, VhostNetError> {
        let kernel = Kernel::from(file);
        let features = kernel.get_features().map_err(|error| VhostNetError::Ioctl {
            operation: "VHOST_GET_FEATURES",
            source: io_error(error),
        })?;
        Ok(Self::new(kernel, features))
    }

    /// Takes over the descriptors that the parent process opened, one a queue pair.
    ///
    /// # Errors
    /// [`VhostNetError`], naming the descriptor.
    pub fn from_fds(fds: &[RawFd]) -> Result<Vec<Self>, VhostNetError> {
        let mut instances = Vec::new();
        for (position, &fd) in fds.iter().enumerate() {
            let twice = fds[..position].contains(&fd);
            let owned = if twice { None } else { claim(fd) }.ok_or(VhostNetError::NotOpen(fd))?;
            let kernel = Kernel::from(File::from(owned));
            // Of the vhost devices only this one has mergeable buffers.
            let features = kernel
                .get_features()
                .ok()
                .filter(|features| features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0)
                .ok_or(VhostNetError::NotVhostNet(fd))?;
            let mut instance = Self::new(kernel, features);
            // Now rather than when the first ring starts.
            instance.own().map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => VhostNetError::Owned(fd),
                _ => VhostNetError::Ioctl { operation: "VHOST_SET_OWNER", source },
            })?;
            instance
                .release()
                .map_err(|source| VhostNetError::Ioctl { operation: "VHOST_RESET_OWNER", source })?;
            instances.push(instance);
        }
        Ok(instances)
    }

    fn new(kernel: Kernel, features: u64) -> Self {
        Self {
            kernel,
            features: Features(features),
            owned: false,
            mapped: None,
            running: [false; 2],
            prepared: [false; 2],
        }
    }

    /// What of `offer` can be offered if the kernel moves the frames.
    #[must_use]
    pub fn masked(&self, offer: Features) -> Features {
        let lacking = RING_FEATURES.into_iter().filter(|bit| !self.features.has(*bit));
        lacking.fold(offer, Features::without)
    }

    /// Whether the kernel has the ring of `side`.
    pub fn runs(&self, side: Side) -> bool {
        self.running[slot(side)]
    }

    /// Gives a ring to the kernel, from its next available buffer on. It must not be running.
    ///
    /// # Errors
    /// The kernel's. The ring does not run then.
    pub fn start(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        let result = self.try_start(side, vring, start);
        self.running[slot(side)] = result.is_ok();
        if result.is_err() {
            // What it has already.
            self.forget(side);
        }
        result
    }

    fn try_start(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        if !std::mem::take(&mut self.prepared[slot(side)]) {
            self.describe(side, vring, start)?;
        }
        self.kernel.set_vring_base(slot(side), vring.next_available()).map_err(io_error)?;
        self.kernel.set_backend(number(side), Some(start.tap.as_fd()))
    }

    /// Tells the kernel all of a ring but where it is, so that [`Self::start`] with the same takes no time. The kernel
    /// touches nothing meanwhile.
    ///
    /// # Errors
    /// The kernel's.
    pub fn prepare(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        let result = self.describe(side, vring, start);
        self.prepared[slot(side)] = result.is_ok();
        if result.is_err() {
            self.forget(side);
        }
        result
    }

    /// The ring of [`Self::prepare`] is not as it was.
    pub fn unprepare(&mut self, side: Side) {
        if self.prepared[slot(side)] {
            self.forget(side);
        }
    }

    fn describe(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        let log = vring.log();
        self.configure(start.features, vring.shared_memory(), log.map(|log| &log.log))?;
        let ring = number(side);
        let index = slot(side);
        self.kernel.set_vring_num(index, vring.size()).map_err(io_error)?;
        let [descriptors, available, used] = vring.host_addresses();
        let used_logged_at = log.and_then(|log| log.covered_used_ring(vring.used_length()));
        self.kernel.set_addresses(&vhost_vring_addr {
            index: ring,
            flags: if used_logged_at.is_some() { 1 << VHOST_VRING_F_LOG } else { 0 },
            log_guest_addr: used_logged_at.unwrap_or_default(),
            desc_user_addr: descriptors,
            avail_user_addr: available,
            used_user_addr: used,
        })?;
        self.kernel.connect(ring, Wire::Error, start.error.map(AsFd::as_fd))?;
        self.kernel.connect(ring, Wire::Call, vring.call().map(AsFd::as_fd))?;
        self.kernel.connect(ring, Wire::Kick, Some(start.kick.as_fd()))?;
        self.kernel.set_busy_loop(ring, u32::try_from(start.poll.as_micros()).unwrap_or(u32::MAX))
    }

    /// What both rings share. While one of them runs it is as the other needs it: a change stops both.
    fn configure(
        &mut self,
        features: Features,
        memory: &Arc<GuestMemory>,
        log: Option<&Arc<DirtyLog>>,
    ) -> io::Result<()> {
        if self.running.contains(&true) || self.prepared.contains(&true) {
            return Ok(());
        }
        self.own()?;
        self.mapped = Some((Arc::clone(memory), log.cloned()));
        let regions: Vec<_> = memory.vhost_regions().collect();
        self.kernel.set_mem_table(&regions).map_err(io_error)?;
        let mut features = Features(features.0 & self.features.0);
        match log {
            Some(log) => {
                self.kernel.set_log_base(log.start() as usize as u64, None).map_err(io_error)?;
            }
            // Without a log the kernel would write to wherever the last one was.
            None => features = features.without(LOG_ALL),
        }
        self.kernel.set_features(features.0).map_err(io_error)
    }

    fn own(&mut self) -> io::Result<()> {
        if !self.owned {
            self.kernel.set_owner().map_err(io_error)?;
            self.owned = true;
        }
        Ok(())
    }

    /// Takes a ring back: gives the available index of the next buffer, all before it being used. From then on the
    /// kernel has none of its descriptors.
    ///
    /// # Errors
    /// The kernel's; it cannot be said then who has the ring.
    pub fn stop(&mut self, side: Side) -> io::Result<u16> {
        self.kernel.set_backend(number(side), None)?;
        self.running[slot(side)] = false;
        let base = self.kernel.get_vring_base(slot(side)).map_err(io_error)?;
        self.forget(side);
        // A split ring's index has 16 bits.
        u16::try_from(base).map_err(io::Error::other)
    }

    /// Takes from the kernel what it had for a ring that does not run.
    fn forget(&mut self, side: Side) {
        self.prepared[slot(side)] = false;
        for wire in [Wire::Kick, Wire::Call, Wire::Error] {
            if let Err(error) = self.kernel.connect(number(side), wire, None) {
                limited!(warn, ?side, ?wire, %error, "vhost-net keeps an eventfd");
            }
        }
        if !self.running.contains(&true) && !self.prepared.contains(&true) {
            self.mapped = None;
        }
    }

    /// Gives the instance up, and with it the kernel's thread and all that it was told. No ring may run.
    ///
    /// # Errors
    /// The kernel's.
    pub fn release(&mut self) -> io::Result<()> {
        [Side::Rx, Side::Tx].into_iter().for_each(|side| self.unprepare(side));
        if self.owned {
            self.kernel.reset_owner().map_err(io_error)?;
            self.owned = false;
        }
        Ok(())
    }
}

/// Opens the device, in nobody's use: for this process, or for another one.
///
/// # Errors
/// [`VhostNetError::Open`].
pub fn open() -> Result<File, VhostNetError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(DEVICE).map_err(|source| {
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                ": this kernel has none loaded; load the module vhost_net, or run without --vhost"
            }
            io::ErrorKind::PermissionDenied => {
                ": not permitted; run as a user who may open it, or have --vhost-fds opened by one who may"
            }
            _ => "",
        };
        VhostNetError::Open { hint, source }
    })
}

/// How many memory regions the kernel takes.
pub fn max_regions() -> usize {
    let said = std::fs::read_to_string(MAX_REGIONS).ok().and_then(|text| text.trim().parse().ok());
    said.unwrap_or(USUAL_MAX_REGIONS).min(vhost::VHOST_MAX_MEMORY_REGIONS)
}

fn slot(side: Side) -> usize {
    match side {
        Side::Rx => 0,
        Side::Tx => 1,
    }
}

/// The kernel's number of a ring: as in virtio, receive is 0.
fn number(side: Side) -> u32 {
    match side {
        Side::Rx => 0,
        Side::Tx => 1,
    }
}
