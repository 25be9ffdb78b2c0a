//! One vring of the fake front-end's device: the driver's queue, its eventfds, and the buffers for frames.

use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::device::Options;
use super::memory::{GuestMemory, SharedSlice};
use super::net::features;
use super::queue::{Buffer, DESCRIPTOR_SIZE, DriverQueue};

/// A buffer of a queue, for a frame with its header.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) pieces: Vec<(Buffer, SharedSlice)>,
    /// The guest address of its indirect table.
    table: u64,
    pub(super) capacity: usize,
}

/// One vring with its eventfds and buffers.
#[derive(Debug)]
pub struct Ring {
    /// The vring index.
    pub index: u32,
    /// The driver's side of the queue.
    pub queue: DriverQueue,
    /// Notifies the device.
    pub kick: EventFd,
    /// Notifies the driver.
    pub call: EventFd,
    pub(super) slots: Vec<Slot>,
    pub(super) free: Vec<u16>,
    pub(super) slot_of_head: Vec<u16>,
    /// The chain under construction; kept to avoid allocations.
    chain: Vec<Buffer>,
    indirect: bool,
}

impl Ring {
    pub(super) fn new(
        memory: &mut GuestMemory,
        index: u32,
        options: &Options,
        pieces: &[u32],
    ) -> Result<Self> {
        let slots = usize::from(options.queue_size) / if options.indirect { 1 } else { pieces.len() };
        ensure!(slots > 0, "the queue is too small for one buffer");
        let queue = DriverQueue::new(memory, 0, options.queue_size);
        let writable = index.is_multiple_of(2);
        let slots: Vec<_> = (0..slots)
            .map(|number| {
                let region = number % memory.regions().len();
                let pieces: Vec<_> = pieces
                    .iter()
                    .map(|&length| {
                        let bytes = length as usize;
                        let address = memory.allocate(region, bytes, 1);
                        (Buffer { address, length, writable }, memory.slice(address, bytes))
                    })
                    .collect();
                let table = memory.allocate(region, DESCRIPTOR_SIZE * pieces.len(), 16);
                let capacity = pieces.iter().map(|(_, slice)| slice.len()).sum();
                Slot { pieces, table, capacity }
            })
            .collect();
        Ok(Self {
            index,
            free: (0..u16::try_from(slots.len())?).rev().collect(),
            slots,
            slot_of_head: vec![0; usize::from(queue.size())],
            chain: Vec::with_capacity(pieces.len()),
            queue,
            kick: event_fd()?,
            call: event_fd()?,
            indirect: options.indirect,
        })
    }

    /// Makes the first `length` bytes of a slot available. Returns the head of the chain, or `None` if the queue has
    /// too few descriptors.
    pub(super) fn add(&mut self, memory: &GuestMemory, slot: u16, mut length: usize) -> Option<u16> {
        let Slot { pieces, table, .. } = &self.slots[usize::from(slot)];
        self.chain.clear();
        for (buffer, slice) in pieces {
            let used = length.min(slice.len());
            if used == 0 {
                break;
            }
            self.chain.push(Buffer { length: u32::try_from(used).ok()?, ..*buffer });
            length -= used;
        }
        let head = if self.indirect {
            self.queue.add_indirect(memory, *table, &self.chain)
        } else {
            self.queue.add(&self.chain)
        }?;
        self.slot_of_head[usize::from(head)] = slot;
        Some(head)
    }

    /// Publishes the added chains and kicks if the device wants it.
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.queue.publish() {
            self.kick()?;
        }
        Ok(())
    }

    /// Kicks, whether the device wants it or not.
    ///
    /// # Errors
    /// Returns an error if the eventfd cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.kick.write(1).context("cannot kick")?;
        Ok(())
    }

    /// Starts again with an empty queue, as a driver does when it resets its device.
    ///
    /// # Errors
    /// Returns no error: the number of slots was checked before.
    pub fn reset(&mut self, memory: &GuestMemory, negotiated: u64) -> Result<()> {
        self.queue = DriverQueue::at(memory, self.queue.addresses(), self.queue.size());
        let has = |feature| negotiated & feature != 0;
        self.queue.negotiated(has(features::EVENT_IDX), has(features::IN_ORDER));
        self.free = (0..u16::try_from(self.slots.len())?).rev().collect();
        Ok(())
    }

    /// Replaces the eventfds by new ones, in which no notification is pending.
    ///
    /// # Errors
    /// Returns an error if an eventfd cannot be created.
    pub fn renew_events(&mut self) -> Result<()> {
        (self.kick, self.call) = (event_fd()?, event_fd()?);
        Ok(())
    }

    /// Takes the pending calls. Returns their number.
    ///
    /// # Errors
    /// Returns an error if the eventfd cannot be read.
    pub fn take_calls(&self) -> Result<u64> {
        match self.call.read() {
            Ok(calls) => Ok(calls),
            Err(nix::errno::Errno::EAGAIN) => Ok(0),
            Err(errno) => Err(errno).context("cannot read the call eventfd"),
        }
    }

    /// Waits for a call and takes it. Returns false if none arrives before `deadline`.
    ///
    /// # Errors
    /// Returns an error if the eventfd cannot be polled or read.
    pub fn wait_call(&self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left)?)?;
        Ok(self.take_calls()? > 0)
    }

    /// Waits as a driver does until the device has used a chain: enables calls and sleeps until one arrives. Returns
    /// false if the device uses none before `deadline`.
    ///
    /// # Errors
    /// Returns an error if the eventfd cannot be polled or read.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<bool> {
        while self.queue.enable_calls() {
            if !self.wait_call(deadline)? && Instant::now() >= deadline {
                return Ok(self.queue.has_used());
            }
        }
        Ok(true)
    }
}

fn event_fd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("cannot create an eventfd")
}
