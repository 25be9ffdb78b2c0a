//! A back-end for tests. It records its messages and does nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL: u64 = 1 << 30;
/// Virtio 1.
const VERSION_1: u64 = 1 << 32;

/// The number of inflight regions requested so far.
static REGIONS: AtomicU64 = AtomicU64::new(0);

/// What the back-end offers and refuses, and the messages that it received.
#[derive(Debug)]
pub struct FakeBackend {
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    pub vrings: u64,
    /// The base at which it stops each vring; 0 for those beyond the end.
    pub bases: Vec<u32>,
    pub config: [u8; 12],
    /// The message that is answered with an error.
    pub refuses: Option<&'static str>,
    pub log: Vec<String>,
    pub memory: Vec<(u64, u64)>,
    pub kicks: Vec<(u8, File)>,
    pub calls: Vec<(u8, File)>,
    /// The number of the inflight region that it was given. Each requested region has a different number.
    pub inflight: Option<u64>,
}

impl FakeBackend {
    /// Creates a back-end with every feature that the VMM uses, except device state.
    pub fn new(vrings: u64) -> Self {
        Self {
            features: PROTOCOL | VERSION_1 | 1 << 22 | 1 << 21 | 1 << 15 | 1 << 5 | 1 << 3,
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            vrings,
            bases: Vec::new(),
            config: [0x52, 0x54, 0, 1, 2, 3, 1, 0, 4, 0, 0x78, 5],
            refuses: None,
            log: Vec::new(),
            memory: Vec::new(),
            kicks: Vec::new(),
            calls: Vec::new(),
            inflight: None,
        }
    }

    /// Serves a connection until it ends.
    pub fn serve(self, stream: UnixStream) -> Serving {
        let backend = Arc::new(Mutex::new(self));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
        let thread = std::thread::spawn(move || while handler.handle_request().is_ok() {});
        Serving { backend, thread }
    }

    fn note(&mut self, message: &'static str, arguments: &str) -> Result<()> {
        self.log.push(format!("{message} {arguments}").trim_end().to_owned());
        if self.refuses == Some(message) { Err(Error::InvalidParam) } else { Ok(()) }
    }
}

/// A back-end that serves a connection.
pub struct Serving {
    pub backend: Arc<Mutex<FakeBackend>>,
    thread: JoinHandle<()>,
}

impl Serving {
    /// Waits until the connection ends, and returns the back-end.
    pub fn finish(self) -> FakeBackend {
        self.thread.join().unwrap();
        Arc::into_inner(self.backend).unwrap().into_inner().unwrap()
    }
}

impl VhostUserBackendReqHandlerMut for FakeBackend {
    fn set_owner(&mut self) -> Result<()> {
        self.note("SET_OWNER", "")
    }
    fn reset_owner(&mut self) -> Result<()> {
        self.note("RESET_OWNER", "")
    }
    fn reset_device(&mut self) -> Result<()> {
        self.note("RESET_DEVICE", "")
    }
    fn get_features(&mut self) -> Result<u64> {
        self.note("GET_FEATURES", "")?;
        Ok(self.features)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.note("SET_FEATURES", &format!("{features:#x}"))
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        assert_eq!(regions.len(), files.len());
        self.memory = regions.iter().map(|region| (region.user_addr, region.memory_size)).collect();
        self.note("SET_MEM_TABLE", "")?;
        Ok(None)
    }
    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        self.note("SET_VRING_NUM", &format!("{index} {size}"))
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let base = self.memory.first().unwrap().0;
        let place = [descriptors, available, used].map(|address| format!("{:#x}", address - base));
        self.note("SET_VRING_ADDR", &format!("{index} {}", place.join(" ")))
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.note("SET_VRING_BASE", &format!("{index} {base}"))
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.note("GET_VRING_BASE", &format!("{index}"))?;
        let base = usize::try_from(index).ok().and_then(|index| self.bases.get(index));
        Ok(VhostUserVringState::new(index, base.copied().unwrap_or(0)))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.kicks.extend(fd.map(|fd| (index, fd)));
        self.note("SET_VRING_KICK", &format!("{index}"))
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.calls.extend(fd.map(|fd| (index, fd)));
        self.note("SET_VRING_CALL", &format!("{index}"))
    }
    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.note("SET_VRING_ERR", &format!("{index}"))
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        self.note("GET_PROTOCOL_FEATURES", "")?;
        Ok(self.protocol)
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.note("SET_PROTOCOL_FEATURES", &format!("{features:#x}"))
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        self.note("GET_QUEUE_NUM", "")?;
        Ok(self.vrings)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.note("SET_VRING_ENABLE", &format!("{index} {}", u8::from(enable)))
    }
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.note("GET_CONFIG", &format!("{offset} {size}"))?;
        Ok(self.config.to_vec())
    }
    fn set_config(&mut self, _offset: u32, _buffer: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.note("SET_CONFIG", "")
    }
    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }
    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *wanted;
        self.note("GET_INFLIGHT_FD", &format!("{num_queues} {queue_size}"))?;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let number = REGIONS.fetch_add(1, Ordering::Relaxed);
        file.write_all_at(&number.to_ne_bytes(), 0).unwrap();
        Ok((VhostUserInflight::new(4096, 0, num_queues, queue_size), file))
    }
    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        assert_eq!((given.mmap_size, given.mmap_offset), (4096, 0));
        let mut number = [0; 8];
        file.read_exact_at(&mut number, 0).unwrap();
        self.inflight = Some(u64::from_ne_bytes(number));
        self.note("SET_INFLIGHT_FD", &format!("{} {}", given.num_queues, given.queue_size))
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidParam)
    }
    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidParam)
    }
    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }
    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }
    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidParam)
    }
}
