//! The control virtqueue of a network device (Virtio 1.2, section 5.1.6.5), served by the VMM because the vhost-user
//! protocol does not cover it.
//!
//! A command is a chain of a class, a command and its data for the device to read, and one byte for the device to
//! write. A malformed chain is returned unanswered. A malformed ring is not served until the driver resets the
//! device.

use std::io::{Read, Write};

use baton_protocol::migration::state::ControlState;
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use crate::memory::GuestMemory;

const CLASS_ANNOUNCE: u8 = narrow(VIRTIO_NET_CTRL_ANNOUNCE);
const ANNOUNCE_ACKNOWLEDGE: u8 = narrow(VIRTIO_NET_CTRL_ANNOUNCE_ACK);
const CLASS_MULTI_QUEUE: u8 = narrow(VIRTIO_NET_CTRL_MQ);
const MULTI_QUEUE_SET_PAIRS: u8 = narrow(VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
const OK: u8 = narrow(VIRTIO_NET_OK);
const ERROR: u8 = narrow(VIRTIO_NET_ERR);

/// Converts a constant of the specification to the one byte that it is on the wire.
const fn narrow(constant: u32) -> u8 {
    assert!(constant <= 0xff);
    constant.to_le_bytes()[0]
}

/// A driver's command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The driver has sent the requested announcement.
    AcknowledgeAnnounce,
    /// The driver uses this number of queue pairs from now on.
    SetQueuePairs(u16),
}

/// The command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// The ring contradicts itself: only a reset makes it usable again.
#[derive(Debug, Error)]
#[error("the control virtqueue is broken")]
pub struct Broken(#[from] virtio_queue::Error);

/// A control virtqueue, owned by the device's worker.
#[derive(Debug)]
pub struct ControlQueue {
    queue: Queue,
}

/// What the caller has to do after [`ControlQueue::serve`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Interrupt the driver.
    pub interrupt: bool,
    /// Serve again after other work: there may be more commands.
    pub more: bool,
}

impl ControlQueue {
    /// Creates the control queue of a checked virtqueue. `event_idx` says whether `VIRTIO_RING_F_EVENT_IDX` is
    /// negotiated.
    pub fn new(mut queue: Queue, event_idx: bool) -> Self {
        queue.set_event_idx(event_idx);
        Self { queue }
    }

