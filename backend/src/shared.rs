//! The device and its hand-overs, which the event loop and the front-end's message handler both use, one at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::Device;
use crate::handover::Handovers;

/// What messages, hand-overs and the operator work on.
#[derive(Debug)]
pub struct Backend {
    /// The device.
    pub device: Device,
    /// Its hand-overs.
    pub handovers: Handovers,
}

/// A [`Backend`] with several owners in one thread: the `vhost` crate's handler has one of its own.
#[derive(Clone, Debug)]
pub struct SharedBackend(Arc<Mutex<Backend>>);

impl SharedBackend {
    /// Shares it.
    pub fn new(device: Device, handovers: Handovers) -> Self {
        Self(Arc::new(Mutex::new(Backend { device, handovers })))
    }

    /// Gives access until the guard is dropped. No message is handled meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, Backend> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
