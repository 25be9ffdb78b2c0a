//! A network back-end written with the crates `vhost-user-backend` and `virtio-queue`, without Baton's code: a foreign
//! peer for `baton-vmm`, and the baseline for benchmarks of `baton-backend`.
//!
//! One thread of the crate handles the front-end's messages. Another one, the worker, waits for kicks and for the TAP,
//! and copies frames in `NetBackend::move_frames`. The device has one queue pair.
//!
//! It does not offer mergeable receive buffers: `Queue::add_used` publishes each buffer by itself, so the driver could
//! see some of a frame's buffers without the others.

mod program;
mod tap;

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

pub use self::program::Program;
use self::tap::{MAX_FRAME, Tap};

/// The virtio features that are offered.
const FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | (1 << VIRTIO_NET_F_CSUM)
    | (1 << VIRTIO_NET_F_HOST_TSO4)
    | (1 << VIRTIO_NET_F_HOST_TSO6)
    | (1 << VIRTIO_NET_F_GUEST_CSUM)
    | (1 << VIRTIO_NET_F_GUEST_TSO4)
    | (1 << VIRTIO_NET_F_GUEST_TSO6);

/// The vring that takes frames to the guest.
const RECEIVE: usize = 0;
/// The vring that takes frames from the guest.
const TRANSMIT: usize = 1;
/// How many vrings there are.
const VRINGS: usize = 2;
/// The event number of the TAP. The crate uses the numbers up to [`VRINGS`].
const TAP_EVENT: u64 = 3;

/// The largest queue.
const MAX_QUEUE_SIZE: usize = 1024;
/// How many frames the worker moves one way before it turns to the other.
const BATCH: usize = 64;

/// Serves front-ends on a socket, one after the other, with the TAP of this name.
///
/// # Errors
/// Returns an error if the TAP cannot be opened or the socket cannot be created.
pub fn serve(socket: &Path, tap: &str) -> Result<Infallible> {
    let tap = Arc::new(Tap::open(tap)?);
    let listener = Listener::new(socket, true);
    let mut listener = listener.with_context(|| format!("cannot listen on {}", socket.display()))?;
    loop {
        serve_front_end(&mut listener, &tap)?;
    }
}

/// Waits for a front-end and serves it until it disconnects.
fn serve_front_end(listener: &mut Listener, tap: &Arc<Tap>) -> Result<()> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = NetBackend {
        tap: Arc::clone(tap),
        memory: memory.clone(),
        frame: Mutex::new(vec![0; MAX_FRAME].into_boxed_slice()),
    };
    // The crate's error does not implement `std::error::Error`.
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), Arc::new(backend), memory)
        .map_err(|error| anyhow!("{error}"))?;
    for worker in daemon.get_epoll_handlers() {
        // Edge-triggered: frames may wait in the TAP for receive buffers.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        worker.register_listener(tap.as_raw_fd(), events, TAP_EVENT).context("cannot watch the TAP")?;
    }
    daemon.start(listener).map_err(|error| anyhow!("{error}"))?;
    match daemon.wait() {
        Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => (),
        Err(error) => eprintln!("reference-backend: front-end lost: {error}"),
    }
    Ok(())
}

/// The device of one front-end.
struct NetBackend {
    tap: Arc<Tap>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// The worker's copy of a frame, behind its header.
    frame: Mutex<Box<[u8]>>,
}

impl VhostUserBackend for NetBackend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        VRINGS
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        if let Err(error) = self.tap.set_offloads(features) {
            eprintln!("reference-backend: cannot set the TAP's offloads: {error}");
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate sets it in the vrings.
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // It is `self.memory`, which each batch reads anew.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without it, the daemon waits for its worker forever when it is dropped.
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let result = self.move_frames(vrings);
        // The crate ends the worker without a message.
        result.inspect_err(|error| eprintln!("reference-backend: {error:#}")).map_err(io::Error::other)
    }
}

impl NetBackend {
    /// Moves frames both ways until neither direction can continue, whatever the event: when a vring starts, the TAP
    /// may already contain frames whose event is past.
    fn move_frames(&self, vrings: &[VringMutex]) -> Result<()> {
        let mut frame = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let received = self.receive(&vrings[RECEIVE], &mut frame)?;
            let transmitted = self.transmit(&vrings[TRANSMIT], &mut frame)?;
            if !received && !transmitted {
                return Ok(());
            }
        }
    }

    /// Moves a batch of frames to the guest. Returns false once the TAP or the vring is empty.
    fn receive(&self, vring: &VringMutex, frame: &mut [u8]) -> Result<bool> {
        self.process(vring, |chain, memory| {
            let Some(length) = self.tap.read(frame).context("cannot read the TAP")? else {
                return Ok(None);
            };
            Ok(Some(write_chain(chain, memory, &frame[..length])))
        })
    }

    /// Moves a batch of frames from the guest. Returns false once the vring is empty.
    fn transmit(&self, vring: &VringMutex, frame: &mut [u8]) -> Result<bool> {
        self.process(vring, |chain, memory| {
            if let Some(length) = read_chain(chain, memory, frame) {
                self.tap.write(&frame[..length]);
            }
            Ok(Some(0))
        })
    }

    /// Passes a batch of chains to `use_chain`, which returns how many bytes it wrote to the chain, or `None` to leave
    /// it available. Returns false once no chain is available, or one was left.
    fn process(
        &self,
        vring: &VringMutex,
        mut use_chain: impl FnMut(DescriptorChain<&GuestMemoryMmap>, &GuestMemoryMmap) -> Result<Option<u32>>,
    ) -> Result<bool> {
        // Locked for the whole batch, so that GET_VRING_BASE waits for it.
        let mut vring = vring.get_mut();
        if !vring.is_enabled() || !vring.get_queue().ready() {
            return Ok(false);
        }
        let memory = self.memory.memory();
        let memory: &GuestMemoryMmap = &memory;
        let queue = vring.get_queue_mut();
        queue.disable_notification(memory)?;
        let (mut goes_on, mut used) = (true, false);
        for _ in 0..BATCH {
            let Some(chain) = queue.iter(memory)?.next() else {
                goes_on = queue.enable_notification(memory)?;
                break;
            };
            let head = chain.head_index();
            let Some(written) = use_chain(chain, memory)? else {
                queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                goes_on = false;
                break;
            };
            queue.add_used(memory, head, written)?;
            used = true;
        }
        if used && vring.needs_notification()? {
            vring.signal_used_queue().context("cannot call the driver")?;
        }
        Ok(goes_on)
    }
}

/// Copies a frame into a chain and returns how many bytes it wrote. Drops a frame that does not fit.
fn write_chain(chain: DescriptorChain<&GuestMemoryMmap>, memory: &GuestMemoryMmap, frame: &[u8]) -> u32 {
    let written = chain.writer(memory).ok().and_then(|mut writer| {
        let fits = writer.available_bytes() >= frame.len();
        (fits && writer.write_all(frame).is_ok()).then_some(frame.len())
    });
    written.and_then(|length| u32::try_from(length).ok()).unwrap_or(0)
}

/// Copies a frame from a chain and returns its length, or `None` if the chain is malformed or too long.
fn read_chain(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    frame: &mut [u8],
) -> Option<usize> {
    let mut reader = chain.reader(memory).ok()?;
    let length = reader.available_bytes();
    reader.read_exact(frame.get_mut(..length)?).ok()?;
    Some(length)
}
