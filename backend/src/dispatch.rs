//! Applies the front-end's messages to the device: the `vhost` crate's request handler calls one method per message.
//!
//! A method that rejects a message has changed nothing. A method that fails with an error of the device
//! ([`Rejection::Device`]) may have changed a part, and the session cannot continue. After the method, the crate sends
//! the acknowledgement, positive or negative, if the front-end asked for one. [`Dispatch::take_rejection`] tells the
//! session that an error came from a method and not from the crate: the stream of messages is intact.

mod rejection;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

use crate::config_space;
use crate::dataplane::ring::Kick;
use crate::device::{Device, SessionState};
use crate::dirty_log::DirtyLog;
use crate::features::{Features, PROTOCOL_FEATURES, protocol_offer};
use crate::handover::error::DeviceStateError;
use crate::inflight::{self, InflightRegion};
use crate::memory::{GuestMemory, RegionLayout};
use crate::notify::Notifier;
use crate::shared::{Backend, SharedBackend};
use crate::vring::{self, LayoutError, RingAddresses, Vring, VringLayout};

pub use rejection::Rejection;

/// The message handler of one front-end.
#[derive(Debug)]
pub struct Dispatch {
    backend: SharedBackend,
    /// The front-end runs as the same user or as root.
    trusted: bool,
    /// The crate's handler is being brought to the negotiated state. Requests have no effect on the device.
    priming: AtomicBool,
    rejection: Mutex<Option<Rejection>>,
}

/// Returns the protocol features to offer: those that the device supports and the operator permits.
fn permitted_offer(device: &Device) -> VhostUserProtocolFeatures {
    let offer = protocol_offer(device.datapath());
    if device.offers_device_state() { offer } else { offer - VhostUserProtocolFeatures::DEVICE_STATE }
}

impl Dispatch {
    /// Creates a handler whose requests have no effect until [`Self::serve`].
    pub fn new(backend: SharedBackend, trusted: bool) -> Self {
        Self { backend, trusted, priming: AtomicBool::new(true), rejection: Mutex::default() }
    }

    /// Applies requests to the device from now on.
    pub fn serve(&self) {
        self.priming.store(false, Ordering::Relaxed);
    }

    fn is_priming(&self) -> bool {
        self.priming.load(Ordering::Relaxed)
    }

    /// Returns why the last request was rejected, if it was.
    pub fn take_rejection(&self) -> Option<Rejection> {
        self.noted().take()
    }

    fn noted(&self) -> MutexGuard<'_, Option<Rejection>> {
        self.rejection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a request, and records why it is rejected.
    fn request<T>(&self, action: impl FnOnce(&mut Device) -> std::result::Result<T, Rejection>) -> Result<T> {
        let result = action(&mut self.backend.lock().device);
        self.note(result)
    }

    fn note<T>(&self, result: std::result::Result<T, Rejection>) -> Result<T> {
        result.map_err(|rejection| {
            let error = Error::ReqHandlerError(io::Error::other(rejection.to_string()));
            *self.noted() = Some(rejection);
            error
        })
    }

    /// Runs a request about device state if the front-end negotiated `DEVICE_STATE`, which the crate does not check.
    fn on_device_state<T>(
        &self,
        action: impl FnOnce(&mut Backend) -> std::result::Result<T, DeviceStateError>,
    ) -> Result<T> {
        let backend = &mut *self.backend.lock();
        let negotiated =
            backend.device.session().protocol_features & VhostUserProtocolFeatures::DEVICE_STATE.bits();
        self.note(match negotiated {
            0 => Err(Rejection::NotNegotiated("DEVICE_STATE")),
            _ => action(backend).map_err(Rejection::from),
        })
    }

    fn refuse<T>(&self, what: &'static str) -> Result<T> {
        self.note(Err(Rejection::NotOffered(what)))
    }
}

/// Checks that the device offers the feature that a request needs. The crate does not always check it.
fn check_offered(
    device: &Device,
    feature: VhostUserProtocolFeatures,
    name: &'static str,
) -> std::result::Result<(), Rejection> {
    if permitted_offer(device).contains(feature) { Ok(()) } else { Err(Rejection::NotOffered(name)) }
}

/// Checks that the device has this vring and returns its index.
fn vring_index(device: &Device, index: u32) -> std::result::Result<usize, Rejection> {
    let vrings = device.session().vrings.len().min(2 * device.pairs());
    usize::try_from(index).ok().filter(|index| *index < vrings).ok_or(Rejection::Index(index))
}

