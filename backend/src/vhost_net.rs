//! The kernel's datapath: one vhost-net instance per queue pair moves the frames between a TAP's queue and the vrings
//! (Linux: `drivers/vhost/net.c`).
//!
//! The kernel works in the address space of the process that owns the instance. So while a ring runs, its memory stays
//! mapped and none of its settings change: a change requires a stop, which returns the ring's position, and a start.
//! An instance has an owner, and thus a kernel thread, only during a session or while one is staged.

mod ioctl;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
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
use crate::memory::GuestMemory;
use crate::notify::Notifier;
use crate::tap::TapQueue;
use crate::vring::Vring;

const DEVICE: &str = "/dev/vhost-net";
/// The kernel's limit for memory regions.
const MAX_REGIONS: &str = "/sys/module/vhost/parameters/max_mem_regions";
/// The kernel's default limit.
const USUAL_MAX_REGIONS: usize = 64;
/// The features that the datapath must support. The others concern only the TAP and the guest.
const RING_FEATURES: [u32; 6] = [
    LOG_ALL,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
    VIRTIO_F_IN_ORDER,
];

/// Why vhost-net cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostNetError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}{hint}")]
    Open {
        /// The likely reason, and what to do.
        hint: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Not a vhost-net descriptor.
    #[error("--vhost-fds: descriptor {0} is not an open {DEVICE}")]
    NotVhostNet(RawFd),
    /// Another process owns the instance.
    #[error("--vhost-fds: descriptor {0} has an owner already; open {DEVICE} separately for each back-end")]
    Owned(RawFd),
    /// An ioctl failed.
    #[error("{DEVICE}: {operation} failed")]
    Ioctl {
        /// The ioctl.
        operation: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// One instance of vhost-net, which serves one queue pair.
#[derive(Debug)]
pub struct VhostNet {
    kernel: Kernel,
    /// The features that the kernel supports.
    features: Features,
    owned: bool,
    /// Memory and log that the kernel accesses while a ring runs.
    mapped: Option<(Arc<GuestMemory>, Option<Arc<DirtyLog>>)>,
    running: [bool; 2],
    /// Rings whose settings the kernel has, except for their position.
    prepared: [bool; 2],
}

/// What the kernel needs to start a ring, besides the ring itself.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// The features that the front-end acknowledged.
    pub features: Features,
    /// The TAP's queue.
    pub tap: &'a TapQueue,
    /// The driver's kick.
    pub kick: &'a Notifier,
    /// Signalled when the ring fails.
    pub error: Option<&'a Notifier>,
    /// How long to busy-poll before sleeping.
    pub poll: Duration,
}

impl VhostNet {
    /// Opens an instance.
    ///
    /// # Errors
    /// Returns [`VhostNetError::Open`] if the device cannot be opened, or [`VhostNetError::Ioctl`] if its features
    /// cannot be read.
    pub fn open() -> Result<Self, VhostNetError> {
        Self::from_file(open()?)
    }

    /// Wraps an instance that another process opened for this one.
    ///
    /// # Errors
    /// Returns [`VhostNetError::Ioctl`] if `fd` is not a vhost device.
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

    /// Uses descriptors that the parent process opened, one per queue pair.
    ///
    /// # Errors
    /// Returns a [`VhostNetError`] if a descriptor is not an unowned vhost-net instance.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>, VhostNetError> {
        let mut instances = Vec::new();
        for owned in fds {
            let fd = owned.as_raw_fd();
            let kernel = Kernel::from(File::from(owned));
            // vhost-net is the only vhost device with mergeable buffers.
            let features = kernel
                .get_features()
                .ok()
                .filter(|features| features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0)
                .ok_or(VhostNetError::NotVhostNet(fd))?;
            let mut instance = Self::new(kernel, features);
            // Find out now, rather than when the first ring starts, whether the instance has an owner.
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

    /// Returns `offer` without the features that the kernel does not support.
    #[must_use]
    pub fn masked(&self, offer: Features) -> Features {
        let lacking = RING_FEATURES.into_iter().filter(|bit| !self.features.has(*bit));
        lacking.fold(offer, Features::without)
    }

    /// Returns whether the kernel has the ring of `side`.
    pub fn runs(&self, side: Side) -> bool {
        self.running[slot(side)]
    }

    /// Hands a ring to the kernel, which continues at its next available index. The ring must not be running.
    ///
    /// # Errors
    /// Returns the kernel's error if it refuses the ring, which then does not run.
    pub fn start(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        let result = self.try_start(side, vring, start);
        self.running[slot(side)] = result.is_ok();
        if result.is_err() {
            // The kernel may have some of its eventfds already.
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

    /// Gives the kernel all settings of a ring except for its position, so that [`Self::start`] with the same arguments
    /// is fast. The kernel does not touch the ring until then.
    ///
    /// # Errors
    /// Returns the kernel's error if it refuses a setting.
    pub fn prepare(&mut self, side: Side, vring: &Vring, start: &Start<'_>) -> io::Result<()> {
        let result = self.describe(side, vring, start);
        self.prepared[slot(side)] = result.is_ok();
        if result.is_err() {
            self.forget(side);
        }
        result
    }

    /// Discards the settings of [`Self::prepare`], because the ring changes.
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

    /// Sets what both rings share. If one ring runs or is prepared, the settings are right already: a change of them
    /// stops both rings.
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
            // Without a log the kernel would write to the address of the last one.
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

    /// Takes a ring back, and returns its next available index. All buffers before that are used. The kernel keeps none
    /// of the ring's eventfds.
    ///
    /// # Errors
    /// Returns the kernel's error. The kernel may still use the ring then.
    pub fn stop(&mut self, side: Side) -> io::Result<u16> {
        self.kernel.set_backend(number(side), None)?;
        self.running[slot(side)] = false;
        let base = self.kernel.get_vring_base(slot(side)).map_err(io_error)?;
        self.forget(side);
        // A split ring's index has 16 bits.
        u16::try_from(base).map_err(io::Error::other)
    }

    /// Disconnects the eventfds of a ring that does not run, and drops the memory if no ring needs it.
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

    /// Gives up the ownership of the instance, which ends the kernel's thread and resets all settings. No ring may run.
    ///
    /// # Errors
    /// Returns the kernel's error if it refuses.
    pub fn release(&mut self) -> io::Result<()> {
        [Side::Rx, Side::Tx].into_iter().for_each(|side| self.unprepare(side));
        if self.owned {
            self.kernel.reset_owner().map_err(io_error)?;
            self.owned = false;
        }
        Ok(())
    }
}

/// Opens the device without becoming the owner of the instance: this process or another one may use it.
///
/// # Errors
/// Returns [`VhostNetError::Open`] if the device cannot be opened.
pub fn open() -> Result<File, VhostNetError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(DEVICE).map_err(|source| {
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                ": device does not exist; load the module vhost_net, or run without --vhost"
            }
            io::ErrorKind::PermissionDenied => {
                ": not permitted; run as a user with access to it, or pass open descriptors with --vhost-fds"
            }
            _ => "",
        };
        VhostNetError::Open { hint, source }
    })
}

/// Returns how many memory regions the kernel accepts.
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

/// Returns the kernel's number of a ring. As in virtio, receive is 0.
fn number(side: Side) -> u32 {
    match side {
        Side::Rx => 0,
        Side::Tx => 1,
    }
}
