//! A network device behind its transport.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use super::mailbox::Mailbox;
use super::shared::NetShared;
use super::worker::Worker;
use crate::event;
use crate::mmio_bus::Pending;
use crate::virtio::{Activation, DeviceEvents, VirtioDevice};

/// The largest size of a data virtqueue.
const DATA_QUEUE_SIZE: u16 = 1024;
/// The largest size of the control virtqueue.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The transport's side of a network device.
#[derive(Debug)]
pub struct Net {
    shared: Arc<NetShared>,
    mailbox: Mailbox,
    queue_sizes: Vec<u16>,
}

impl Net {
    /// Creates the device for the worker behind `mailbox`.
    pub fn new(shared: Arc<NetShared>, mailbox: Mailbox) -> Self {
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; usize::from(shared.queue_pairs()) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Self { shared, mailbox, queue_sizes }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.shared.offered().0.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (identity, announce) = self.shared.offered();
        let announce = if announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = u16::try_from(VIRTIO_NET_S_LINK_UP | announce).unwrap_or(0);
        let space = identity.config_space(status);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        let length = data.len().min(space.len() - from);
        data.fill(0);
        data[..length].copy_from_slice(&space[from..from + length]);
    }

    fn events(&self) -> &DeviceEvents {
        &self.shared.events
    }

    fn notify(&self, queue: u16) {
        if let Some(kick) = self.shared.kicks.get(usize::from(queue)) {
            event::signal(kick);
        }
    }

    fn activate(&mut self, activation: Activation) {
        if !self.mailbox.send(move |worker| worker.start(&activation)) {
            self.shared.events.need_reset();
        }
    }

    fn reset(&mut self) -> Pending {
        // A worker that has ended has no connection, so no back-end uses guest memory.
        Pending::new(self.mailbox.submit(Worker::reset))
    }
}

#[cfg(test)]
mod tests {
    use super::super::identity::Identity;
    use super::super::mailbox::mailbox;
    use super::*;
    use crate::config::{Mac, NetConfig};

    #[test]
    fn reads_beyond_the_configuration_space_return_zeros() {
        let config: NetConfig = "socket=/s,queue-pairs=4".parse().unwrap();
        let shared = Arc::new(NetShared::new(&config).unwrap());
        let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
        shared.offer(Identity { features: 0, mac, mtu: 1400, queue_pairs: 4 });
        let (mailbox, _inbox) = mailbox().unwrap();
        let net = Net::new(shared, mailbox);
        let read = |offset, length| {
            let mut data = vec![0xaa; length];
            net.read_config(offset, &mut data);
            data
        };
        assert_eq!(read(0, 8), [0x52, 0x54, 0, 1, 2, 3, 1, 0]);
        assert_eq!(read(8, 8), [4, 0, 0x78, 5, 0, 0, 0, 0]);
        assert_eq!(read(11, 2), [5, 0]);
        assert_eq!(read(u64::MAX, 4), [0; 4]);
        net.shared.set_announce(true);
        assert_eq!(read(6, 2), [3, 0]);
        assert_eq!(net.queue_sizes(), [1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 64]);
    }
}