/// Like [`vring_index`], for a vring that must be stopped.
fn stopped_vring(device: &Device, index: u32) -> std::result::Result<usize, Rejection> {
    let index = vring_index(device, index)?;
    if device.session().vrings[index].kick.is_some() { Err(Rejection::Running(index)) } else { Ok(index) }
}

fn notifier(fd: Option<File>) -> std::result::Result<Option<Notifier>, Rejection> {
    Ok(fd.map(Notifier::try_from).transpose()?)
}

fn layout(region: &VhostUserMemoryRegion) -> RegionLayout {
    RegionLayout {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn set_memory(device: &mut Device, memory: GuestMemory) -> std::result::Result<(), Rejection> {
    let (regions, max) = (memory.regions(), device.max_regions());
    if regions > max {
        return Err(Rejection::Regions { regions, max });
    }
    let session = device.session();
    SessionState::check_log(session.features, &memory, session.log.as_deref())?;
    Ok(device.change(.., |session| session.memory = Arc::new(memory))?)
}

impl VhostUserBackendReqHandler for Dispatch {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        // Deprecated: the specification recommends that back-ends ignore it, or use it to disable all rings.
        self.request(|device| {
            (0..device.session().vrings.len()).try_for_each(|vring| device.set_enabled(vring, false))?;
            Ok(())
        })
    }

    fn reset_device(&self) -> Result<()> {
        self.request(|device| {
            device.change(.., |session| {
                for vring in &mut session.vrings {
                    *vring = Default::default();
                }
                session.log = None;
                session.inflight = None;
            })?;
            device.set_features(Features::default())?;
            Ok(())
        })
    }

    fn get_features(&self) -> Result<u64> {
        if self.is_priming() {
            return Ok(u64::MAX);
        }
        self.request(|device| Ok(device.offer().0))
    }

    fn set_features(&self, features: u64) -> Result<()> {
        if self.is_priming() {
            return Ok(());
        }
        self.request(|device| {
            let offer = device.offer();
            let excess = Features(features & !offer.0);
            if excess.fundamental() != Features::default() {
                return Err(Rejection::Features(excess.0));
            }
            // Drop features that were not offered: a front-end may implement them itself.
            let accepted = Features(features & offer.0);
            let session = device.session();
            SessionState::check_log(accepted, &session.memory, session.log.as_deref())?;
            device.set_features(accepted)?;
            if features & 1 << PROTOCOL_FEATURES == 0 {
                device.change(.., |session| {
                    for vring in &mut session.vrings {
                        vring.enabled = true;
                        vring.was_enabled = true;
                    }
                })?;
                device.follow_pairs()?;
            }
            Ok(())
        })
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.request(|device| {
            let memory = GuestMemory::map(regions.iter().map(layout).zip(files))?;
            set_memory(device, memory)?;
            Ok(None)
        })
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.request(|device| {
            let vring = stopped_vring(device, index)?;
            let size = vring::check_size(num)?;
            device.change(vring / 2..=vring / 2, |session| session.vrings[vring].size = Some(size))?;
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        self.request(|device| {
            let vring = vring_index(device, index)?;
            let addresses = RingAddresses { descriptors: descriptor, available, used };
            let log_used = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
            if let Some(address) = log_used.filter(|address| !address.is_multiple_of(4)) {
                return Err(LayoutError::Alignment { ring: "logged used", address }.into());
            }
            let session = device.session();
            if let Some(size) = session.vrings[vring].size
                && !session.memory.is_empty()
            {
                let layout = VringLayout { size, addresses, event_idx: false, indirect: false };
                Vring::new(layout, Arc::clone(&session.memory), None)?;
            }
            device.change(vring / 2..=vring / 2, |session| {
                session.vrings[vring].addresses = Some(addresses);
                session.vrings[vring].log_used = log_used;
            })?;
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.request(|device| {
            let vring = stopped_vring(device, index)?;
            let base = u16::try_from(base).map_err(|_| Rejection::Base(base))?;
            device.change(vring / 2..=vring / 2, |session| {
                let setup = &mut session.vrings[vring];
                setup.resumes &= setup.base == base;
                setup.base = base;
                setup.base_is_given = true;
                setup.base_is_ours = false;
            })?;
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        self.request(|device| {
            let vring = vring_index(device, index)?;
            let base = device.stop_ring(vring)?;
            Ok(VhostUserVringState::new(index, u32::from(base)))
        })
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.request(|device| {
            let vring = vring_index(device, u32::from(index))?;
            let kick = notifier(fd)?.map_or(Kick::Polled, Kick::Eventfd);
            device.change(vring / 2..=vring / 2, |session| session.vrings[vring].kick = Some(kick))?;
            device.follow_pairs()?;
            Ok(())
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.request(|device| {
            let vring = vring_index(device, u32::from(index))?;
            let call = notifier(fd)?;
            device.change(vring / 2..=vring / 2, |session| {
                let vring = &mut session.vrings[vring];
                vring.call = call;
                // A call for completed chains may have gone to the old descriptor, unnoticed.
                vring.call_due = vring.started && vring.was_enabled;
            })?;
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.request(|device| {
            let vring = vring_index(device, u32::from(index))?;
            let error = notifier(fd)?;
            device.change(vring / 2..=vring / 2, |session| session.vrings[vring].error = error)?;
            Ok(())
        })
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        if self.is_priming() {
            return Ok(VhostUserProtocolFeatures::all());
        }
        self.request(|device| Ok(permitted_offer(device)))
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        if self.is_priming() {
            return Ok(());
        }
        self.request(|device| {
            let features = features & permitted_offer(device).bits();
            device.change(0..0, |session| session.protocol_features = features)?;
            Ok(())
        })
    }

    fn get_queue_num(&self) -> Result<u64> {
        // Cloud Hypervisor compares this with the number of vrings, QEMU with the number of queue pairs.
        self.request(|device| Ok(2 * device.pairs() as u64))
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.request(|device| {
            let vring = vring_index(device, index)?;
            Ok(device.set_enabled(vring, enable)?)
        })
    }

    fn get_config(&self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let device = &self.backend.lock().device;
        let pairs = u16::try_from(device.pairs()).unwrap_or(u16::MAX);
        // Not recorded as a rejection: the crate answers with a length of 0.
        config_space::read(device.config(), pairs, offset, size).ok_or(Error::InvalidParam)
    }

    fn set_config(&self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.request(|_| Err(Rejection::Config))
    }

    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        self.refuse("a GPU socket")
    }

    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        self.refuse("SHARED_OBJECT")
    }

    fn get_inflight_fd(&self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.request(|device| {
            check_offered(device, VhostUserProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
            let (queues, entries) = (wanted.num_queues, wanted.queue_size);
            if usize::from(queues) > 2 * device.pairs() {
                return Err(Rejection::Index(u32::from(queues) - 1));
            }
            if entries > vring::MAX_SIZE {
                return Err(LayoutError::Size(u32::from(entries)).into());
            }
            let (file, size) = inflight::create(queues, entries)?;
            Ok((VhostUserInflight::new(size, 0, queues, entries), file))
        })
    }

    fn set_inflight_fd(&self, given: &VhostUserInflight, file: File) -> Result<()> {
        self.request(|device| {
            check_offered(device, VhostUserProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
            let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *given;
            let region = InflightRegion::new(file, mmap_offset, mmap_size, num_queues, queue_size)?;
            Ok(device.change(.., |session| session.inflight = Some(Arc::new(region)))?)
        })
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        self.request(|device| Ok(device.max_regions() as u64))
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.request(|device| {
            let memory = device.session().memory.with(layout(region), fd)?;
            set_memory(device, memory)?;
            Ok(None)
        })
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.request(|device| {
            let memory = device.session().memory.without(layout(region))?;
            set_memory(device, memory)
        })
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        // The specification has only one phase so far: the device is stopped.
        self.on_device_state(|Backend { device, handovers }| match direction {
            VhostTransferStateDirection::SAVE => handovers.save_device_state(device, file, self.trusted),
            VhostTransferStateDirection::LOAD => handovers.load_device_state(device, file, self.trusted),
        })?;
        Ok(None)
    }

    fn check_device_state(&self) -> Result<()> {
        self.on_device_state(|backend| backend.handovers.check_device_state())
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        self.refuse("SHMEM")
    }

    fn set_log_base(&self, log: &VhostUserLog, file: File) -> Result<()> {
        self.request(|device| {
            let log = DirtyLog::new(file, log.mmap_offset, log.mmap_size)?;
            log.check_covers(&device.session().memory)?;
            Ok(device.change(.., |session| session.log = Some(Arc::new(log)))?)
        })
    }
}
