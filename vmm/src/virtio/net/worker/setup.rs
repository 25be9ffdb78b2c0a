//! What a driver has set up on the device, and the rings' bases.

use baton_protocol::migration::state::RingBase;

use super::super::identity::for_backend;
use super::super::shared::NetShared;
use crate::vhost_user::frontend::RingStart;
use crate::vhost_user::inflight::Inflight;
use crate::virtio::QueueSetup;
use crate::virtio::control_queue::ControlQueue;

/// What a driver has set up. Checked.
#[derive(Debug)]
pub(super) struct DeviceSetup {
    pub(super) features: u64,
    /// The data virtqueues.
    pub(super) queues: Vec<QueueSetup>,
    pub(super) control: Option<Control>,
    /// How many queue pairs the driver uses.
    pub(super) pairs: u16,
    /// The inflight region, for as long as these virtqueues live.
    pub(super) inflight: Option<Inflight>,
}

impl DeviceSetup {
    /// Returns whether rings that are set up for `self` need only their bases to serve `other`.
    pub(super) fn has_rings_of(&self, other: &Self) -> bool {
        let Self { features, queues, control: _, pairs, inflight: _ } = self;
        for_backend(*features) == for_backend(other.features)
            && *pairs == other.pairs
            && queues.len() == other.queues.len()
            && self.ready().eq(other.ready())
    }

    /// Returns the data virtqueues that the driver uses.
    pub(super) fn ready(&self) -> impl Iterator<Item = (usize, QueueSetup)> + '_ {
        self.queues.iter().copied().enumerate().filter(|(_, queue)| queue.ready)
    }
}

/// Returns the driver's rings, each to start at its base, or at 0 if it has none.
pub(super) fn rings<'a>(
    device: &DeviceSetup,
    shared: &'a NetShared,
    bases: &[RingBase],
) -> Vec<RingStart<'a>> {
    let base = |index| bases.iter().find(|base| usize::from(base.index) == index).map_or(0, |base| base.base);
    let ring = |(index, setup)| RingStart {
        index,
        setup,
        base: base(index),
        enabled: index / 2 < usize::from(device.pairs),
        kick: &shared.kicks[index],
        call: &shared.calls[index],
    };
    device.ready().map(ring).collect()
}

#[derive(Debug)]
pub(super) struct Control {
    pub(super) queue: ControlQueue,
    pub(super) index: usize,
}

/// The rings of a suspended device.
#[derive(Debug, Default)]
pub(super) struct Suspended {
    pub(super) bases: Vec<RingBase>,
    /// Whether the rings are set up in the back-end and have their bases there.
    pub(super) set_up: bool,
}