    /// Returns the queue's indices.
    pub fn save(&self) -> ControlState {
        ControlState { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Continues from saved indices.
    pub fn restore(&mut self, state: ControlState) {
        self.queue.set_next_avail(state.next_available);
        self.queue.set_next_used(state.next_used);
    }

    /// Carries out the available commands, at most as many as the ring has entries.
    pub fn serve<F>(&mut self, memory: &GuestMemory, mut carry_out: F) -> Result<Served, Broken>
    where
        F: FnMut(Command) -> Result<(), Refused>,
    {
        let mut served = Served::default();
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.iter(memory)?.next() else {
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(served);
            };
            let head = chain.head_index();
            let written = answer(memory, &chain, &mut carry_out);
            self.queue.add_used(memory, head, written)?;
            served.interrupt |= self.queue.needs_notification(memory)?;
        }
        served.more = true;
        Ok(served)
    }
}

/// Carries out the command in a chain. Returns the number of bytes written for the driver.
fn answer<F>(memory: &GuestMemory, chain: &DescriptorChain<&GuestMemory>, carry_out: &mut F) -> u32
where
    F: FnMut(Command) -> Result<(), Refused>,
{
    // Checked first: a command that cannot be answered must have no effect.
    let Ok(mut writer) = chain.clone().writer(memory) else { return 0 };
    if writer.available_bytes() == 0 {
        return 0;
    }
    let outcome = match chain.clone().reader(memory) {
        Ok(mut reader) => parse(&mut reader).and_then(carry_out),
        Err(_) => Err(Refused),
    };
    match writer.write_all(&[if outcome.is_ok() { OK } else { ERROR }]) {
        Ok(()) => 1,
        Err(_) => 0,
    }
}

fn parse(reader: &mut impl Read) -> Result<Command, Refused> {
    let mut header = [0; 2];
    reader.read_exact(&mut header).map_err(|_| Refused)?;
    match header {
        [CLASS_ANNOUNCE, ANNOUNCE_ACKNOWLEDGE] => Ok(Command::AcknowledgeAnnounce),
        [CLASS_MULTI_QUEUE, MULTI_QUEUE_SET_PAIRS] => {
            let mut pairs = [0; 2];
            reader.read_exact(&mut pairs).map_err(|_| Refused)?;
            Ok(Command::SetQueuePairs(u16::from_le_bytes(pairs)))
        }
        _ => Err(Refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Address, Bytes, GuestAddress};

    const WRITE: u16 = 2;
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const REQUEST: u64 = 0x10_0000;
    const ANSWER: u64 = 0x20_0000;
    const UNANSWERED: u8 = 0x55;
    const SIZE: u16 = 16;
    const DESCRIPTORS: GuestAddress = GuestAddress(0x1000);
    const AVAILABLE_RING: GuestAddress = GuestAddress(0x4000);
    const USED_RING: GuestAddress = GuestAddress(0x8000);

    type Descriptor = [u8; 16];

    fn memory() -> GuestMemory {
        crate::memory::allocate(64 << 20).unwrap()
    }

    fn control_queue(event_idx: bool) -> ControlQueue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(DESCRIPTORS).unwrap();
        queue.try_set_avail_ring_address(AVAILABLE_RING).unwrap();
        queue.try_set_used_ring_address(USED_RING).unwrap();
        queue.set_ready(true);
        ControlQueue::new(queue, event_idx)
    }

    fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
        let [flags, next] = [flags, next].map(u16::to_le_bytes);
        let fields = [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags, &next];
        fields.concat().try_into().unwrap()
    }

    /// Writes a chain to the first descriptors. Every entry of the available ring is 0, its head.
    fn put_chain(memory: &GuestMemory, chain: &[Descriptor]) {
        memory.write_slice(chain.as_flattened(), DESCRIPTORS).unwrap();
    }

    fn make_available(memory: &GuestMemory, chains: u16) {
        memory.write_obj(chains.to_le(), AVAILABLE_RING.unchecked_add(2)).unwrap();
    }

    /// Serves one chain. Returns the commands carried out, the answer, and the used length.
    fn serve(chain: &[Descriptor], request: &[u8]) -> (Vec<Command>, u8, u32) {
        let memory = memory();
        memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        memory.write_obj(UNANSWERED, GuestAddress(ANSWER)).unwrap();
        put_chain(&memory, chain);
        make_available(&memory, 1);
        let mut control = control_queue(false);
        let mut commands = Vec::new();
        let served = control
            .serve(&memory, |command| {
                commands.push(command);
                if command == Command::SetQueuePairs(99) { Err(Refused) } else { Ok(()) }
            })
            .unwrap();
        assert_eq!(served, Served { interrupt: true, more: false });
        assert_eq!(memory.read_obj::<u16>(USED_RING.unchecked_add(2)).unwrap(), 1);
        let length = memory.read_obj::<u32>(USED_RING.unchecked_add(8)).unwrap();
        (commands, memory.read_obj(GuestAddress(ANSWER)).unwrap(), length)
    }

    fn two_part(request: &[u8]) -> (Vec<Command>, u8, u32) {
        let length = u32::try_from(request.len()).unwrap();
        serve(&[descriptor(REQUEST, length, NEXT, 1), descriptor(ANSWER, 1, WRITE, 0)], request)
    }

    #[test]
    fn commands_are_carried_out() {
        assert_eq!(two_part(&[4, 0, 3, 0]), (vec![Command::SetQueuePairs(3)], OK, 1));
        assert_eq!(two_part(&[3, 0]), (vec![Command::AcknowledgeAnnounce], OK, 1));
    }

