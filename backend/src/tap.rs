//! The TAP: one file per queue pair, offloads and header size (Linux: `Documentation/networking/tuntap.rst`).
//!
//! Baton sets no address and no link state, and a TAP that it creates disappears with its last holder. Offloads and
//! header size belong to the device, and `O_NONBLOCK` to the open file, so a change affects every process that shares
//! them. A macvtap has a header size per queue (Linux: `drivers/net/tap.c`), so settings are made on all its queues.
#![expect(unsafe_code, reason = "TAP ioctls, and reads and writes through I/O vectors")]

use std::fs::File;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;

pub mod adopted;
pub mod batch;
mod error;
mod interface;
mod ioctl;
mod offloads;
mod open;
mod queue;
mod shared;

pub use error::TapError;
pub use offloads::Offloads;
pub use queue::{Received, Sent, TapQueue};

/// The largest frame that a TAP delivers, header excluded: 64 KiB of IP, an Ethernet header, a VLAN tag.
pub const MAX_FRAME: usize = 65535 + 14 + 4;

/// The smallest usable send buffer. The kernel reports room when less than half of the buffer is in use, and counts two
/// bytes as in use at that moment (`sock_wfree`, `sock_writeable`). With a smaller buffer it never reports room.
pub const SMALLEST_SNDBUF: u32 = 6;

/// A TAP with all its queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Arc<TapQueue>>,
    attached: Vec<bool>,
    multi_queue: bool,
    ufo: bool,
    uso: bool,
    offloads: Option<Offloads>,
    header_size: Option<usize>,
    /// This process has attached to the TAP by name, so there are no filters of an opener to preserve.
    filters_are_ours: bool,
    shared: Option<shared::Shared>,
}

