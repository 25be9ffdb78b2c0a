//! The device and its hand-overs. The event loop and the front-end's message handler use them in turn.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::Device;
use crate::handover::Handovers;

/// The state that front-end messages, hand-overs and control requests act on.
#[derive(Debug)]
pub struct Backend {
    /// The device.
    pub device: Device,
    /// Its hand-overs.
    pub handovers: Handovers,
}

/// A [`Backend`] with several owners in one thread: the `vhost` crate's handler needs its own reference.
#[derive(Clone, Debug)]
pub struct SharedBackend(Arc<Mutex<Backend>>);

impl SharedBackend {
    /// Shares a device and its hand-overs.
    pub fn new(device: Device, handovers: Handovers) -> Self {
        Self(Arc::new(Mutex::new(Backend { device, handovers })))
    }

    /// Locks the back-end. No message can be handled until the guard is dropped.
    pub fn lock(&self) -> MutexGuard<'_, Backend> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
