//! What a driver has started, and how far its rings are.

use baton_protocol::migration::state::RingBase;

use super::super::identity::for_backend;
use super::super::shared::NetShared;
use crate::vhost_user::frontend::RingStart;
use crate::vhost_user::inflight::Inflight;
use crate::virtio::QueueSetup;
use crate::virtio::control_queue::ControlQueue;

/// What a driver has started.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) features: u64,
    /// The data virtqueues.
    pub(super) queues: Vec<QueueSetup>,
    pub(super) control: Option<Control>,
    /// How many queue pairs the driver uses.
    pub(super) pairs: u16,
    /// Where back-ends note which chains they have, for as long as these virtqueues live.
    pub(super) inflight: Option<Inflight>,
}

impl Started {
    /// Whether a back-end that was told of this needs no other word for `other` than where its rings are.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let Self { features, queues, control: _, pairs, inflight: _ } = self;
        for_backend(*features) == for_backend(other.features)
            && *pairs == other.pairs
            && queues.len() == other.queues.len()
            && self.ready().eq(other.ready())
    }

    /// The data virtqueues that the driver uses.
    pub(super) fn ready(&self) -> impl Iterator<Item = (usize, QueueSetup)> + '_ {
        self.queues.iter().copied().enumerate().filter(|(_, queue)| queue.ready)
    }
}

/// The driver's rings as the back-end is to run them, each at its base or at 0.
pub(super) fn rings<'a>(device: &Started, shared: &'a NetShared, bases: &[RingBase]) -> Vec<RingStart<'a>> {
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

/// How far the rings of a suspended device are.
#[derive(Debug, Default)]
pub(super) struct Suspended {
    pub(super) bases: Vec<RingBase>,
    /// The back-end knows all but what starts them.
    pub(super) set_up: bool,
}