impl Tap {
    fn from_queues(
        name: String,
        files: Vec<File>,
        multi_queue: bool,
        attached: Vec<bool>,
    ) -> Result<Self, TapError> {
        let queues = files.into_iter().map(|file| Arc::new(TapQueue::new(file))).collect();
        let mut tap = Self {
            name,
            queues,
            attached,
            multi_queue,
            ufo: false,
            uso: false,
            offloads: None,
            header_size: None,
            filters_are_ours: false,
            shared: None,
        };
        tap.ufo = tap.set_offloads(Offloads::CSUM.and(Offloads::UFO)).is_ok();
        let uso = Offloads::CSUM.and(Offloads::TSO4).and(Offloads::TSO6).and(Offloads::USO);
        tap.uso = tap.set_offloads(uso).is_ok();
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Returns whether the queue of `pair` is attached: the kernel delivers frames to it.
    pub fn is_attached(&self, pair: usize) -> bool {
        self.attached[pair]
    }

    /// Returns the length of the virtio-net header, if it was set.
    pub fn header_size(&self) -> Option<usize> {
        self.header_size
    }

    /// Returns the interface's current name, or its initial name if it was deleted. An interface may be renamed while
    /// it is in use.
    pub fn name(&self) -> String {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF fills an ifreq.
        match unsafe { ioctl::get_iff(self.queues[0].file.as_raw_fd(), &raw mut request) } {
            Ok(_) => interface_name(&request),
            Err(_) => self.name.clone(),
        }
    }

    /// Returns the interface's MTU, if the interface is in this network namespace.
    pub fn mtu(&self) -> Option<i32> {
        interface::mtu(&self.queues[0].file, &self.name())
    }

    /// Returns the queue of pair `pair`.
    pub fn queue(&self, pair: usize) -> &Arc<TapQueue> {
        &self.queues[pair]
    }

    /// Returns the number of queues.
    pub fn pairs(&self) -> usize {
        self.queues.len()
    }

    /// Returns whether this kernel's TAP supports UDP fragmentation offload.
    pub fn has_ufo(&self) -> bool {
        self.ufo
    }

    /// Returns whether this kernel's TAP supports UDP segmentation offload.
    pub fn has_uso(&self) -> bool {
        self.uso
    }

    /// Records the settings that another process has made.
    pub fn settled(&mut self, header_size: usize, offloads: Offloads) {
        self.header_size = Some(header_size);
        self.offloads = Some(offloads);
    }

    /// Restores the settings, since another process that shares the descriptors may have changed them; the send buffer
    /// only if `sndbuf` is given. Tries every setting, even after an error.
    ///
    /// # Errors
    /// Returns the first [`TapError`].
    pub fn restore(&mut self, sndbuf: Option<u32>) -> Result<(), TapError> {
        // Attach queues first: a detached queue does not get the device's send buffer.
        let queues = self.restore_attached();
        let header = self.header_size.take().map_or(Ok(()), |size| self.set_header_size(size));
        let offloads = self.offloads.take().map_or(Ok(()), |offloads| self.set_offloads(offloads));
        let sndbuf = sndbuf.map_or(Ok(()), |bytes| self.set_sndbuf(bytes));
        if self.filters_are_ours {
            open::drop_filters(&self.queues[0].file);
        }
        queues.and(header).and(offloads).and(sndbuf).and(self.restore_shared())
    }

    fn restore_attached(&self) -> Result<(), TapError> {
        for (queue, &attached) in self.queues.iter().zip(&self.attached).filter(|_| self.multi_queue) {
            // A macvtap does not report whether a queue is attached, so always set its state.
            if queue.macvtap || queue.is_attached().is_ok_and(|is| is != attached) {
                queue.set_attached(attached).map_err(|source| TapError::Ioctl {
                    name: self.name.clone(),
                    operation: "TUNSETQUEUE",
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Sets the offloads that the guest accepts (`TUNSETOFFLOAD`).
    ///
    /// # Errors
    /// Returns [`TapError::Ioctl`] if the kernel refuses them, as it does for offloads that it does not know.
    pub fn set_offloads(&mut self, offloads: Offloads) -> Result<(), TapError> {
        if self.offloads == Some(offloads) {
            return Ok(());
        }
        let value = libc::c_int::try_from(offloads.0).unwrap_or_default();
        for queue in self.settable() {
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            unsafe { ioctl::set_offload(queue.file.as_raw_fd(), value) }
                .map_err(|errno| self.failed("TUNSETOFFLOAD", errno))?;
        }
        self.offloads = Some(offloads);
        Ok(())
    }

    /// Sets the length of the virtio-net header before each frame, 10 or 12 bytes (`TUNSETVNETHDRSZ`).
    ///
    /// # Errors
    /// Returns [`TapError::Ioctl`] if the kernel refuses it, or [`TapError::HeaderSize`] if a queue has another length.
    pub fn set_header_size(&mut self, size: usize) -> Result<(), TapError> {
        if self.header_size == Some(size) {
            return Ok(());
        }
        let value = libc::c_int::try_from(size).unwrap_or_default();
        for queue in self.settable() {
            // SAFETY: TUNSETVNETHDRSZ reads an int.
            unsafe { ioctl::set_vnet_hdr_size(queue.file.as_raw_fd(), &raw const value) }
                .map_err(|errno| self.failed("TUNSETVNETHDRSZ", errno))?;
        }
        // A queue with another size would shift every byte of every frame.
        for (pair, queue) in self.queues.iter().enumerate() {
            let is = queue.header_size().map_err(|errno| self.failed("TUNGETVNETHDRSZ", errno))?;
            if is != value {
                return Err(TapError::HeaderSize { name: self.name.clone(), pair, is, wanted: value });
            }
        }
        self.header_size = Some(size);
        Ok(())
    }

    /// Limits how many bytes may be on their way into the network (`TUNSETSNDBUF`); 0 is no limit.
    ///
    /// # Errors
    /// Returns [`TapError::Ioctl`] if the ioctl fails.
    pub fn set_sndbuf(&self, bytes: u32) -> Result<(), TapError> {
        let bytes = i32::try_from(bytes).ok().filter(|bytes| *bytes != 0).unwrap_or(i32::MAX);
        for queue in &self.queues {
            // SAFETY: TUNSETSNDBUF reads an int.
            unsafe { ioctl::set_sndbuf(queue.file.as_raw_fd(), &raw const bytes) }
                .map_err(|errno| self.failed("TUNSETSNDBUF", errno))?;
        }
        Ok(())
    }

    /// Checks that no queue has a send buffer that would stay full for ever once it is full ([`SMALLEST_SNDBUF`]).
    ///
    /// # Errors
    /// Returns [`TapError::Sndbuf`] if one has, or [`TapError::Ioctl`] if the size cannot be read.
    pub fn check_sndbuf(&self) -> Result<(), TapError> {
        // A macvtap does not report the size.
        for (pair, queue) in self.queues.iter().enumerate().filter(|(_, queue)| !queue.macvtap) {
            let mut bytes: libc::c_int = 0;
            // SAFETY: TUNGETSNDBUF fills an int.
            unsafe { ioctl::get_sndbuf(queue.file.as_raw_fd(), &raw mut bytes) }
                .map_err(|errno| self.failed("TUNGETSNDBUF", errno))?;
            if bytes.unsigned_abs() < SMALLEST_SNDBUF {
                return Err(TapError::Sndbuf { name: self.name.clone(), pair, bytes });
            }
        }
        Ok(())
    }

    /// Attaches or detaches the queue of `pair` (`TUNSETQUEUE`): the kernel delivers frames to attached queues only.
    /// Detaching drops the frames in the queue. Never detaches pair 0 or the queue of a single-queue TAP.
    ///
    /// # Errors
    /// Returns [`TapError::Ioctl`] if the ioctl fails.
    pub fn set_attached(&mut self, pair: usize, attached: bool) -> Result<(), TapError> {
        let keep = pair == 0 && !attached;
        if self.attached[pair] == attached || keep || !self.multi_queue {
            return Ok(());
        }
        self.queues[pair].set_attached(attached).map_err(|source| TapError::Ioctl {
            name: self.name.clone(),
            operation: "TUNSETQUEUE",
            source,
        })?;
        self.attached[pair] = attached;
        Ok(())
    }

    /// Returns the queues on which to make a setting for it to apply to all queues.
    fn settable(&self) -> &[Arc<TapQueue>] {
        let per_queue = self.queues.iter().any(|queue| queue.macvtap);
        if per_queue { &self.queues } else { &self.queues[..1] }
    }

    fn failed(&self, operation: &'static str, errno: Errno) -> TapError {
        TapError::Ioctl { name: self.name.clone(), operation, source: errno.into() }
    }
}

/// Returns whether a file belongs to a macvtap or an ipvtap: their driver does not support TUNs, that of TAPs does.
fn is_macvtap(file: &impl AsRawFd) -> bool {
    let mut features: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES fills an int; any other file answers ENOTTY or the like.
    let result = unsafe { ioctl::get_features(file.as_raw_fd(), &raw mut features) };
    result.is_ok() && features & libc::IFF_TUN.cast_unsigned() == 0
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is plain data for which zeroes are valid.
    unsafe { mem::zeroed() }
}

/// Converts `IFF_*` flags to the 16 bits that an ifreq holds.
fn flags_word(flags: libc::c_int) -> libc::c_short {
    u16::try_from(flags).unwrap_or_default().cast_signed()
}

fn set_name(request: &mut libc::ifreq, name: &str) {
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|c| c.cast_unsigned()).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
