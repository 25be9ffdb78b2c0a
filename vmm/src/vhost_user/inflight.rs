//! The region in which a back-end tracks the descriptor chains in flight (vhost-user: "Inflight I/O tracking").
//!
//! The VMM requests it from a back-end when a driver starts its rings, keeps it for as long as the rings exist, and
//! sends it to each back-end that serves them. The VMM does not read it.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// An inflight region, for the rings of one start of the device.
pub struct Inflight {
    description: VhostUserInflight,
    file: File,
}

impl fmt::Debug for Inflight {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VhostUserInflight { mmap_size, num_queues, queue_size, .. } = self.description;
        formatter
            .debug_struct("Inflight")
            .field("size", &mmap_size)
            .field("queues", &num_queues)
            .field("entries", &queue_size)
            .finish_non_exhaustive()
    }
}

impl Inflight {
    /// Requests an empty region for `queues` vrings of up to `entries` descriptors.
    pub fn get(frontend: &mut Frontend, queues: u16, entries: u16) -> vhost::Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, queues, entries);
        let (description, file) = frontend.get_inflight_fd(&wanted)?;
        Ok(Self { description, file })
    }

    /// Sends the region to the back-end, before the vrings are set up.
    pub fn set(&self, frontend: &mut Frontend) -> vhost::Result<()> {
        frontend.set_inflight_fd(&self.description, self.file.as_raw_fd())
    }
}