    #[test]
    fn command_may_span_several_descriptors() {
        let chain = [
            descriptor(REQUEST, 1, NEXT, 1),
            descriptor(REQUEST + 1, 2, NEXT, 2),
            descriptor(REQUEST + 3, 1, NEXT, 3),
            descriptor(ANSWER, 1, WRITE, 0),
        ];
        assert_eq!(serve(&chain, &[4, 0, 3, 0]), (vec![Command::SetQueuePairs(3)], OK, 1));
    }

    #[test]
    fn failed_and_unknown_commands_are_refused() {
        assert_eq!(two_part(&[4, 0, 99, 0]), (vec![Command::SetQueuePairs(99)], ERROR, 1));
        for unknown in [&[0, 0, 1][..], &[4, 1, 1, 0], &[3, 1], &[255, 255]] {
            assert_eq!(two_part(unknown), (vec![], ERROR, 1), "{unknown:?}");
        }
    }

    #[test]
    fn command_that_is_too_short_is_refused() {
        for short in [&[][..], &[4], &[4, 0], &[4, 0, 3]] {
            assert_eq!(two_part(short), (vec![], ERROR, 1), "{short:?}");
        }
    }

    #[test]
    fn chain_without_room_for_the_answer_has_no_effect() {
        let no_answer = [descriptor(REQUEST, 4, 0, 0)];
        assert_eq!(serve(&no_answer, &[4, 0, 3, 0]), (vec![], UNANSWERED, 0));
        let empty_answer = [descriptor(REQUEST, 4, NEXT, 1), descriptor(ANSWER, 0, WRITE, 0)];
        assert_eq!(serve(&empty_answer, &[4, 0, 3, 0]), (vec![], UNANSWERED, 0));
    }

    #[test]
    fn chain_outside_guest_memory_has_no_effect() {
        for (request, answer) in [(REQUEST, u64::MAX - 1), (REQUEST, 64 << 20), (u64::MAX, ANSWER)] {
            let chain = [descriptor(request, 4, NEXT, 1), descriptor(answer, 1, WRITE, 0)];
            let (commands, _, _) = serve(&chain, &[4, 0, 3, 0]);
            assert_eq!(commands, []);
        }
    }

    #[test]
    fn loops_and_invalid_indirect_tables_have_no_effect() {
        let looped = [descriptor(REQUEST, 4, NEXT, 1), descriptor(REQUEST, 4, NEXT, 0)];
        assert_eq!(serve(&looped, &[4, 0, 3, 0]).0, []);
        let wild_next = [descriptor(REQUEST, 4, NEXT, 9999)];
        assert_eq!(serve(&wild_next, &[4, 0, 3, 0]).0, []);
        for (address, length) in [(0x30_0000, 3), (0x30_0000, !15), (!15, 64)] {
            assert_eq!(serve(&[descriptor(address, length, INDIRECT, 0)], &[4, 0, 3, 0]).0, []);
        }
    }

    #[test]
    fn ring_with_too_many_chains_is_broken() {
        let memory = memory();
        let mut control = control_queue(true);
        make_available(&memory, SIZE + 1);
        control.serve(&memory, |_| Ok(())).unwrap_err();
    }

    #[test]
    fn endless_commands_do_not_occupy_the_thread() {
        let memory = memory();
        let chain = [descriptor(REQUEST, 4, NEXT, 1), descriptor(ANSWER, 1, WRITE, 0)];
        put_chain(&memory, &chain);
        make_available(&memory, 1);
        memory.write_slice(&[4, 0, 3, 0], GuestAddress(REQUEST)).unwrap();
        let mut control = control_queue(false);
        let mut commands = 0_u16;
        let served = control
            .serve(&memory, |_| {
                commands += 1;
                make_available(&memory, commands + 1);
                Ok(())
            })
            .unwrap();
        assert_eq!((commands, served), (SIZE, Served { interrupt: true, more: true }));
    }
}
